"""Sample accounting in integers: every offset of a restart, every pair of worker counts."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from draftline.cache.reader import sample_order
from draftline.training.shares import num_passes, passes, share, spread, step_positions, steps_of_epochs

WORLDS = (1, 2, 3, 4)
STEPS = 9


def taken(step: int, samples_per_step: int, world_size: int, micro_batch: int = 0) -> list[int]:
    """Places that all workers take at a step, worker by worker, pass by pass."""
    count = num_passes(samples_per_step, world_size, micro_batch)
    return [
        place
        for rank in range(world_size)
        for part in passes(share(step_positions(step, samples_per_step), rank, world_size), count)
        for place in part
    ]


@pytest.mark.parametrize("samples_per_step", [4, 5, 7, 12])
@pytest.mark.parametrize(("before", "after"), list(itertools.product(WORLDS, WORLDS)))
def test_no_sample_is_lost_or_repeated_wherever_a_run_goes_on(samples_per_step: int, before: int, after: int) -> None:
    for offset in range(STEPS + 1):
        places: list[int] = []
        for step in range(STEPS):
            places += taken(step, samples_per_step, before if step < offset else after)
        assert places == list(range(STEPS * samples_per_step))


@pytest.mark.parametrize(("before", "after"), list(itertools.product(WORLDS, WORLDS)))
def test_every_epoch_holds_every_sample_once(before: int, after: int) -> None:
    shards, samples_per_step, epochs = (3, 1, 6, 2, 9), 6, 4
    num_samples = sum(shards)
    steps = epochs * num_samples // samples_per_step
    for offset in range(steps + 1):
        seen: list[Counter[tuple[int, int]]] = [Counter() for _ in range(epochs)]
        for step in range(steps):
            for place in taken(step, samples_per_step, before if step < offset else after):
                epoch, index = divmod(place, num_samples)
                seen[epoch][sample_order(shards, epoch, 5, window_shards=2)[index]] += 1
        everything = Counter((shard, one) for shard, size in enumerate(shards) for one in range(size))
        assert all(counter == everything for counter in seen)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("samples_per_step", [4, 5, 7, 16])
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 3, 100])
def test_workers_pass_equally_often_and_never_over_nothing(
    samples_per_step: int, world_size: int, micro_batch: int
) -> None:
    count = num_passes(samples_per_step, world_size, micro_batch)
    assert taken(2, samples_per_step, world_size, micro_batch) == list(step_positions(2, samples_per_step))
    for rank in range(world_size):
        mine = share(step_positions(0, samples_per_step), rank, world_size)
        sizes = [len(part) for part in passes(mine, count)]
        assert len(sizes) == count and min(sizes) >= 1
        if micro_batch:
            is_even = samples_per_step % world_size == 0
            assert max(sizes) <= micro_batch + (not is_even)


def test_shares_differ_by_at_most_one() -> None:
    for size, world in itertools.product(range(12), WORLDS):
        sizes = [len(share(range(size), rank, world)) for rank in range(world)]
        assert sum(sizes) == size and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


def test_a_spread_reaches_over_the_whole_split() -> None:
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(3, 24) == [0, 1, 2]
    assert all(len(set(spread(n, 7))) == min(n, 7) for n in range(1, 40))


def test_epochs_become_steps() -> None:
    assert steps_of_epochs(1, 100, 16) == 7
    assert steps_of_epochs(2, 100, 50) == 4
    assert steps_of_epochs(0.5, 100, 50) == 1
    assert steps_of_epochs(0.001, 5, 50) == 1
