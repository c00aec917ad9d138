"""The facts of a draft, as written to ``config.json`` (torch-free).

The document follows DeepSpec's dialect: the target's text config overwritten
with the draft's fields (see ``docs/architecture.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from draftline.errors import FormatError, SpecError

ARCHITECTURE = "Qwen3DSparkModel"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class DraftConfig:
    """Architecture of one draft; see :class:`draftline.spec.DraftSpec` for meanings.

    ``draft_vocab_size`` equals ``vocab_size`` when the vocabulary is whole.
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
        document: dict[str, Any] = {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "layer_types": ["full_attention"] * self.num_layers,
            "block_size": self.block_size,
            "target_layer_ids": list(self.target_layer_ids),
            "num_target_layers": self.num_target_layers,
            "mask_token_id": self.mask_token_id,
            "markov_rank": self.markov_rank,
            "enable_confidence_head": self.enable_confidence_head,
            "draft_vocab_size": self.draft_vocab_size,
            "draftline_format": FORMAT_VERSION,
        }
        if self.markov_rank:
            document["markov_head_type"] = self.markov_head
        if self.enable_confidence_head:
            document["confidence_head_with_markov"] = self.confidence_with_markov
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, origin: str = "a draft config") -> DraftConfig:
        """Read :meth:`to_json`.

        Raises:
            FormatError: a field is missing, or the format is newer or foreign.
        """
        version = document.get("draftline_format", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{origin} has an unknown format", got=version, expected=str(FORMAT_VERSION), remedy="Upgrade Draftline"
            )
        if document.get("architectures") != [ARCHITECTURE]:
            raise FormatError(
                f"{origin} is not a DSpark draft", got=document.get("architectures"), expected=f"[{ARCHITECTURE!r}]"
            )
        try:
            return cls(
                vocab_size=document["vocab_size"],
                draft_vocab_size=document.get("draft_vocab_size", document["vocab_size"]),
                hidden_size=document["hidden_size"],
                intermediate_size=document["intermediate_size"],
                num_layers=document["num_hidden_layers"],
                num_heads=document["num_attention_heads"],
                num_kv_heads=document["num_key_value_heads"],
                head_dim=document["head_dim"],
                rms_norm_eps=document["rms_norm_eps"],
                rope_theta=document["rope_parameters"]["rope_theta"],
                block_size=document["block_size"],
                target_layer_ids=tuple(document["target_layer_ids"]),
                num_target_layers=document["num_target_layers"],
                mask_token_id=document["mask_token_id"],
                markov_rank=document["markov_rank"],
                markov_head=document.get("markov_head_type", "vanilla"),
                enable_confidence_head=document["enable_confidence_head"],
                confidence_with_markov=document.get("confidence_head_with_markov", False),
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"{origin} lacks {error}", remedy="Export the draft again") from None

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
