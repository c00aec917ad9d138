"""Training runs in a process group: real processes, gloo, as torchrun would start them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftline.training.loop import TrainingInputs

_TIMEOUT_S = 240


@dataclass(frozen=True)
class Scenario:
    """One run (or part of one).

    Attributes:
        inputs: What it reads; its prefix names it.
        stop_after: A step after which every worker breaks off.
    """

    inputs: TrainingInputs
    stop_after: int = 0


@dataclass
class Outcome:
    """What one worker saw of a scenario.

    Attributes:
        history: Of a run that ended.
        files: The exported draft, on worker 0.
        error: What it raised.
        steps: Finished steps.
        places: Places of the stream, in the order in which this worker asked for them for training.
        stored_bytes: Of this worker's parameters.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    error: BaseException | None = None
    steps: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    stored_bytes: int = 0


def run_group(folder: Path, target: Path, world_size: int, scenarios: Sequence[Scenario]) -> list[list[Outcome]]:
    """The scenarios one after the other, by all workers; outcomes by scenario, then rank."""
    folder.mkdir(parents=True)
    (folder / "scenarios").write_bytes(pickle.dumps((str(target), list(scenarios))))
    # Gloo looks up the machine's name for an interface otherwise.
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(world_size):
        with open(folder / f"{rank}.log", "wb") as log:
            command = [sys.executable, "-m", "tests.training.group_driver", str(folder), str(rank), str(world_size)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(_TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(world_size))
    assert codes == [0] * world_size, logs
    by_rank = [pickle.loads((folder / f"{rank}.out").read_bytes()) for rank in range(world_size)]
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]
