"""The facts of a draft, as written to ``config.json`` (torch-free).

The document follows DeepSpec's dialect: the target's text config overwritten
with the draft's fields (see ``docs/architecture.md``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from draftline.draft.document import read_fields, to_document
from draftline.draft.families import FAMILIES, Family
from draftline.errors import SpecError
from draftline.target.rope import RopeScaling

NUM_ANCHORS = 512
"""What the reference trains with, and what its configs say where it means nothing."""


@dataclass(frozen=True)
class DraftConfig:
    """Architecture of one draft; see :class:`draftline.spec.DraftSpec` for meanings.

    The fields with a value are absent from drafts of format 1, which are of
    family ``qwen3`` and never Eagle3.

    Attributes:
        draft_vocab_size: Equals ``vocab_size`` when the vocabulary is whole.
        head_dim: Of the draft's layers (for Gemma 4 the global layers' size).
        block_size: Tokens drafted per step.
        mask_token_id: Fills the undrafted slots of a block; unused by Eagle3.
        family: Key in :data:`draftline.draft.families.FAMILIES`.
        rope_scaling: Beyond ``rope_theta``; ``None`` for none.
        has_shared_kv: Values are the key projection's output; there is no ``v_proj`` (``attention_k_eq_v``).
        query_pre_attn_scalar: Attention logits are divided by its root; ``None`` takes the family's rule.
        logit_softcap: The head's logits become ``c * tanh(logits / c)``; ``None`` leaves them.
        num_anchors: Anchors per sequence in training; recorded, since DeepSpec asks for it.
        ttt_length: Eagle3's training-time-test horizon; 0 for block drafts.
        ttt_decay: Eagle3's loss weight of step k is ``ttt_decay ** k``.
    """

    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    mask_token_id: int
    markov_rank: int
    markov_head: str
    enable_confidence_head: bool
    confidence_with_markov: bool
    family: str = "qwen3"
    rope_scaling: RopeScaling | None = None
    has_shared_kv: bool = False
    query_pre_attn_scalar: float | None = None
    logit_softcap: float | None = None
    num_anchors: int = NUM_ANCHORS
    ttt_length: int = 0
    ttt_decay: float = 0.0

    @property
    def algorithm(self) -> str:
        """``eagle3``, ``dspark``, or ``dflash``: a block draft with neither a sequential nor a confidence head."""
        if self.is_eagle3:
            return "eagle3"
        return "dspark" if self.markov_rank or self.enable_confidence_head else "dflash"

    @property
    def is_eagle3(self) -> bool:
        """Whether it drafts token after token, not in blocks."""
        return self.ttt_length > 0

    @property
    def family_facts(self) -> Family:
        """The row of its family."""
        return FAMILIES[self.family]

    @property
    def embedding_scale(self) -> float:
        """Factor of the target's input embeddings."""
        return math.sqrt(self.hidden_size) if self.family_facts.has_embedding_scale else 1.0

    @property
    def attention_scale(self) -> float:
        """Factor of attention logits."""
        if self.query_pre_attn_scalar is not None:
            return float(self.query_pre_attn_scalar**-0.5)
        return 1.0 if self.family_facts.has_unit_attention_scale else float(self.head_dim**-0.5)

    @property
    def is_pruned(self) -> bool:
        """Whether the draft predicts only part of the target's vocabulary."""
        return self.draft_vocab_size < self.vocab_size

    @property
    def confidence_features(self) -> int:
        """Inputs of the confidence head."""
        return self.hidden_size + (self.markov_rank if self.confidence_with_markov else 0)

    def to_json(self) -> dict[str, Any]:
        """DeepSpec's ``config.json``, plus ``draft_vocab_size`` and our format version."""
        return to_document(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, origin: str = "a draft config") -> DraftConfig:
        """Read :meth:`to_json`, or a config that DeepSpec wrote.

        Raises:
            FormatError: a field is missing, or the format is newer or foreign.
        """
        return cls(**read_fields(document, origin))

    def as_dict(self) -> dict[str, Any]:
        """Plain fields, for cards and logs."""
        return asdict(self)


def spread_taps(num_taps: int, num_target_layers: int) -> tuple[int, ...]:
    """Evenly spread layer ids from the second layer to three before the end.

    Reproduces the published choices: 36 layers and five taps give
    [1, 9, 17, 25, 33], 40 layers [1, 10, 19, 28, 37].

    Raises:
        SpecError: the target has too few layers.
    """
    last = num_target_layers - 3
    if num_taps == 1:
        return (max(0, last // 2),)
    if last < num_taps:
        if num_target_layers - 1 < num_taps:
            raise SpecError(
                f"draft.num_taps={num_taps} is too many for a target of {num_target_layers} layers",
                remedy=f"Set draft.num_taps to at most {num_target_layers - 1}",
            )
        return tuple(range(num_taps))
    return tuple(round(1 + i * (last - 1) / (num_taps - 1)) for i in range(num_taps))


def resolve_taps(target_layer_ids: tuple[int, ...] | None, num_taps: int, num_target_layers: int) -> tuple[int, ...]:
    """The tapped layers that a spec means for a target of this depth.

    Raises:
        SpecError: a layer does not exist or is the last one.
    """
    ids = target_layer_ids if target_layer_ids is not None else spread_taps(num_taps, num_target_layers)
    if any(i >= num_target_layers - 1 for i in ids):
        raise SpecError(
            f"draft.target_layer_ids={list(ids)} does not fit a target of {num_target_layers} layers",
            expected=f"ids up to {num_target_layers - 2} (the last layer's output is only stored after the norm)",
        )
    return ids
