"""Alternating medians, and a process with the product's allocator settings."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

from draftline.target.allocator import ALLOCATOR_ENV


def with_allocator_settings() -> None:
    """Start this process again with the allocator settings, which are read before ``main``."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR_ENV.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ALLOCATOR_ENV})


def alternating_medians_ms(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each contender, run in turn after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(repeats + 2):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if round_number >= 2:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}
