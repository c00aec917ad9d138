"""A slot KV cache: one row of positions per request, kept dense.

Dimension letters: S slots, P positions, H key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SlotKVCache:
    """Keys and values of ``num_layers`` layers for up to ``num_slots`` sequences.

    Keys and values of a position lie side by side (``[S * P, 2 * H, D]``), so a
    layer appends with one ``index_copy_``. A read takes a contiguous range of
    slots as a view; that is why the engine keeps its slots dense.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_positions: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_layers = num_layers
        self.num_slots = num_slots
        self.num_positions = num_positions
        self.num_heads = num_heads
        # zeros, not empty: masked positions still enter a product, and 0 * NaN is NaN.
        self.layers = [
            torch.zeros(num_slots * num_positions, 2 * num_heads, head_dim, dtype=dtype, device=device)
            for _ in range(num_layers)
        ]
        self._by_slot = [layer.view(num_slots, num_positions, 2 * num_heads, head_dim) for layer in self.layers]

    def append(self, layer: int, index_N: Tensor, kv_NHD: Tensor) -> None:
        """Store keys and values ``[N, 2H, D]`` at flat positions ``slot * P + position``."""
        self.layers[layer].index_copy_(0, index_N, kv_NHD)

    def view(self, layer: int, first_slot: int, num_slots: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[num_slots, H, length, D]`` of a slot range, as views."""
        rows = self._by_slot[layer][first_slot : first_slot + num_slots, :length]
        return rows[:, :, : self.num_heads].transpose(1, 2), rows[:, :, self.num_heads :].transpose(1, 2)

    def move(self, source: int, destination: int, length: int) -> None:
        """Copy the first ``length`` positions of one slot over another."""
        for rows in self._by_slot:
            rows[destination, :length] = rows[source, :length]
