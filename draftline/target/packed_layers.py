"""All layers of a target in one call of the CPU kernels.

The arithmetic is that of :mod:`draftline.target.lean` in fp32; tests compare
the two. A row's result does not depend on the other rows of the step, so a
block of drafts is verified with the very numbers of plain decoding.

Dimension letters: N tokens, D hidden, F feed-forward, H query heads, K
key/value heads, E head size, L taps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from draftline.native.library import Kernels, LayerFields, PackedWeight, StepFields, native_kernels
from draftline.target.batch import StepBatch
from draftline.target.config import ModelConfig
from draftline.target.kv_cache import SlotKVCache

_SCORED_HEADS = 4
"""Query heads whose attention a thread holds at once; ``MAX_HEADS`` of ``attention.h``."""


def kernels_for(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels if they can run this architecture's layers, which are Llama's or Qwen3's in fp32 on a CPU."""
    facts = config.family_facts
    is_plain = not (
        facts.is_norm_wide
        or facts.has_sandwich_norms
        or facts.has_value_norm
        or facts.has_layer_scalar
        or config.has_shared_kv
        or config.local is not None
    )
    if device.type != "cpu" or dtype != torch.float32 or not is_plain or facts.activation != "silu":
        return None
    kernels = native_kernels()
    return kernels if kernels is not None and config.head_dim % kernels.lanes == 0 else None


class PackedLayers:
    """The decoder layers of a Llama-like target.

    Args:
        kernels: That run them.
        config: Architecture; see :func:`kernels_for`.
        take: Gives a layer's weight by its index and name, once.
    """

    def __init__(self, kernels: Kernels, config: ModelConfig, take: Callable[[int, str], Tensor]) -> None:
        self.kernels, self._config = kernels, config
        self._kept: list[Tensor | PackedWeight] = []
        self._layers = (LayerFields * config.num_layers)()
        for i, fields in enumerate(self._layers):
            self._fill(fields, partial(take, i))

    def forward(
        self, x_ND: Tensor, batch: StepBatch, cache: SlotKVCache, rotary: tuple[Tensor, Tensor], tap_ids: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """The last layer's output ``[N, D]`` and those of the tapped ones ``[N, L, D]``; see ``LeanModel.forward``.

        Args:
            x_ND: Embeddings, contiguous; overwritten with the last layer's output.
            batch: The step.
            cache: Read and extended.
            rotary: Cosines and signed sines ``[P, E]`` of the cache's positions.
            tap_ids: Layers; -1 is the embeddings.
        """
        check_fits_cache(batch, cache)
        config, tokens = self._config, x_ND.shape[0]
        ids = sorted(set(tap_ids))
        taps = x_ND.new_empty(tokens, len(ids), x_ND.shape[1])
        if -1 in ids:
            taps[:, 0] = x_ND
        tap_of = (ctypes.c_int64 * config.num_layers)(
            *(ids.index(i) if i in ids else -1 for i in range(config.num_layers))
        )
        num_threads = torch.get_num_threads()
        lanes = self.kernels.lanes
        scores_stride = -(-batch.longest // lanes) * lanes
        q_size = config.num_heads * config.head_dim
        sizes = [
            tokens * config.hidden_size,
            tokens * (q_size + 2 * config.num_kv_heads * config.head_dim),
            tokens * q_size,
            tokens * config.intermediate_size,
            num_threads * _SCORED_HEADS * scores_stride,
        ]
        scratch = torch.empty(sum(sizes)).split(sizes)
        # Pointers hold no references: everything they point to is a local or an attribute until the call returns.
        step = StepFields(
            tokens,
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.num_layers,
            len(ids),
            num_threads,
            cache.num_positions,
            ctypes.addressof(self._layers),
            ctypes.addressof(cache.pointers),
            ctypes.addressof(tap_of),
            batch.positions_N.data_ptr(),
            batch.slots_N.data_ptr(),
            batch.num_keys_N.data_ptr(),
            rotary[0].data_ptr(),
            rotary[1].data_ptr(),
            x_ND.data_ptr(),
            taps.data_ptr(),
            *(part.data_ptr() for part in scratch),
            scores_stride,
            config.rms_norm_eps,
            config.attention_scale or config.head_dim**-0.5,
        )
        if tokens:
            self.kernels.run_layers(step)
        return x_ND, taps

    def _fill(self, fields: LayerFields, take: Callable[[str], Tensor]) -> None:
        kernels = self.kernels
        qkv = torch.cat([take(f"self_attn.{kind}_proj.weight") for kind in "qkv"])
        weights = {
            "qkv": kernels.pack(qkv),
            "output": kernels.pack(take("self_attn.o_proj.weight")),
            "gate_up": kernels.pack_gated(take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")),
            "down": kernels.pack(take("mlp.down_proj.weight")),
        }
        norms = {
            "attention_norm": take("input_layernorm.weight").contiguous(),
            "mlp_norm": take("post_attention_layernorm.weight").contiguous(),
        }
        if self._config.has_qk_norm:
            norms["q_norm"] = take("self_attn.q_norm.weight").contiguous()
            norms["k_norm"] = take("self_attn.k_norm.weight").contiguous()
        for name, weight in weights.items():
            setattr(fields, name, weight.fields())
        for name, norm in norms.items():
            setattr(fields, name, norm.data_ptr())
        self._kept += [*weights.values(), *norms.values()]


def check_fits_cache(batch: StepBatch, cache: SlotKVCache) -> None:
    """The kernels write where the batch says; refuse a step that was built for another cache."""
    if batch.num_positions != cache.num_positions or batch.longest > cache.num_positions:
        raise ValueError(
            f"step of {batch.longest} positions, slots of {batch.num_positions}; the cache has {cache.num_positions}"
        )
    if batch.last_slot >= cache.num_slots:
        raise ValueError(f"step uses slot {batch.last_slot}; the cache has {cache.num_slots}")
