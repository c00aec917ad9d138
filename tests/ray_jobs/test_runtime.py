"""How many logical CPUs a job reserves."""

from __future__ import annotations

import pytest

from ray_jobs.runtime import cpu_share


@pytest.mark.parametrize(
    ("threads", "free_cpus", "workers", "expected"),
    [
        (2, 8.0, 1, 2.0),
        (2, 2.0, 1, 2.0),
        # An endpoint holds one of two.
        (2, 1.0, 1, 1.0),
        (1, 1.0, 2, 0.5),
        (1, 1.0, 3, 0.33),
        # Above 1, Ray takes whole numbers only.
        (4, 3.0, 2, 1.0),
        (8, 7.5, 1, 7.0),
        (2, 0.0, 1, 0.0),
    ],
)
def test_a_worker_reserves_its_threads_or_its_share(
    threads: int, free_cpus: float, workers: int, expected: float
) -> None:
    share = cpu_share(threads, free_cpus, workers)
    assert share == expected
    assert share * workers <= free_cpus
