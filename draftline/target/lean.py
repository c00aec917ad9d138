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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from draftline.errors import TargetError
from draftline.target.batch import Segment, StepBatch
from draftline.target.config import ModelConfig as ModelConfig
from draftline.target.kv_cache import SlotKVCache
from draftline.target.linear import PackedLinear
from draftline.target.packed_layers import PackedLayers, kernels_for
from draftline.target.rope import RopeScaling


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in fp32 inside, as Llama does it."""
    x32 = x.float()
    scaled = x32 * x32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return scaled.to(x.dtype) * weight


def rms_norm_wide(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same as Gemma does it: the product with the weight, if there is one, is taken in fp32 too."""
    x32 = x.float()
    scaled = x32 * x32.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (scaled if weight is None else scaled * weight.float()).to(x.dtype)


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
        if self.cos_PE.device != positions_N.device:
            self.cos_PE, self.sin_PE = self.cos_PE.to(positions_N.device), self.sin_PE.to(positions_N.device)
        return self.cos_PE[positions_N].unsqueeze(1), self.sin_PE[positions_N].unsqueeze(1)

    def rotate(self, x_NHE: Tensor, cos_N1E: Tensor, sin_N1E: Tensor) -> Tensor:
        """Rotary position embedding in the half-split layout."""
        return x_NHE * cos_N1E + x_NHE.roll(self._half, -1) * sin_N1E


def within_window(segment: Segment, window: int) -> Segment:
    """The segment with all but the last ``window`` positions before each query hidden, its own included."""
    if segment.length <= window:
        return segment
    last_seen_RQ = (segment.mask_RQT == 0).sum(-1, keepdim=True) - 1
    positions_T = torch.arange(segment.length, device=segment.mask_RQT.device)
    return replace(segment, mask_RQT=segment.mask_RQT.masked_fill(positions_T <= last_seen_RQ - window, float("-inf")))


def attend(
    q_NHE: Tensor, cache: SlotKVCache, layer: int, segments: Sequence[Segment], scale: float | None = None
) -> Tensor:
    """Attention of every token over its own slot; ``[N, H * E]`` in token order.

    Args:
        q_NHE: Queries.
        cache: Keys and values, those of these tokens included.
        layer: Which of the cache's.
        segments: Rectangles that cover every token once.
        scale: Of the logits; the inverse root of E by default.
    """
    num_tokens, num_heads, head_dim = q_NHE.shape
    num_kv_heads = cache.heads(layer)
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
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
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


@dataclass(frozen=True)
class _View:
    """What a step looks like to one kind of attention layers."""

    rotary: RotaryTable
    cos_N1E: Tensor
    sin_N1E: Tensor
    segments: Sequence[Segment]


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
        self._norm = _Norm(config)
        self._final_norm = self._norm.prepare(weights["model.norm.weight"])
        self._head = PackedLinear(weights.get("lm_head.weight", self.embedding_VD))
        kernels = kernels_for(config, dtype, self.device)
        self._packed: PackedLayers | None = None
        self._layers: list[_Layer] = []
        if kernels is not None:
            self._packed = PackedLayers(kernels, config, lambda i, name: _take(weights, i, name))
        else:
            self._layers = [_Layer(config, i, weights) for i in range(config.num_layers)]
        self._rotary: dict[bool, RotaryTable] = {}

    @property
    def has_packed_layers(self) -> bool:
        """Whether the CPU kernels run the layers, so that a token's numbers do not depend on how steps are cut."""
        return self._packed is not None

    def new_cache(self, num_slots: int, num_positions: int) -> SlotKVCache:
        """A KV cache of this model's shape."""
        shapes = [self.config.kv_shape(layer) for layer in range(self.config.num_layers)]
        return SlotKVCache(
            self.config.num_layers,
            num_slots,
            num_positions,
            [heads for heads, _ in shapes],
            [size for _, size in shapes],
            self.dtype,
            self.device,
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: SlotKVCache, tap_ids: Sequence[int] = ()) -> TargetOutput:
        """Run the tokens of a step, appending their keys and values to ``cache``.

        Args:
            batch: The step.
            cache: Read and extended.
            tap_ids: Layers whose output is wanted; -1 is the embeddings.
        """
        x = self.embedding_VD[batch.token_ids_N]
        if self._packed is not None:
            table = self._table(False, cache.num_positions)
            x, stacked = self._packed.forward(x, batch, cache, (table.cos_PE, table.sin_PE), tap_ids)
            return TargetOutput(self._norm(x, self._final_norm), stacked)
        views = self._views(batch, cache.num_positions)
        if self.config.family_facts.has_embedding_scale:
            # Rounded to the working dtype first, as transformers does.
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype, device=x.device)
        taps = [x] if -1 in tap_ids else []
        for i, layer in enumerate(self._layers):
            x = layer.forward(x, batch, cache, views[self.config.is_local(i)])
            if i in tap_ids:
                taps.append(x)
        hidden = self._norm(x, self._final_norm)
        stacked = torch.stack(taps, 1) if taps else hidden.new_empty(hidden.shape[0], 0, hidden.shape[1])
        return TargetOutput(hidden, stacked)

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Next-token logits ``[N, V]`` of post-norm hidden states."""
        logits = self._head(hidden_ND)
        cap = self.config.logit_softcap
        return logits if cap is None else (logits / cap).tanh_().mul_(cap)

    @torch.inference_mode()
    def score(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of every row, and the log-sum-exp of its logits in fp32; ``[N]`` each."""
        if self._packed is not None:
            return self._packed.kernels.score(logits_NV)
        return logits_NV.argmax(-1), logits_NV.float().logsumexp(-1)

    def _table(self, is_local: bool, num_positions: int) -> RotaryTable:
        """Rotary factors of one kind of layers, at least of so many positions."""
        table = self._rotary.get(is_local)
        if table is None or table.cos_PE.shape[0] < num_positions:
            kind = self.config.local if is_local and self.config.local is not None else self.config
            table = RotaryTable(kind.head_dim, kind.rope_theta, num_positions, self.dtype, kind.rope_scaling)
            self._rotary[is_local] = table
        return table

    def _views(self, batch: StepBatch, num_positions: int) -> dict[bool, _View]:
        """The step as layers with full attention (``False``) and with a window (``True``) see it."""
        local = self.config.local
        views = {}
        for is_local in (False, True) if local is not None else (False,):
            table = self._table(is_local, num_positions)
            segments: Sequence[Segment] = batch.segments
            if is_local and local is not None:
                segments = [within_window(segment, local.window) for segment in segments]
            views[is_local] = _View(table, *table.at(batch.positions_N), segments)
        return views


