"""Parts of a draft's decoder layer, for every family and both kinds of draft.

Dimension letters: S samples, T positions, D hidden, I inputs of the
attention (D, or 2 D in Eagle3), H query heads, K key heads, E head size.

Parameter names are DeepSpec's, so a state dict is a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from draftline.draft.config import DraftConfig
from draftline.draft.families import Family
from draftline.target.lean import rms_norm

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}
"""By Hugging Face's names."""

Rotary = tuple[Tensor, Tensor]
"""Cosines and signed sines, broadcast over heads."""


def norm_scale(weight: Tensor, family: Family) -> Tensor:
    """What a norm of the family multiplies by; fp32 where it multiplies before rounding."""
    scale = weight.float() if family.is_norm_wide else weight
    return scale + family.norm_offset if family.norm_offset else scale


def scaled_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension.

    A scale of x's type multiplies after rounding to it, as in Llama and Qwen3;
    a wider one before, as in Gemma.
    """
    if scale.dtype == x.dtype:
        return rms_norm(x, scale, eps)
    return rms_norm(x.float(), scale, eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split layout; see :class:`draftline.target.lean.RotaryTable`."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def query_factor(config: DraftConfig) -> float:
    """What queries are multiplied by, so that attention may always divide by the root of the head size."""
    factor = config.attention_scale * math.sqrt(config.head_dim)
    return 1.0 if math.isclose(factor, 1.0) else factor


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, starting at one."""

    def __init__(self, size: int, config: DraftConfig) -> None:
        super().__init__()
        self._family, self._eps = config.family_facts, config.rms_norm_eps
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self._family.norm_offset))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return scaled_norm(x, norm_scale(self.weight, self._family), self._eps)

    @torch.no_grad()
    def start_from(self, scale_D: Tensor) -> None:
        """Take another norm's scale."""
        self.weight.copy_(scale_D - self._family.norm_offset)


class GatedMLP(nn.Module):
    """Gated feed-forward: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[config.family_facts.activation]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., D]``."""
        out: Tensor = self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))
        return out


class AttentionParts(nn.Module):
    """Projections and norms of an attention; who sees whom is a subclass's matter."""

    def __init__(self, config: DraftConfig, input_size: int) -> None:
        super().__init__()
        facts = config.family_facts
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._eps = config.rms_norm_eps
        self._query_factor = query_factor(config)
        self._has_value_norm = facts.has_value_norm
        self.q_proj = nn.Linear(input_size, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, config.num_kv_heads * config.head_dim, bias=False)
        self.v_proj = (
            None if config.has_shared_kv else nn.Linear(input_size, config.num_kv_heads * config.head_dim, bias=False)
        )
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config) if facts.has_qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config) if facts.has_qk_norm else None

    def queries(self, x_STI: Tensor, rotary: Rotary) -> Tensor:
        """``[S, T, H, E]``, normalised, rotated, and scaled for attention that divides by the root of E."""
        q: Tensor = self.q_proj(x_STI).unflatten(-1, (self.num_heads, self.head_dim))
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = rotate(q, *rotary)
        return q if self._query_factor == 1.0 else q * self._query_factor

    def keys_values(self, x_STI: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """``[S, T, K, E]`` keys, normalised and rotated, and values."""
        k: Tensor = self.k_proj(x_STI).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = k if self.v_proj is None else self.v_proj(x_STI).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self._has_value_norm:
            v = scaled_norm(v, v.new_ones(self.head_dim), self._eps)
        if self.k_norm is not None:
            k = self.k_norm(k)
        return rotate(k, *rotary), v


class LayerParts(nn.Module):
    """Norms, feed-forward and residuals of a layer; its attention is a subclass's matter.

    Without sandwich norms ``post_attention_layernorm`` stands before the
    feed-forward (Llama, Qwen3); with them it stands behind the attention.
    """

    layer_scalar: Tensor

    def __init__(self, config: DraftConfig, attention: nn.Module) -> None:
        super().__init__()
        facts, size = config.family_facts, config.hidden_size
        self.self_attn = attention
        self.mlp = GatedMLP(config)
        self.input_layernorm = RMSNorm(size, config)
        self.post_attention_layernorm = RMSNorm(size, config)
        self.pre_feedforward_layernorm = RMSNorm(size, config) if facts.has_sandwich_norms else None
        self.post_feedforward_layernorm = RMSNorm(size, config) if facts.has_sandwich_norms else None
        self._has_scalar = facts.has_layer_scalar
        if facts.has_layer_scalar:
            # A buffer, not a parameter: the reference does not train it either.
            self.register_buffer("layer_scalar", torch.ones(1))

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output ``[..., D]`` from its input and what attention made of it."""
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = residual + attended
            x = x + self.mlp(self.post_attention_layernorm(x))
        else:
            x = residual + self.post_attention_layernorm(attended)
            x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        out: Tensor = x * self.layer_scalar if self._has_scalar else x
        return out
