"""What the engine asks of a target's forward, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from draftline.target.batch import StepBatch
from draftline.target.config import ModelConfig
from draftline.target.kv_cache import SlotKVCache
from draftline.target.lean import TargetOutput


class TargetModel(Protocol):
    """A frozen decoder over a slot KV cache; no gradients.

    Attributes:
        config: Facts of its architecture.
        dtype: Of weights, keys and values.
        device: Where they are.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def new_cache(self, num_slots: int, num_positions: int) -> SlotKVCache:
        """A KV cache of this model's shape."""
        ...

    def forward(self, batch: StepBatch, cache: SlotKVCache, tap_ids: Sequence[int] = ()) -> TargetOutput:
        """Run the tokens of a step, appending their keys and values to ``cache``.

        Args:
            batch: The step.
            cache: Read and extended.
            tap_ids: Layers whose output is wanted; -1 is the embeddings.
        """
        ...

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Next-token logits ``[N, V]`` of post-norm hidden states."""
        ...

    def score(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of every row, and the log-sum-exp of its logits in fp32; ``[N]`` each."""
        ...
