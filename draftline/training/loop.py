"""The training loop of one worker; Ray Train starts it, but it knows nothing of Ray, nor of any draft family."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

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
from draftline.training.objective import WEIGHT, Batch, Objective, Sums
from draftline.training.optimizers import DraftOptimizer
from draftline.training.reading import reading

VALIDATION_SAMPLES = 24
_VALIDATION_BATCH = 8


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
    """

    spec: RunSpec
    store: ObjectStore
    cache_prefix: str
    manifest: Manifest
    counts: list[tuple[int, int]]
    prefix: str

    def source(self, split: str, share: float = 1.0) -> SampleSource | None:
        """Samples of a split, or ``None`` where it has none; a worker asks for about ``share`` of the stream."""
        if not self.manifest.of_split(split):
            return None
        options = ReadOptions(self.spec.cache, share)
        return CacheReader(self.store, self.cache_prefix, self.manifest, split, self.spec.seed, options)


class DraftTrainer:
    """Trains a draft from a cache; exact across restarts.

    Args:
        inputs: What to read.
        target: The frozen target (embeddings and LM head are used).
        rank: This worker.
        world_size: All workers.
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
        rank: int = 0,
        world_size: int = 1,
        on_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
    ) -> None:
        self._spec = inputs.spec
        self._rank, self._world = rank, world_size
        self._on_step = on_step
        source = inputs.source("train", 1 / world_size)
        if source is None:
            raise InputError(
                "the cache has no 'train' samples",
                remedy="Give more prompts, or lower the fractions of the other splits in the spec",
            )
        self._source = source
        self._validation = inputs.source("validation")
        self._objective: Objective[Any] = new_objective(self._spec, target, inputs.counts)
        self._optimizer = DraftOptimizer(self._objective.model, self._spec.train)
        self._checkpoints = CheckpointStore(inputs.store, f"{inputs.prefix}/{SCRATCH}")
        self._history: list[dict[str, Any]] = []

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self._objective.model.parameters())

    def run(self) -> list[dict[str, Any]]:
        """Train to the last step, from the newest checkpoint if there is one; returns the history.

        Raises:
            TrainingDiverged: a loss or gradient is not finite.
        """
        train = self._spec.train
        start = self._restore()
        for step in range(start, train.steps):
            figures = self._step(step)
            done = step + 1
            is_last = done == train.steps
            if done % train.validate_every_steps == 0 or is_last:
                figures.update(self._validate())
            if done % 10 == 0 or is_last or "validation_loss" in figures:
                self._history.append({"step": done, **figures})
            if (done % train.checkpoint_every_steps == 0 or is_last) and self._rank == 0:
                self._save(done)
            self._on_step(done, figures)
        return self._history

    def export(self) -> dict[str, bytes]:
        """The trained draft as checkpoint files."""
        return self._objective.export(self._objective.model.state_dict())

    def history_file(self) -> bytes:
        """The history as JSON lines."""
        return "".join(json.dumps(record, sort_keys=True) + "\n" for record in self._history).encode()

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self, step: int) -> dict[str, float]:
        batch = self._batch(step)
        terms = self._objective.terms(batch)
        packed = terms.sums.pack()
        if self._world > 1:
            distributed.all_reduce(packed)
        sums = terms.sums.unpack(packed)
        figures = self._objective.figures(sums)
        if not math.isfinite(figures["loss"]):
            raise _diverged("the loss", step, batch)
        # Divided once, by the weight of all workers: their gradients add up to the whole step's.
        (terms.objective / max(sums.scalar(WEIGHT), 1e-9)).backward()
        self._reduce_gradients()
        norm = self._optimizer.step(step)
        if not math.isfinite(norm):
            raise _diverged("a gradient", step, batch)
        return figures

    def _batch(self, step: int) -> Batch:
        train = self._spec.train
        share = train.samples_per_step // self._world
        first = step * train.samples_per_step + self._rank * share
        positions = range(first, first + share)
        with reading(f"training step {step + 1}"):
            samples = [self._source.at(position) for position in positions]
        batch: Batch = self._objective.build_batch(samples, positions)
        following = first + train.samples_per_step
        self._source.announce(range(following, following + share))
        return batch

    def _reduce_gradients(self) -> None:
        if self._world == 1:
            return
        grads = [p.grad for p in self._optimizer.parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        distributed.all_reduce(flat)
        offset = 0
        for grad in grads:
            grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Held-out loss and accepted length (the same on every worker)."""
        if self._validation is None:
            return {}
        count = min(VALIDATION_SAMPLES, self._validation.num_samples)
        total: Sums | None = None
        for first in range(0, count, _VALIDATION_BATCH):
            positions = range(first, min(first + _VALIDATION_BATCH, count))
            samples = [self._validation.at(p) for p in positions]
            sums = self._objective.validate(self._objective.validation_batch(samples, positions))
            total = sums if total is None else total.unpack(total.pack() + sums.pack())
        return self._objective.validation_figures(total) if total is not None else {}

    # -- state --------------------------------------------------------------------------------------------------

    def _restore(self) -> int:
        step = self._load()
        if self._world > 1:
            # Measured on each worker, the start may differ in the last bit, or a factor in its sign.
            for value in self._objective.model.state_dict().values():
                distributed.broadcast(value, 0)
        return step

    def _load(self) -> int:
        found = self._checkpoints.latest()
        if found is None:
            self._objective.initialise(self._source)
            return 0
        model_state = {k.removeprefix("model."): v for k, v in found.tensors.items() if k.startswith("model.")}
        self._objective.model.load_state_dict(model_state)
        self._optimizer.load_state(found.tensors)
        self._history = list(found.history)
        return found.step

    def _save(self, step: int) -> None:
        tensors = {f"model.{name}": value for name, value in self._objective.model.state_dict().items()}
        tensors.update(self._optimizer.state())
        self._checkpoints.save(TrainingCheckpoint(step, tensors, self._history))


def _diverged(what: str, step: int, batch: Batch) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what} became NaN or infinite at step {step}",
        got=f"samples {', '.join(batch.sample_ids[:4])}",
        expected="finite values",
        remedy="Lower train.lr or train.muon_lr; the last good checkpoint is kept",
    )
