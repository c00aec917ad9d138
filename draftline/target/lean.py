"""A lean forward of decoder-only targets over a slot KV cache.

Written for few tokens a step on a CPU, where module hooks, cache objects and
mask building of a general library cost as much as the arithmetic: fused
projections, packed weights, one cache write a layer. Outputs equal
``transformers`` (a test compares them); families differ in data only.

Dimension letters: N tokens, D hidden, F feed-forward, H query heads,
K key/value heads, G = H / K, E head size, V vocabulary, L taps,
R slots of a segment, Q queries a slot, T key positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from draftline.errors import TargetError
from draftline.target.batch import Segment, StepBatch
from draftline.target.kv_cache import SlotKVCache
from draftline.target.linear import PackedLinear
from draftline.target.rope import KINDS, RopeScaling

FAMILIES = {"llama": False, "mistral": False, "qwen3": True}
"""Supported ``model_type`` -> whether queries and keys are normalised per head."""


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a decoder-only transformer that the forward needs."""

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

    @classmethod
    def from_hf(cls, document: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face ``config.json``.

        Raises:
            TargetError: a family or a variant that this forward does not cover.
        """
        family = document.get("model_type", "")
        if family not in FAMILIES:
            raise TargetError(
                f"target family {family!r} is not supported by the built-in engine",
                expected=f"one of {sorted(FAMILIES)}",
                remedy="Choose a target of these families",
            )
        rope = document.get("rope_parameters") or document.get("rope_scaling") or {}
        try:
            scaling = RopeScaling.from_hf(rope)
        except ValueError as error:
            raise TargetError(
                f"rotary scaling {error} is not supported", expected=f"one of {', '.join(KINDS)}"
            ) from None
        for flag in ("attention_bias", "mlp_bias", "sliding_window"):
            if document.get(flag) and document.get("use_sliding_window", True):
                raise TargetError(f"target uses {flag}", expected=f"no {flag}", remedy="Choose another target")
        num_heads = document["num_attention_heads"]
        return cls(
            family=family,
            vocab_size=document["vocab_size"],
            hidden_size=document["hidden_size"],
            intermediate_size=document["intermediate_size"],
            num_layers=document["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=document.get("num_key_value_heads") or num_heads,
            head_dim=document.get("head_dim") or document["hidden_size"] // num_heads,
            rms_norm_eps=document.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or document.get("rope_theta", 10000.0),
            max_positions=document.get("max_position_embeddings", 2048),
            has_qk_norm=FAMILIES[family],
            tie_embeddings=document.get("tie_word_embeddings", False),
            rope_scaling=scaling,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in fp32 inside, as Llama does it."""
    x32 = x.float()
    scaled = x32 * x32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return scaled.to(x.dtype) * weight


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """``[E / 2]`` rotary frequencies, as Hugging Face's ``modeling_rope_utils`` computes them."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / scaling.factor
    if scaling.kind == "proportional":
        inverse[int(scaling.partial_rotary_factor * head_dim // 2) :] = 0
        return inverse / scaling.factor
    # llama3: slow frequencies are divided, fast ones kept, and those between interpolated.
    wavelength = 2 * math.pi / inverse
    slow = scaling.original_max_positions / scaling.low_freq_factor
    fast = scaling.original_max_positions / scaling.high_freq_factor
    width = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / width
    between = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    scaled = torch.where(wavelength > slow, inverse / scaling.factor, inverse)
    return torch.where((wavelength >= fast) & (wavelength <= slow), between, scaled)


class RotaryTable:
    """Cosines and signed sines of every position, in the model's dtype."""

    def __init__(
        self,
        head_dim: int,
        theta: float,
        max_positions: int,
        dtype: torch.dtype,
        scaling: RopeScaling | None = None,
    ) -> None:
        inverse = inverse_frequencies(head_dim, theta, scaling)
        angle = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse)
        self._half = head_dim // 2
        self.cos_PE = torch.cat([angle.cos(), angle.cos()], -1).to(dtype)
        self.sin_PE = torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)

    def at(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, 1, E]`` factors for :meth:`rotate`."""
        return self.cos_PE[positions_N].unsqueeze(1), self.sin_PE[positions_N].unsqueeze(1)

    def rotate(self, x_NHE: Tensor, cos_N1E: Tensor, sin_N1E: Tensor) -> Tensor:
        """Rotary position embedding in the half-split layout."""
        return x_NHE * cos_N1E + x_NHE.roll(self._half, -1) * sin_N1E


def attend(q_NHE: Tensor, cache: SlotKVCache, layer: int, segments: Sequence[Segment]) -> Tensor:
    """Attention of every token over its own slot; ``[N, H * E]`` in token order."""
    num_tokens, num_heads, head_dim = q_NHE.shape
    num_kv_heads = cache.num_heads
    group = num_heads // num_kv_heads
    out = q_NHE.new_empty(num_tokens, num_heads, head_dim)
    for segment in segments:
        rows, longest = segment.gather_RQ.shape
        k, v = cache.view(layer, segment.first_slot, segment.num_slots, segment.length)
        # Query heads that share a key head become further queries of it: no repeated keys, one small product.
        q = q_NHE[segment.gather_RQ].view(rows, longest, num_kv_heads, group * head_dim)
        q = q.transpose(1, 2).reshape(rows, num_kv_heads, longest * group, head_dim)
        mask = segment.mask_RQT
        if group > 1:
            mask = mask.repeat_interleave(group, dim=2)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        attended = attended.view(rows, num_kv_heads, longest, group * head_dim).transpose(1, 2)
        flat = attended.reshape(rows * longest, num_heads, head_dim)
        if len(segments) == 1 and flat.shape[0] == num_tokens:
            return flat.view(num_tokens, num_heads * head_dim)
        out[segment.tokens_M] = flat[segment.scatter_M]
    return out.view(num_tokens, num_heads * head_dim)


@dataclass(frozen=True)
class TargetOutput:
    """What a forward gives.

    Attributes:
        hidden_ND: Last hidden state, after the final norm.
        taps_NLD: Outputs of the tapped layers, ascending by layer.
    """

    hidden_ND: Tensor
    taps_NLD: Tensor


class LeanModel:
    """The target's forward; frozen, no gradients.

    Args:
        config: Architecture.
        weights: State dict by Hugging Face names. Layer weights are *removed*
            from it as they are packed, so that memory holds them once.
        dtype: Of the weights.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype
        self.embedding_VD = weights["model.embed_tokens.weight"]
        self.device = self.embedding_VD.device
        self._final_norm = weights["model.norm.weight"]
        self._head = PackedLinear(weights.get("lm_head.weight", self.embedding_VD))
        self._layers = [_Layer(config, weights, f"model.layers.{i}.") for i in range(config.num_layers)]
        self._rotary: RotaryTable | None = None

    def new_cache(self, num_slots: int, num_positions: int) -> SlotKVCache:
        """A KV cache of this model's shape."""
        config = self.config
        return SlotKVCache(
            config.num_layers, num_slots, num_positions, config.num_kv_heads, config.head_dim, self.dtype, self.device
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: SlotKVCache, tap_ids: Sequence[int] = ()) -> TargetOutput:
        """Run the tokens of a step, appending their keys and values to ``cache``.

        Args:
            batch: The step.
            cache: Read and extended.
            tap_ids: Layers whose output is wanted; -1 is the embeddings.
        """
        if self._rotary is None or self._rotary.cos_PE.shape[0] < cache.num_positions:
            self._rotary = RotaryTable(
                self.config.head_dim,
                self.config.rope_theta,
                cache.num_positions,
                self.dtype,
                self.config.rope_scaling,
            )
        cos, sin = self._rotary.at(batch.positions_N)
        x = self.embedding_VD[batch.token_ids_N]
        taps = [x] if -1 in tap_ids else []
        for i, layer in enumerate(self._layers):
            x = layer.forward(x, i, batch, cache, self._rotary, cos, sin)
            if i in tap_ids:
                taps.append(x)
        hidden = rms_norm(x, self._final_norm, self.config.rms_norm_eps)
        stacked = torch.stack(taps, 1) if taps else hidden.new_empty(hidden.shape[0], 0, hidden.shape[1])
        return TargetOutput(hidden, stacked)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Next-token logits ``[N, V]`` of post-norm hidden states."""
        return self._head(hidden_ND)


class _Layer:
    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], prefix: str) -> None:
        def take(name: str) -> Tensor:
            try:
                return weights.pop(prefix + name)
            except KeyError:
                raise TargetError(
                    f"target weights lack {prefix + name!r}", remedy="Check the model directory"
                ) from None

        self._config = config
        qkv = [take(f"self_attn.{kind}_proj.weight") for kind in "qkv"]
        self._qkv = PackedLinear(torch.cat(qkv))
        self._output = PackedLinear(take("self_attn.o_proj.weight"))
        self._gate_up = PackedLinear(torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")]))
        self._down = PackedLinear(take("mlp.down_proj.weight"))
        self._attention_norm = take("input_layernorm.weight")
        self._mlp_norm = take("post_attention_layernorm.weight")
        self._qk_norms = (
            (take("self_attn.q_norm.weight"), take("self_attn.k_norm.weight")) if config.has_qk_norm else None
        )

    def forward(
        self,
        x: Tensor,
        index: int,
        batch: StepBatch,
        cache: SlotKVCache,
        rotary: RotaryTable,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        config = self._config
        num_heads, num_kv, size = config.num_heads, config.num_kv_heads, config.head_dim
        qkv = self._qkv(rms_norm(x, self._attention_norm, config.rms_norm_eps))
        qkv = qkv.view(x.shape[0], num_heads + 2 * num_kv, size)
        if self._qk_norms is None:
            qk = qkv[:, : num_heads + num_kv]
        else:
            q_norm, k_norm = self._qk_norms
            qk = torch.cat(
                [
                    rms_norm(qkv[:, :num_heads], q_norm, config.rms_norm_eps),
                    rms_norm(qkv[:, num_heads : num_heads + num_kv], k_norm, config.rms_norm_eps),
                ],
                1,
            )
        qk = rotary.rotate(qk, cos, sin)
        cache.append(index, batch.cache_index_N, torch.cat([qk[:, num_heads:], qkv[:, num_heads + num_kv :]], 1))
        x = x + self._output(attend(qk[:, :num_heads], cache, index, batch.segments))
        gate_up = self._gate_up(rms_norm(x, self._mlp_norm, config.rms_norm_eps))
        half = config.intermediate_size
        return x + self._down(functional.silu(gate_up[:, :half]).mul_(gate_up[:, half:]))
