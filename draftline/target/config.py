"""The facts of a target's architecture, read from its ``config.json`` (torch-free).

What a family is (norms, activation, scales) is a row of the table that drafts
use too; what its sizes are stands in :class:`ModelConfig`. A variant that the
forward does not cover is refused here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from draftline.draft.families import FAMILIES as LAYERS
from draftline.draft.families import Family, default_family
from draftline.errors import TargetError
from draftline.target.rope import KINDS, RopeScaling

FAMILIES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
}
"""Supported ``model_type`` -> its row in :data:`draftline.draft.families.FAMILIES`."""

_LOCAL = "sliding_attention"
_GLOBAL = "full_attention"
_LOCAL_EVERY = 6
"""Gemma's pattern where a configuration does not spell it out: five local layers, one global."""

_REFUSED_FLAGS = ("attention_bias", "mlp_bias", "attn_logit_softcapping")
_REFUSED_PARTS = (
    ("hidden_size_per_layer_input", "per-layer input embeddings"),
    ("num_kv_shared_layers", "layers that share the keys of others"),
    ("enable_moe_block", "a mixture of experts"),
)


@dataclass(frozen=True)
class LocalLayers:
    """Attention layers that see a window only; their shapes may differ from the others'.

    Attributes:
        layers: Their indices, ascending.
        window: Positions that a query sees, its own included.
        num_kv_heads: Key heads.
        head_dim: Size of a head.
        rope_theta: Base of their rotary embedding.
        rope_scaling: Beyond it.
    """

    layers: tuple[int, ...]
    window: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a decoder-only transformer that the forward needs.

    Sizes of heads and rotary facts are those of the layers with full attention.

    Attributes:
        rope_scaling: Beyond ``rope_theta``; ``None`` for none.
        has_shared_kv: Values of full attention are the key projection's output, before its norm.
        query_pre_attn_scalar: Attention logits are divided by its root; ``None`` takes the family's rule.
        logit_softcap: Logits become ``c * tanh(logits / c)``; ``None`` leaves them.
        local: Layers with a sliding window; ``None`` for none.
        forward: ``lean``, or ``transformers`` where that library's own forward runs the target; then ``family`` is
            any that it knows, and heads and rotary facts are those that drafts start from.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    has_qk_norm: bool
    tie_embeddings: bool
    rope_scaling: RopeScaling | None = None
    has_shared_kv: bool = False
    query_pre_attn_scalar: float | None = None
    logit_softcap: float | None = None
    local: LocalLayers | None = None
    forward: Literal["lean", "transformers"] = "lean"

    @property
    def family_facts(self) -> Family:
        """The row of its family; where it has none, that of its drafts."""
        return LAYERS[FAMILIES.get(self.family) or default_family(self.family)]

    @property
    def embedding_scale(self) -> float:
        """Factor of the input embeddings, before it is rounded to their dtype."""
        return float(self.hidden_size**0.5) if self.family_facts.has_embedding_scale else 1.0

    @property
    def attention_scale(self) -> float | None:
        """Factor of attention logits; ``None`` for the inverse root of the head size."""
        if self.query_pre_attn_scalar is not None:
            return float(self.query_pre_attn_scalar**-0.5)
        return 1.0 if self.family_facts.has_unit_attention_scale else None

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees a window only."""
        return self.local is not None and layer in self.local.layers

    def kv_shape(self, layer: int) -> tuple[int, int]:
        """Key heads and head size of a layer."""
        if self.local is not None and layer in self.local.layers:
            return self.local.num_kv_heads, self.local.head_dim
        return self.num_kv_heads, self.head_dim

    @classmethod
    def from_hf(cls, document: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face ``config.json``; of a multimodal model, its text part.

        Raises:
            TargetError: a family or a variant that the forward does not cover.
            KeyError: a size is missing.
        """
        text: Mapping[str, Any] = document.get("text_config") or document
        family = text.get("model_type", "")
        if family not in FAMILIES:
            raise TargetError(
                f"target family {family!r} is not supported by the built-in engine",
                expected=f"one of {sorted(FAMILIES)}",
                remedy="Choose a target of these families",
            )
        _refuse_variants(text, LAYERS[FAMILIES[family]])
        num_heads, num_layers = text["num_attention_heads"], text["num_hidden_layers"]
        num_kv_heads = text.get("num_key_value_heads") or num_heads
        head_dim = text.get("head_dim") or text["hidden_size"] // num_heads
        local = _local_layers(text, num_kv_heads, head_dim) if LAYERS[FAMILIES[family]].has_nested_rope else None
        if local is not None and len(local.layers) < num_layers:
            num_kv_heads, head_dim = _global_shape(text, local, num_kv_heads, head_dim)
        theta, scaling = _rope(text, _GLOBAL)
        return cls(
            family=family,
            vocab_size=text["vocab_size"],
            hidden_size=text["hidden_size"],
            intermediate_size=text["intermediate_size"],
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=text.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            max_positions=text.get("max_position_embeddings", 2048),
            has_qk_norm=LAYERS[FAMILIES[family]].has_qk_norm,
            tie_embeddings=bool(document.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            rope_scaling=scaling,
            has_shared_kv=bool(text.get("attention_k_eq_v")),
            query_pre_attn_scalar=text.get("query_pre_attn_scalar"),
            logit_softcap=text.get("final_logit_softcapping"),
            local=local,
        )


def _refuse_variants(text: Mapping[str, Any], facts: Family) -> None:
    flags = _REFUSED_FLAGS if facts.has_nested_rope else (*_REFUSED_FLAGS, "sliding_window")
    for flag in flags:
        if text.get(flag) and (flag != "sliding_window" or text.get("use_sliding_window", True)):
            raise TargetError(f"target uses {flag}", expected=f"no {flag}", remedy="Choose another target")
    for key, meaning in _REFUSED_PARTS:
        if text.get(key):
            raise TargetError(
                f"target has {meaning}", got=f"{key}={text[key]}", expected="none", remedy="Choose a dense target"
            )
    if text.get("use_bidirectional_attention") in (True, "all"):
        raise TargetError(
            "target attends to later positions", expected="causal attention", remedy="Choose a generative target"
        )
    activation = text.get(facts.activation_key, facts.activation)
    if activation != facts.activation:
        raise TargetError(
            f"target uses activation {activation!r}", expected=facts.activation, remedy="Choose another target"
        )


def _local_layers(text: Mapping[str, Any], num_kv_heads: int, head_dim: int) -> LocalLayers | None:
    num_layers = text["num_hidden_layers"]
    every = text.get("sliding_window_pattern") or _LOCAL_EVERY
    types = text.get("layer_types") or [_GLOBAL if (i + 1) % every == 0 else _LOCAL for i in range(num_layers)]
    layers = tuple(i for i, kind in enumerate(types) if kind == _LOCAL)
    if not layers or not text.get("sliding_window"):
        return None
    theta, scaling = _rope(text, _LOCAL)
    return LocalLayers(layers, text["sliding_window"], num_kv_heads, head_dim, theta, scaling)


def _global_shape(text: Mapping[str, Any], local: LocalLayers, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
    """Key heads and head size of full attention, in the hub's spelling or in that of transformers 5.2x."""
    by_layer: Mapping[str, Any] | None = text.get("per_layer_config")
    if by_layer:
        shapes = {
            (entry.get("num_key_value_heads", num_kv_heads), entry.get("head_dim", head_dim))
            for layer, entry in by_layer.items()
            if int(layer) not in local.layers
        }
        if len(shapes) > 1 or any(int(layer) in local.layers for layer in by_layer):
            raise TargetError(
                "target's layers differ in more than their kind",
                got="per_layer_config",
                expected="one shape for local layers and one for the others",
            )
        return shapes.pop()
    if text.get("attention_k_eq_v"):
        num_kv_heads = text.get("num_global_key_value_heads") or num_kv_heads
    return num_kv_heads, text.get("global_head_dim") or head_dim


def _rope(text: Mapping[str, Any], kind: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding of one kind of layers, in today's spelling or in older ones."""
    rope: Mapping[str, Any] = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = text.get("rope_theta", 10000.0)
    if kind in rope:
        rope = rope[kind]
    elif kind == _LOCAL:
        # Older Gemma 3: local layers have a base of their own, and are not scaled.
        rope, theta = {}, text.get("rope_local_base_freq", 10000.0)
    try:
        return float(rope.get("rope_theta") or theta), RopeScaling.from_hf(rope)
    except ValueError as error:
        raise TargetError(f"rotary scaling {error} is not supported", expected=f"one of {', '.join(KINDS)}") from None
