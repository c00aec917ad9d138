"""No step waits for the compiler, and where nothing can be kept on disk the loops are compiled all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from draftline.scheduling import allocation, loops
from draftline.scheduling.policies import AsyncPolicy, FixedPolicy, LengthPolicy, SyncPolicy, ThresholdPolicy
from draftline.scheduling.scheduler import Scheduler, StepShape, compile_loops
from tests.scheduling.cases import linear_costs

MODULES: tuple[ModuleType, ...] = (allocation, loops)
BLOCK = 7


def num_compiled() -> dict[str, int]:
    """How many kinds of arguments each loop has been compiled for in this process."""
    return {
        f"{module.__name__}.{name}": len(function.signatures)
        for module in MODULES
        for name, function in vars(module).items()
        if hasattr(function, "signatures")
    }


@pytest.mark.parametrize("has_head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("policy", [FixedPolicy(), FixedPolicy(1), ThresholdPolicy(0.5), SyncPolicy(), AsyncPolicy()])
def test_no_step_waits_for_the_compiler(policy: LengthPolicy, has_head: bool) -> None:
    compile_loops()
    before = num_compiled()
    assert len(before) >= 8 and min(before.values()) >= 1
    scheduler, random = Scheduler(policy, 6, BLOCK, linear_costs(token=0.02), (0.9, 0.7, 0.5)), np.random.default_rng(0)
    rows = [scheduler.admit() for _ in range(5)]
    num_drafted = 0
    for step in range(60):
        if step % 20 == 19:
            scheduler.release(rows.pop(0))
            rows.append(scheduler.admit())
        plan = scheduler.plan(np.array(rows), StepShape(len(rows), mean_context=100))
        count = len(plan.rows_M)
        survival = np.cumprod(random.uniform(0.5, 1, (count, BLOCK)), axis=1) if has_head else None
        # Requests near their end.
        caps = np.minimum([BLOCK - 1 - k for k in range(count)], BLOCK)
        lengths = scheduler.lengths(survival, caps)
        scheduler.observe(lengths, np.minimum(random.integers(0, BLOCK + 1, count), lengths))
        num_drafted += count
    assert num_drafted > 60
    assert num_compiled() == before


def test_loops_are_compiled_where_nothing_can_be_kept(tmp_path: Path) -> None:
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes.clear()\n"
        "from draftline.scheduling.scheduler import compile_loops\n"
        "from draftline.scheduling import loops\n"
        "compile_loops()\n"
        "print(len(loops.keep_blocks.signatures))\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
