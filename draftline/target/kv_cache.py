"""A slot KV cache: one row of positions per request, kept dense.

Dimension letters: S slots, P positions, H key/value heads, D head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class SlotKVCache:
    """Keys and values of ``num_layers`` layers for up to ``num_slots`` sequences.

    The positions of a head lie side by side (``[S, 2 * H, P, D]``, keys before
    values), so attention reads memory in order. A read takes a contiguous range
    of slots as a view; that is why the engine keeps its slots dense.

    Args:
        num_layers: Layers that store keys and values.
        num_slots: S.
        num_positions: P.
        num_heads: H, of every layer or of each.
        head_dim: D, of every layer or of each.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_positions: int,
        num_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_layers = num_layers
        self.num_slots = num_slots
        self.num_positions = num_positions
        self._heads = [num_heads] * num_layers if isinstance(num_heads, int) else list(num_heads)
        sizes = [head_dim] * num_layers if isinstance(head_dim, int) else list(head_dim)
        # zeros, not empty: masked positions still enter a product, and 0 * NaN is NaN.
        self.layers = [
            torch.zeros(num_slots, 2 * heads, num_positions, size, dtype=dtype, device=device)
            for heads, size in zip(self._heads, sizes, strict=True)
        ]
        self._place: tuple[Tensor, Tensor, Tensor] | None = None

    @cached_property
    def pointers(self) -> ctypes.Array[ctypes.c_void_p]:
        """Addresses of the layers' memory, for the CPU kernels."""
        return (ctypes.c_void_p * self.num_layers)(*(layer.data_ptr() for layer in self.layers))

    def heads(self, layer: int) -> int:
        """Key heads of a layer."""
        return self._heads[layer]

    def append(self, layer: int, index_N: Tensor, kv_NHD: Tensor) -> None:
        """Store keys and values ``[N, 2H, D]`` at flat positions ``slot * P + position``."""
        # The layers of a step store at the same places.
        if self._place is None or self._place[0] is not index_N:
            self._place = index_N, index_N // self.num_positions, index_N % self.num_positions
        _, slots, positions = self._place
        self.layers[layer][slots, :, positions] = kv_NHD

    def view(self, layer: int, first_slot: int, num_slots: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[num_slots, H, length, D]`` of a slot range, as views."""
        rows = self.layers[layer][first_slot : first_slot + num_slots, :, :length]
        heads = self._heads[layer]
        return rows[:, :heads], rows[:, heads:]

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot over another."""
        for rows in self.layers:
            rows[destination, :, :length] = rows[source, :, :length]
