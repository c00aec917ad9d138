"""Where training reads: samples by their place in an endless, shuffled stream.

The cache's reader is one such source; a source that captures hidden states
while training runs, and keeps none of them, is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from draftline.cache.sample import CachedSample


class SampleSource(Protocol):
    """Samples of one split.

    Attributes:
        num_samples: Of one epoch; position ``p`` lies in epoch ``p // num_samples``.
        wait_s: Seconds that callers of :meth:`at` have spent waiting for data.
    """

    num_samples: int
    wait_s: float

    def at(self, position: int) -> CachedSample:
        """The sample at a place of the stream, its tensors decoded; a pure function of the place.

        Raises:
            FormatError: what holds it is damaged.
            StorageError: it cannot be read.
        """
        ...

    def announce(self, positions: Sequence[int]) -> None:
        """A hint that these places are asked for next; it may start reading ahead, or do nothing."""
        ...

    def close(self) -> None:
        """Stop reading ahead and release what is held."""
        ...
