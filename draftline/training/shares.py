"""Who takes which sample at which step: integers only.

Step ``s`` takes the ``samples_per_step`` places that start at
``s * samples_per_step`` in the endless shuffled stream, whatever the number
of workers; worker by worker they are cut into contiguous shares. So a run can
stop after any step and go on with any number of workers, and no place is lost
or taken twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def step_positions(step: int, samples_per_step: int) -> range:
    """Places in the stream that a step takes, over all workers."""
    return range(step * samples_per_step, (step + 1) * samples_per_step)


def share(items: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """One worker's contiguous part; the parts' sizes differ by at most one, larger ones first."""
    size, extra = divmod(len(items), world_size)
    start = rank * size + min(rank, extra)
    return items[start : start + size + (rank < extra)]


def num_passes(samples_per_step: int, world_size: int, micro_batch: int) -> int:
    """Forward and backward passes that a step takes, the same for every worker.

    Collective operations pair up pass by pass, so no worker may have one more
    than another; where shares are uneven a pass may hold one sample more than
    ``micro_batch``.

    Args:
        samples_per_step: Of all workers, at least one for each.
        world_size: All workers.
        micro_batch: Samples of one pass; 0 takes the whole share at once.
    """
    if micro_batch == 0:
        return 1
    largest, smallest = -(-samples_per_step // world_size), samples_per_step // world_size
    return max(1, min(-(-largest // micro_batch), smallest))


def passes(positions: Sequence[int], count: int) -> list[Sequence[int]]:
    """A worker's places, pass by pass."""
    return [share(positions, number, count) for number in range(count)]


def spread(num_samples: int, limit: int) -> list[int]:
    """At most ``limit`` places of one epoch, evenly spread over it."""
    count = min(limit, num_samples)
    return [number * num_samples // count for number in range(count)]


def steps_of_epochs(epochs: float, num_samples: int, samples_per_step: int) -> int:
    """Steps that see every sample ``epochs`` times, the last step rounded up."""
    return max(1, math.ceil(epochs * num_samples / samples_per_step))
