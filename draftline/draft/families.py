"""What tells draft families apart, as data (torch-free).

One backbone serves every family; a family is a row of this table. A draft's
family is a property of the draft, not of its target: the reference gives every
draft the decoder layer of its target's family, and a draft for a Llama target
may be of either kind (see ``docs/adr/0013-draft-families-as-data.md``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The facts of one family that its size does not decide.

    Attributes:
        name: Key in :data:`FAMILIES`.
        stem: Start of the architecture's name: ``Qwen3`` gives ``Qwen3DSparkModel`` and ``Qwen3Eagle3Model``.
        model_type: Of the Hugging Face text config that ``config.json`` extends.
        activation: Of the feed-forward, by Hugging Face's name: ``silu`` or ``gelu_pytorch_tanh``.
        activation_key: Name of the config field that holds it.
        has_qk_norm: Queries and keys are normalised per head.
        has_value_norm: Values are normalised per head, without a scale.
        norm_offset: A norm multiplies by ``norm_offset + weight``.
        is_norm_wide: The product with the weight is taken in fp32, before rounding to the working type.
        has_sandwich_norms: Norms before *and* after attention and feed-forward
            (``post_attention_layernorm`` then follows the attention).
        has_embedding_scale: Input embeddings are multiplied by the root of the hidden size.
        has_unit_attention_scale: Attention logits are not scaled.
        has_layer_scalar: A layer's output is multiplied by the buffer ``layer_scalar``.
        has_nested_rope: ``rope_parameters`` holds one entry per layer type.
        has_global_heads: Head size and shared key heads are in ``global_head_dim`` and
            ``num_global_key_value_heads``.
    """

    name: str
    stem: str
    model_type: str
    activation: str = "silu"
    activation_key: str = "hidden_act"
    has_qk_norm: bool = False
    has_value_norm: bool = False
    norm_offset: float = 0.0
    is_norm_wide: bool = False
    has_sandwich_norms: bool = False
    has_embedding_scale: bool = False
    has_unit_attention_scale: bool = False
    has_layer_scalar: bool = False
    has_nested_rope: bool = False
    has_global_heads: bool = False

    @property
    def block_architecture(self) -> str:
        """Architecture of DSpark and DFlash drafts; DeepSpec has one class for both."""
        return f"{self.stem}DSparkModel"

    @property
    def eagle3_architecture(self) -> str:
        """Architecture of Eagle3 drafts."""
        return f"{self.stem}Eagle3Model"


_FAMILIES = (
    Family("qwen3", "Qwen3", "qwen3", has_qk_norm=True),
    # DeepSpec has no Llama draft; the names continue its pattern.
    Family("llama", "Llama", "llama"),
    # Nor one for Gemma 3.
    Family(
        "gemma3",
        "Gemma3",
        "gemma3_text",
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        has_qk_norm=True,
        norm_offset=1.0,
        is_norm_wide=True,
        has_sandwich_norms=True,
        has_embedding_scale=True,
        has_nested_rope=True,
    ),
    Family(
        "gemma4",
        "Gemma4",
        "gemma4_text",
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        has_qk_norm=True,
        has_value_norm=True,
        is_norm_wide=True,
        has_sandwich_norms=True,
        has_embedding_scale=True,
        has_unit_attention_scale=True,
        has_layer_scalar=True,
        has_nested_rope=True,
        has_global_heads=True,
    ),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in _FAMILIES}
"""Draft families by name."""

ARCHITECTURES: Mapping[str, tuple[Family, bool]] = {
    **{family.block_architecture: (family, False) for family in _FAMILIES},
    **{family.eagle3_architecture: (family, True) for family in _FAMILIES},
}
"""Architecture name -> its family, and whether it is an Eagle3 draft."""

_OF_TARGET = {
    "llama": "qwen3",
    "mistral": "qwen3",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gemma4_unified": "gemma4",
    "gemma4_unified_text": "gemma4",
}


def default_family(target_model_type: str) -> str:
    """The family that a draft takes for a target when none is named: Qwen3's layer unless the target is a Gemma."""
    return _OF_TARGET.get(target_model_type, "qwen3")
