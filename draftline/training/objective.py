"""What one algorithm trains: the seam between the loop and the draft families.

The loop knows steps, workers, optimiser, checkpoints and divergence. An
:class:`Objective` knows its model, how samples become a batch, and what is
minimised. It reports sums, never means: sums of several workers, or of
several parts of a step, are added, and divided once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from draftline.cache.reader import CachedSample
from draftline.cache.source import SampleSource

WEIGHT = "weight"
"""Name of the sum that divides the objective."""


@dataclass(frozen=True)
class Sums:
    """Named sums over a step's slots, detached; scalars, or vectors such as one entry for each block position.

    Two objects of one objective have the same names and shapes, so they can be
    added, and packed into one vector for one ``all_reduce``.

    Attributes:
        values: By name; the order is the packed order.
    """

    values: Mapping[str, Tensor]

    def pack(self) -> Tensor:
        """All values in one float64 vector."""
        return torch.cat([value.detach().double().flatten() for value in self.values.values()])

    def unpack(self, packed: Tensor) -> Sums:
        """Sums of this shape from a vector that :meth:`pack` could have made."""
        parts = packed.split([value.numel() for value in self.values.values()])
        shaped = {name: part.view(self.values[name].shape) for name, part in zip(self.values, parts, strict=True)}
        return Sums(shaped)

    def scalar(self, name: str) -> float:
        """A scalar sum."""
        return float(self.values[name])

    def vector(self, name: str) -> list[float]:
        """A vector of sums."""
        return [float(value) for value in self.values[name].flatten()]

    def ratio(self, name: str, by: str = WEIGHT) -> float:
        """One scalar sum divided by another; 0 where there is nothing to divide by."""
        return self.scalar(name) / max(self.scalar(by), 1e-9)


@dataclass(frozen=True)
class StepTerms:
    """What one batch contributes to a step.

    Attributes:
        objective: Scalar numerator of what is minimised; the only part that
            carries gradients. Its denominator is the sum named :data:`WEIGHT`,
            over all workers.
        sums: For that denominator and for :meth:`Objective.figures`.
    """

    objective: Tensor
    sums: Sums


class Batch(Protocol):
    """All that the loop looks at in a batch."""

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Its samples, for error messages."""
        ...


BatchT = TypeVar("BatchT", bound=Batch)


class Objective(Protocol[BatchT]):
    """One training algorithm.

    A batch is a pure function of its samples and their places in the stream,
    so a step is the same whichever worker makes it and however often it was
    restarted. The model's weights must not depend on the worker after
    construction and :meth:`initialise`, except in rounding: the loop then
    takes worker 0's.
    """

    @property
    def model(self) -> nn.Module:
        """The trained module; its ``state_dict`` is what checkpoints hold. Only :meth:`terms` may run it."""
        ...

    def initialise(self, source: SampleSource) -> None:
        """Set what depends on data, before the first step; never called when a run is resumed."""
        ...

    def build_batch(self, samples: Sequence[CachedSample], positions: Sequence[int]) -> BatchT:
        """Assemble samples that stand at these places of the stream."""
        ...

    def validation_batch(self, samples: Sequence[CachedSample], positions: Sequence[int]) -> BatchT:
        """As :meth:`build_batch`, for held-out samples."""
        ...

    def terms(self, batch: BatchT) -> StepTerms:
        """Run the model on a batch."""
        ...

    def validate(self, batch: BatchT) -> Sums:
        """Run the model on held-out samples, without gradients."""
        ...

    def figures(self, sums: Sums) -> dict[str, float]:
        """What a training step reports, from the sums of all workers; ``loss`` is among it."""
        ...

    def validation_figures(self, sums: Sums) -> dict[str, float]:
        """What a validation reports; ``validation_loss`` and ``accepted_length`` are among it."""
        ...

    def export(self, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        """The trained draft as checkpoint files, from the model's whole ``state_dict``."""
        ...
