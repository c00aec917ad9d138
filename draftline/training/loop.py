"""The training loop of one worker; Ray Train starts it, but it knows nothing of Ray, nor of any draft family."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftline.cache.reader import CacheReader, ReadOptions
from draftline.cache.shards import Manifest
from draftline.cache.source import SampleSource
from draftline.errors import InputError, TrainingDiverged
from draftline.spec import RunSpec
from draftline.steps.ledger import SCRATCH
from draftline.storage.base import ObjectStore
from draftline.target.load import Target
from draftline.training.build import new_objective
from draftline.training.checkpoints import CheckpointStore, TrainingCheckpoint
from draftline.training.early_stop import best_record, is_exhausted
from draftline.training.meter import StepMeter
from draftline.training.objective import WEIGHT, Batch, Objective, Sums
from draftline.training.optimizers import DraftOptimizer
from draftline.training.parallel import ParallelObjective, whole
from draftline.training.reading import reading
from draftline.training.shares import num_passes, passes, share, spread, step_positions, steps_of_epochs
from draftline.training.workers import Workers

_VALIDATION_BATCH = 8
_MODEL, _BEST = "model.", "best."


@dataclass(frozen=True)
class TrainingInputs:
    """What a worker reads.

    Attributes:
        spec: The run spec.
        store: The workspace.
        cache_prefix: Folder of the hidden-states step.
        manifest: Its manifest.
        counts: Token counts for the draft vocabulary, likeliest first.
        prefix: Folder of this step.
        open_source: Gives the samples of a split where they are in no cache.
    """

    spec: RunSpec
    store: ObjectStore
    cache_prefix: str
    manifest: Manifest
    counts: list[tuple[int, int]]
    prefix: str
    open_source: Callable[[str], SampleSource | None] | None = None

    def source(self, split: str, share: float = 1.0) -> SampleSource | None:
        """Samples of a split, or ``None`` where it has none; a worker asks for about ``share`` of the stream."""
        if self.open_source is not None:
            return self.open_source(split)
        if not self.manifest.of_split(split):
            return None
        options = ReadOptions(self.spec.cache, share)
        return CacheReader(self.store, self.cache_prefix, self.manifest, split, self.spec.seed, options)


class DraftTrainer:
    """Trains a draft from a cache; exact across restarts, with any number of workers after each.

    Args:
        inputs: What to read.
        target: The frozen target (embeddings and LM head are used).
        workers: This worker among all.
        on_step: Called after every step with the step number and its figures.

    Raises:
        InputError: there are no training samples.
        SpecError: the draft does not fit the target.
    """

    def __init__(
        self,
        inputs: TrainingInputs,
        target: Target,
        *,
        workers: Workers | None = None,
        on_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
    ) -> None:
        self._spec = inputs.spec
        self._train = inputs.spec.train
        self._workers = workers if workers is not None else Workers()
        self._on_step = on_step
        source = inputs.source("train", 1 / self._workers.size)
        if source is None:
            raise InputError(
                "the cache has no 'train' samples",
                remedy="Give more prompts, or lower the fractions of the other splits in the spec",
            )
        self._source = source
        self._validation = inputs.source("validation")
        self._objective: Objective[Any] = new_objective(self._spec, target, inputs.counts)
        self._checkpoints = CheckpointStore(
            inputs.store, f"{inputs.prefix}/{SCRATCH}", keep=self._train.keep_checkpoints
        )
        self._history: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] = {}
        self._final: dict[str, Tensor] = {}

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run, if it does not stop early."""
        train = self._train
        if train.epochs is None:
            return train.steps
        return steps_of_epochs(train.epochs, self._source.num_samples, train.samples_per_step)

    def run(self) -> list[dict[str, Any]]:
        """Train to the last step, from the newest checkpoint if there is one; returns the history.

        Raises:
            TrainingDiverged: a loss or gradient is not finite; on every worker alike.
            FormatError: a shard of the cache is damaged; on every worker alike.
            StorageError: the cache or the workspace failed; on every worker alike.
        """
        step = self._start()
        meter = StepMeter([source for source in (self._source, self._validation) if source is not None])
        while step < self.num_steps and not self._is_exhausted():
            figures = self._step(step)
            num_tokens = figures.pop("tokens")
            step += 1
            is_last = step == self.num_steps
            if step % self._train.validate_every_steps == 0 or is_last:
                figures.update(self._validate(step))
            if step % 10 == 0 or is_last or "validation_loss" in figures:
                self._history.append({"step": step, **figures})
            is_last = is_last or self._is_exhausted()
            self._keep_best(step)
            if step % self._train.checkpoint_every_steps == 0 or is_last:
                self._save(step)
            self._on_step(step, {**figures, **meter.figures(num_tokens)})
        self._final = self._best or self._gather(self._objective.model.state_dict())
        for source in (self._source, self._validation):
            if source is not None:
                source.close()
        return self._history

    def export(self) -> dict[str, bytes]:
        """The trained draft as checkpoint files, after :meth:`run`; the first worker's alone to ask for.

        It is the best validated one where training may stop early, the last otherwise.
        """
        assert self._workers.is_first and self._final
        return self._objective.export(self._final)

    def history_file(self) -> bytes:
        """The history as JSON lines."""
        return "".join(json.dumps(record, sort_keys=True) + "\n" for record in self._history).encode()

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step over all workers; its figures, and ``tokens``."""
        train, workers = self._train, self._workers
        mine = share(step_positions(step, train.samples_per_step), workers.rank, workers.size)
        parts = passes(mine, num_passes(train.samples_per_step, workers.size, train.micro_batch))
        batches = workers.together(lambda: [self._batch(step, part) for part in parts])
        self._source.announce(share(step_positions(step + 1, train.samples_per_step), workers.rank, workers.size))
        ids = [name for batch, _ in batches for name in batch.sample_ids]
        local = [
            self._parallel.backward(batch, is_last_pass=number == len(batches) - 1).sums
            for number, (batch, _) in enumerate(batches)
        ]
        sums, num_tokens = self._add_up(local, sum(count for _, count in batches))
        figures = self._objective.figures(sums)
        if not math.isfinite(figures["loss"]):
            raise self._diverged("the loss", step, ids, is_mine=not _is_finite(local))
        norm = self._optimizer.step(step, self._parallel.gradient_scale(sums.scalar(WEIGHT)))
        if not math.isfinite(norm):
            # Gradients are reduced as they are made: whose was not finite is no longer known.
            raise self._diverged("a gradient", step, ids, is_mine=True)
        return {**figures, "tokens": num_tokens}

    def _batch(self, step: int, positions: Sequence[int]) -> tuple[Batch, int]:
        """A pass's batch and the tokens of its samples."""
        with reading(f"training step {step + 1}"):
            samples = [self._source.at(position) for position in positions]
        return self._objective.build_batch(samples, positions), sum(len(sample.input_ids_T) for sample in samples)

    def _add_up(self, local: Sequence[Sums], num_tokens: int = 0) -> tuple[Sums, float]:
        """Sums over passes and workers."""
        packed = torch.stack([sums.pack() for sums in local]).sum(0)
        packed = self._workers.sum(torch.cat([packed, packed.new_tensor([float(num_tokens)])]))
        return local[0].unpack(packed[:-1]), float(packed[-1])

    def _validate(self, step: int) -> dict[str, float]:
        """Held-out loss and accepted length over an even spread of the split."""
        if self._validation is None:
            return {}
        source, workers = self._validation, self._workers
        positions = spread(source.num_samples, self._train.validation_samples)
        local: list[Sums] = []
        ids: list[str] = []
        for number in range(0, len(positions), _VALIDATION_BATCH * workers.size):
            group = positions[number : number + _VALIDATION_BATCH * workers.size]
            mine = share(group, workers.rank, workers.size)
            # A worker without a sample of its own runs along, for the others' collective operations; it counts nothing.
            given = mine or group[:1]
            batch = workers.together(
                lambda given=given: self._validation_batch(step, source, given)  # type: ignore[misc]
            )
            sums = self._parallel.validate(batch)
            local.append(sums if mine else sums.unpack(torch.zeros_like(sums.pack())))
            ids += batch.sample_ids if mine else ()
        total, _ = self._add_up(local)
        figures = self._objective.validation_figures(total)
        if not all(math.isfinite(value) for value in figures.values()):
            raise self._diverged("the held-out loss", step, ids, is_mine=not _is_finite(local))
        return figures

    def _validation_batch(self, step: int, source: SampleSource, positions: Sequence[int]) -> Batch:
        with reading(f"the validation after step {step}"):
            samples = [source.at(position) for position in positions]
        batch: Batch = self._objective.validation_batch(samples, positions)
        return batch

    def _diverged(self, what: str, step: int, ids: Sequence[str], *, is_mine: bool) -> TrainingDiverged:
        """The error that every worker raises: it names the samples of those workers that saw something not finite."""
        everyone = self._workers.gather((is_mine, list(ids)))
        seen = [part for saw_it, part in everyone if saw_it] or [part for _, part in everyone]
        return TrainingDiverged(
            f"{what} became NaN or infinite at step {step}",
            got=f"samples {', '.join(name for part in seen for name in part)}",
            expected="finite values",
            remedy="Lower train.lr or train.muon_lr, or take these samples out; the last good checkpoint is kept",
        )

    # -- state --------------------------------------------------------------------------------------------------

    def _start(self) -> int:
        """Restore or initialise on the first worker, hand it to all, share the model out; the step to begin with."""
        workers, model = self._workers, self._objective.model
        found = workers.together(self._load)
        tensors = workers.tensors_from_first(found.tensors)
        self._history = workers.from_first(found.history)
        step = workers.from_first(found.step)
        model.load_state_dict(_named(tensors, _MODEL))
        self._best = _named(tensors, _BEST) if workers.is_first else {}
        self._parallel = ParallelObjective(self._objective, workers, self._train.parallel, self._train.precision)
        self._optimizer = DraftOptimizer(model, self._train, self.num_steps)
        if step:
            self._optimizer.load_state(tensors)
        return step

    def _load(self) -> TrainingCheckpoint:
        """The newest checkpoint, or the state before the first step."""
        if not self._workers.is_first:
            return TrainingCheckpoint(0, {}, [])
        found = self._checkpoints.latest()
        if found is not None:
            return found
        with reading("training, before its first step,"):
            self._objective.initialise(self._source)
        state = self._objective.model.state_dict()
        return TrainingCheckpoint(0, {f"{_MODEL}{name}": value for name, value in state.items()}, [])

    def _save(self, step: int) -> None:
        """Write a checkpoint; all workers take part, the first writes."""
        state = self._gather(self._objective.model.state_dict())
        tensors = {f"{_MODEL}{name}": value for name, value in state.items()}
        tensors.update(self._gather(self._optimizer.state()))
        tensors.update({f"{_BEST}{name}": value for name, value in self._best.items()})

        def write() -> None:
            if self._workers.is_first:
                self._checkpoints.save(TrainingCheckpoint(step, tensors, self._history))

        self._workers.together(write)

    def _gather(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the first worker, nothing on the others; all must ask."""
        gathered = {}
        for name, value in state.items():
            full = whole(value).detach()
            if self._workers.is_first:
                gathered[name] = full.cpu()
        return gathered

    def _is_exhausted(self) -> bool:
        return is_exhausted(self._history, self._train.early_stop_patience)

    def _keep_best(self, step: int) -> None:
        """Hold the weights of the best validation, if they are to be exported; they travel in every checkpoint."""
        best = best_record(self._history) if self._train.early_stop_patience else None
        if best is not None and best["step"] == step:
            state = self._gather(self._objective.model.state_dict())
            self._best = {name: value.clone() for name, value in state.items()}


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _is_finite(local: Sequence[Sums]) -> bool:
    return all(bool(sums.pack().isfinite().all()) for sums in local)