def _take(weights: dict[str, Tensor], layer: int, name: str) -> Tensor:
    """A layer's weight, removed from the state dict."""
    full_name = f"model.layers.{layer}.{name}"
    try:
        return weights.pop(full_name)
    except KeyError:
        raise TargetError(f"target weights lack {full_name!r}", remedy="Check the model directory") from None


class _Norm:
    """Root-mean-square norms of a family."""

    def __init__(self, config: ModelConfig) -> None:
        self._facts = config.family_facts
        self._eps = config.rms_norm_eps

    def prepare(self, weight: Tensor) -> Tensor:
        """A checkpoint's weight, ready to multiply by."""
        return weight.float() + self._facts.norm_offset if self._facts.is_norm_wide else weight

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return (rms_norm_wide if self._facts.is_norm_wide else rms_norm)(x, weight, self._eps)

    def without_weight(self, x: Tensor) -> Tensor:
        """Norm alone."""
        return rms_norm_wide(x, None, self._eps)


class _Layer:
    def __init__(self, config: ModelConfig, index: int, weights: dict[str, Tensor]) -> None:
        def take(name: str) -> Tensor:
            return _take(weights, index, name)

        self._config, self._index, facts = config, index, config.family_facts
        self._norm = _Norm(config)
        self._num_kv, self._head_dim = config.kv_shape(index)
        self._has_values = config.is_local(index) or not config.has_shared_kv
        qkv = [take(f"self_attn.{kind}_proj.weight") for kind in ("qkv" if self._has_values else "qk")]
        self._qkv = PackedLinear(torch.cat(qkv))
        self._output = PackedLinear(take("self_attn.o_proj.weight"))
        self._gate_up = PackedLinear(torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")]))
        self._down = PackedLinear(take("mlp.down_proj.weight"))
        self._attention_norm = self._norm.prepare(take("input_layernorm.weight"))
        after_attention = self._norm.prepare(take("post_attention_layernorm.weight"))
        # Norms of what attention and feed-forward give, where a family has them.
        self._output_norms: tuple[Tensor, Tensor] | None = None
        self._mlp_norm = after_attention
        if facts.has_sandwich_norms:
            self._mlp_norm = self._norm.prepare(take("pre_feedforward_layernorm.weight"))
            self._output_norms = after_attention, self._norm.prepare(take("post_feedforward_layernorm.weight"))
        self._qk_norms: tuple[Tensor, Tensor] | None = None
        if config.has_qk_norm:
            self._qk_norms = (
                self._norm.prepare(take("self_attn.q_norm.weight")),
                self._norm.prepare(take("self_attn.k_norm.weight")),
            )
        self._scalar = take("layer_scalar") if facts.has_layer_scalar else None

    def forward(self, x: Tensor, batch: StepBatch, cache: SlotKVCache, view: _View) -> Tensor:
        config = self._config
        q, k, v = self._project(self._norm(x, self._attention_norm), view)
        cache.append(self._index, batch.cache_index_N, torch.cat([k, v], 1))
        attended = self._output(attend(q, cache, self._index, view.segments, config.attention_scale))
        if self._output_norms is not None:
            attended = self._norm(attended, self._output_norms[0])
        x = x + attended
        gate_up = self._gate_up(self._norm(x, self._mlp_norm))
        half = config.intermediate_size
        changed = self._down(self._activate(gate_up[:, :half]).mul_(gate_up[:, half:]))
        if self._output_norms is not None:
            changed = self._norm(changed, self._output_norms[1])
        x = x + changed
        return x if self._scalar is None else x * self._scalar

    def _project(self, x: Tensor, view: _View) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, ``[N, heads, E]``."""
        num_heads, num_kv = self._config.num_heads, self._num_kv
        qkv = self._qkv(x).view(x.shape[0], -1, self._head_dim)
        # Where keys give the values too, it is before their norm and rotation.
        v = qkv[:, num_heads + num_kv :] if self._has_values else qkv[:, num_heads:]
        qk = qkv[:, : num_heads + num_kv]
        if self._qk_norms is not None:
            q_norm, k_norm = self._qk_norms
            qk = torch.cat([self._norm(qk[:, :num_heads], q_norm), self._norm(qk[:, num_heads:], k_norm)], 1)
        if self._config.family_facts.has_value_norm:
            v = self._norm.without_weight(v)
        qk = view.rotary.rotate(qk, view.cos_N1E, view.sin_N1E)
        return qk[:, :num_heads], qk[:, num_heads:], v

    def _activate(self, gate: Tensor) -> Tensor:
        if self._config.family_facts.activation == "silu":
            return functional.silu(gate)
        return functional.gelu(gate, approximate="tanh")
