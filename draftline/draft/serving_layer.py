"""A draft's decoder layer at serving time: fused projections, packed weights, one cache write.

The arithmetic is that of :mod:`draftline.draft.layers`; tests compare the two.

Dimension letters: N tokens, D hidden, I inputs of the attention (D, or 2 D in
Eagle3), H query heads, K key heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftline.draft.config import DraftConfig
from draftline.draft.layers import ACTIVATIONS, Rotary, norm_scale, query_factor, rotate, scaled_norm
from draftline.target.linear import PackedLinear


class ServingNorm:
    """Root-mean-square norm with a frozen scale.

    Args:
        config: Architecture.
        weight: As stored.
    """

    def __init__(self, config: DraftConfig, weight: Tensor) -> None:
        self._scale, self._eps = norm_scale(weight, config.family_facts), config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return scaled_norm(x, self._scale, self._eps)


class ServingLayer:
    """One layer's projections, norms and feed-forward; the runner owns the cache and who sees whom.

    Args:
        config: Architecture.
        weights: Exported weights in the arithmetic's type.
        prefix: Of the layer's names.
    """

    def __init__(self, config: DraftConfig, weights: dict[str, Tensor], prefix: str) -> None:
        facts = config.family_facts
        self._config = config
        self._activation = ACTIVATIONS[facts.activation]
        self._query_factor = query_factor(config)
        self._has_value_norm = facts.has_value_norm
        kinds = "qk" if config.has_shared_kv else "qkv"
        q, *kv = (weights[f"{prefix}self_attn.{kind}_proj.weight"] for kind in kinds)
        self._qkv = PackedLinear(torch.cat([q, *kv]))
        self._kv = PackedLinear(torch.cat(kv))
        self._output = PackedLinear(weights[f"{prefix}self_attn.o_proj.weight"])
        self._gate_up = PackedLinear(
            torch.cat([weights[f"{prefix}mlp.gate_proj.weight"], weights[f"{prefix}mlp.up_proj.weight"]])
        )
        self._down = PackedLinear(weights[f"{prefix}mlp.down_proj.weight"])

        def norm(name: str) -> ServingNorm:
            return ServingNorm(config, weights[f"{prefix}{name}.weight"])

        self._qk_norms = (norm("self_attn.q_norm"), norm("self_attn.k_norm")) if facts.has_qk_norm else None
        self.input_norm = norm("input_layernorm")
        self._post_attention_norm = norm("post_attention_layernorm")
        self._feed_forward_norms = (
            (norm("pre_feedforward_layernorm"), norm("post_feedforward_layernorm"))
            if facts.has_sandwich_norms
            else None
        )
        self._scalar = weights[f"{prefix}layer_scalar"] if facts.has_layer_scalar else None

    def queries_keys_values(self, x_NI: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """``[N, H, E]`` queries, scaled for :func:`draftline.target.lean.attend`, and ``[N, 2 K, E]`` for the cache."""
        heads = self._config.num_heads
        qkv = self._qkv(x_NI).view(x_NI.shape[0], -1, self._config.head_dim)
        q = qkv[:, :heads]
        if self._qk_norms is not None:
            q = self._qk_norms[0](q)
        q = rotate(q, *rotary)
        return q if self._query_factor == 1.0 else q * self._query_factor, self._finish_keys(qkv[:, heads:], rotary)

    def keys_values(self, x_NI: Tensor, rotary: Rotary) -> Tensor:
        """``[N, 2 K, E]`` keys and values for the cache."""
        return self._finish_keys(self._kv(x_NI).view(x_NI.shape[0], -1, self._config.head_dim), rotary)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output from its input and its attention's; see :class:`draftline.draft.layers.LayerParts`."""
        attended = self._output(attended)
        if self._feed_forward_norms is None:
            x = residual + attended
            x = x + self._feed_forward(self._post_attention_norm(x))
        else:
            before, after = self._feed_forward_norms
            x = residual + self._post_attention_norm(attended)
            x = x + after(self._feed_forward(before(x)))
        return x if self._scalar is None else x * self._scalar

    def _finish_keys(self, kv: Tensor, rotary: Rotary) -> Tensor:
        num_kv_heads = self._config.num_kv_heads
        # With shared projections the same heads are keys and values.
        k, v = kv[:, :num_kv_heads], kv[:, -num_kv_heads:]
        if self._has_value_norm:
            v = scaled_norm(v, v.new_ones(self._config.head_dim), self._config.rms_norm_eps)
        if self._qk_norms is not None:
            k = self._qk_norms[1](k)
        return torch.cat([rotate(k, *rotary), v], 1)

    def _feed_forward(self, x: Tensor) -> Tensor:
        gate_up = self._gate_up(x)
        half = self._config.intermediate_size
        return self._down(self._activation(gate_up[:, :half]) * gate_up[:, half:])
