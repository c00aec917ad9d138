"""``draftline plan --helm-values``: the sizes of a plan as values of the chart ``draftline``."""

from __future__ import annotations

import math

import yaml

from draftline.planner import Plan
from draftline.spec import RunSpec

_GIB = 1024**3

STORE_RESERVE = 1.3
"""Objects besides the hidden states (responses, tokens, checkpoints, artefacts), and room for the next run to begin."""

LEAST_STORE_GIB = 20

WEIGHT_BYTES = 2
"""Of one parameter as the hub has it, bf16."""

CACHE_RESERVE = 2.0
"""A download lies beside the file that it becomes, and some targets are converted once."""

DRAFTS_GIB = 5
"""Drafts of several versions; each is a fraction of a GiB."""


def helm_values(made: Plan, spec: RunSpec) -> str:
    """A fragment of ``values.yaml`` (YAML): the target, and volumes that hold it and the run's objects.

    Args:
        made: The plan.
        spec: What was planned.
    """
    hidden_states = next((line.total_bytes for line in made.cache if line.codec == made.codec), 0.0)
    store_gib = max(LEAST_STORE_GIB, math.ceil(STORE_RESERVE * hidden_states / _GIB))
    weights_gib = made.num_parameters * WEIGHT_BYTES / _GIB
    target = {
        name: value for name, value in spec.target.model_dump(mode="json", exclude_defaults=True).items() if value
    }
    document = {
        "serving": {
            "target": {"source": spec.target.source, **target},
            "spec": {"model_name": spec.serving.model_name},
            "cache": {"size": f"{math.ceil(CACHE_RESERVE * weights_gib) + DRAFTS_GIB}Gi"},
        },
        "minio": {"persistence": {"size": f"{store_gib}Gi"}},
    }
    stored = "no hidden states are stored" if made.codec is None else f"{hidden_states / 1e9:,.0f} GB in {made.codec}"
    head = (
        f"# {made.target}: {made.num_parameters / 1e9:.3g} B parameters; hidden states of "
        f"{made.assumptions.corpus.num_tokens:.3g} tokens: {stored}\n"
    )
    return head + yaml.safe_dump(document, sort_keys=False)
