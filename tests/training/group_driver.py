"""One process of :func:`tests.training.group.run_group`."""

from __future__ import annotations

import pickle
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed

from draftline.cache.reader import CachedSample
from draftline.errors import DraftlineError
from draftline.spec import TargetSpec
from draftline.target.load import Target, load_target
from draftline.training.loop import DraftTrainer
from draftline.training.workers import Workers
from tests.training.cases import Interrupted
from tests.training.group import Outcome, Scenario


def run(scenario: Scenario, target: Target, workers: Workers) -> Outcome:
    """One scenario on this worker."""
    outcome = Outcome()

    def on_step(step: int, figures: dict[str, float]) -> None:
        outcome.steps.append(step)
        if step == scenario.stop_after:
            raise Interrupted

    trainer = DraftTrainer(scenario.inputs, target, workers=workers, on_step=on_step)
    source = trainer._source
    at = source.at

    def counted(position: int) -> CachedSample:
        outcome.places.append(position)
        return at(position)

    start = trainer._start

    def started() -> int:
        step = start()
        # What comes before is the measuring of the first samples.
        source.at = counted  # type: ignore[method-assign]
        return step

    trainer._start = started  # type: ignore[method-assign]
    try:
        outcome.history = trainer.run()
        outcome.files = trainer.export() if workers.is_first else {}
    except (Interrupted, DraftlineError) as error:
        outcome.error = error
    parameters = trainer._objective.model.parameters()
    outcome.stored_bytes = sum(getattr(p, "_local_tensor", p).nbytes for p in parameters)
    return outcome


def main(folder: Path, rank: int, world_size: int) -> None:
    """All scenarios."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    source, scenarios = pickle.loads((folder / "scenarios").read_bytes())
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    target = load_target(TargetSpec(source=source), dtype="fp32")
    outcomes = [run(scenario, target, Workers(rank, world_size)) for scenario in scenarios]
    (folder / f"{rank}.out").write_bytes(pickle.dumps(outcomes))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
