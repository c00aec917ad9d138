"""The workers of one training run: sums over all, and errors that reach all.

One worker needs no process group; several use the default one, whoever made
it (Ray Train, or a test).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, distributed

from draftline.errors import DraftlineError

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This worker among all.

    Attributes:
        rank: Of this one.
        size: Of all.
        device: Where this worker computes; the process group must reach it.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this worker writes and reports."""
        return self.rank == 0

    def sum(self, vector: Tensor) -> Tensor:
        """The sum of every worker's vector, the same bits on each."""
        if self.size == 1:
            return vector
        total = vector.to(self.device)
        distributed.all_reduce(total)
        return total.to(vector.device)

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may fail on one worker alone; then it fails on all, with the same error.

        A worker that raised by itself would leave the others waiting in their
        next collective operation.

        Raises:
            DraftlineError: the first worker's that failed.
        """
        if self.size == 1:
            return work()
        result: list[T] = []
        failure: DraftlineError | None = None
        try:
            result.append(work())
        except DraftlineError as error:
            failure = error
        if self.sum(torch.tensor([float(failure is not None)])).item() > 0:
            raise next(error for error in self.gather(failure) if error is not None)
        return result[0]

    def gather(self, value: T) -> list[T]:
        """Every worker's value (pickled), by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, value: T) -> T:
        """The first worker's value (pickled); the others' is ignored."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, 0)
        return values[0]

    def tensors_from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first worker's named tensors, one at a time over the wire; the others may give none."""
        if self.size == 1:
            return dict(tensors)
        shapes = self.from_first({name: (tuple(value.shape), value.dtype) for name, value in tensors.items()})
        received = {}
        for name, (shape, dtype) in shapes.items():
            value = tensors[name].to(self.device) if self.is_first else torch.empty(shape, dtype=dtype)
            value = value.to(self.device).contiguous()
            distributed.broadcast(value, 0)
            received[name] = value
        return received
