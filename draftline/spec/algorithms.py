"""From a spec of one draft algorithm to the same run with another: for comparing them on equal terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WITHOUT_HEADS: Mapping[str, Any] = {
    "draft.markov_rank": 0,
    "draft.markov_head": "vanilla",
    "draft.enable_confidence_head": False,
}

ALGORITHM_OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "dspark": {"draft.algorithm": "dspark"},
    "dflash": {"draft.algorithm": "dflash", **_WITHOUT_HEADS},
    "eagle3": {"draft.algorithm": "eagle3", "draft.num_layers": 1, **_WITHOUT_HEADS},
}
"""For each algorithm what :func:`draftline.spec.derive` needs to turn a DSpark spec into one of it."""

REFERENCE_LOSS: Mapping[str, Mapping[str, Any]] = {
    "dspark": {"train.loss.ce": 0.1, "train.loss.tv": 0.9, "train.loss.kl": 0.0, "train.loss.confidence": 1.0},
    "dflash": {"train.loss.ce": 1.0, "train.loss.tv": 0.0, "train.loss.kl": 0.0},
    # Cross-entropy to the target's whole law, of which the KL divergence differs by a constant.
    "eagle3": {"train.loss.ce": 0.0, "train.loss.tv": 0.0, "train.loss.kl": 1.0},
}
"""The loss that the public reference (DeepSpec's ``config/``) trains each algorithm with."""
