"""The facts of any decoder that transformers knows, and why some cannot be run over slots (torch-free).

Where the lean forward does not know a family, transformers' own forward runs
it (see :mod:`draftline.target.general`). What cannot work is named here, before
any weight is read: state that is not keys and values by position, keys shared
between layers, positions that depend on the longest request of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from draftline.errors import TargetError
from draftline.target.config import ModelConfig
from draftline.target.rope import RopeScaling

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Forward = Literal["auto", "lean", "transformers"]
"""Which forward runs a target: the lean one where it can, or one by name."""

_ATTENTION_LAYERS = frozenset({"attention", "full_attention", "sliding_attention"})
_EXPERTS = frozenset({"dense", "sparse", "moe"})


def choose_config(document: Mapping[str, Any], forward: Forward = "auto") -> ModelConfig:
    """Read a ``config.json`` for the forward that will run it.

    Args:
        document: The configuration.
        forward: ``auto`` takes the lean forward where it knows the family and the variant.

    Raises:
        TargetError: neither can, or the chosen one cannot; the message says why.
        KeyError: a size is missing.
    """
    if forward == "transformers":
        return general_config(document)
    try:
        return ModelConfig.from_hf(document)
    except TargetError as refusal:
        if forward == "lean":
            raise
        try:
            return general_config(document)
        except TargetError as error:
            # A family of the lean forward was refused for a reason of its own, which says more.
            raise (refusal if _is_known(document) else error) from None


def general_config(document: Mapping[str, Any]) -> ModelConfig:
    """Facts of a target that transformers' own forward runs.

    Raises:
        TargetError: transformers does not know it as a generative decoder, or it cannot be run over slots.
    """
    text = _read(document)
    _refuse(text)
    num_heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    theta, scaling, max_positions = _positions(text)
    config = ModelConfig(
        family=text.model_type,
        vocab_size=int(text.vocab_size),
        hidden_size=hidden,
        intermediate_size=_first(text, ("intermediate_size", "ffn_dim", "n_inner"), 4 * hidden),
        num_layers=int(text.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(num_kv_heads),
        head_dim=_first(text, ("head_dim",), hidden // num_heads),
        rms_norm_eps=float(
            _first(text, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), 1e-6)
        ),
        rope_theta=theta,
        max_positions=max_positions,
        has_qk_norm=False,
        tie_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        rope_scaling=scaling,
        logit_softcap=getattr(text, "final_logit_softcapping", None),
    )
    return replace(config, forward="transformers")


def _is_known(document: Mapping[str, Any]) -> bool:
    from draftline.target.config import FAMILIES

    return (document.get("text_config") or document).get("model_type") in FAMILIES


def _read(document: Mapping[str, Any]) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = str(document.get("model_type", ""))
    if family not in CONFIG_MAPPING or family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise TargetError(
            f"target family {family!r} is not supported",
            expected="a generative text model that transformers has the code of",
            remedy="Choose another target; code that comes with a model is never run",
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[family].from_dict(dict(document))
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise TargetError(
            "the target's config.json cannot be read", got=str(error).splitlines()[0][:200], remedy="Save it again"
        ) from None
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text


def _refuse(text: PreTrainedConfig) -> None:
    kinds = set(getattr(text, "layer_types", None) or ()) | set(getattr(text, "layers_block_type", None) or ())
    strange = sorted(str(kind) for kind in kinds - _ATTENTION_LAYERS - _EXPERTS)
    reasons = {
        "an encoder": getattr(text, "is_encoder_decoder", False),
        f"layers of the kind {', '.join(strange)}": strange,
        "layers that share the keys of others": getattr(text, "num_kv_shared_layers", 0),
        "attention to later positions": getattr(text, "use_bidirectional_attention", None) in (True, "all"),
        "chunked attention": getattr(text, "attention_chunk_size", None),
        "ALiBi positions": getattr(text, "alibi", False),
    }
    for what, is_there in reasons.items():
        if is_there:
            raise TargetError(
                f"target family {text.model_type!r} cannot be run: it has {what}",
                expected="a decoder whose whole state is keys and values by position",
                remedy="Choose another target, or serve this one with an engine that knows it",
            )


def _positions(text: PreTrainedConfig) -> tuple[float, RopeScaling | None, int]:
    """Rotary base and scaling for drafts, and how far positions may go."""
    limit = int(_first(text, ("max_position_embeddings", "n_positions"), 2048))
    rope: Mapping[str, Any] = getattr(text, "rope_parameters", None) or {}
    if "full_attention" in rope:
        rope = rope["full_attention"]
    if rope.get("rope_type") == "longrope":
        # Beyond it, all positions of a step would turn by the longest request's factors.
        limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
    theta = float(rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)
    try:
        return theta, RopeScaling.from_hf(rope), limit
    except (KeyError, ValueError):
        # The draft's own positions need not turn as the target's do.
        return theta, None, limit


def _first(text: PreTrainedConfig, names: tuple[str, ...], default: float) -> Any:
    for name in names:
        if (value := getattr(text, name, None)) is not None:
            return value
    return default
