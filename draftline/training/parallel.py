"""One objective on several workers: replicated (DDP) or sharded (FSDP2), the same arithmetic.

The objective runs inside one module, so that whatever it touches of its
model, head weights as well as layers, is gathered before the pass and
reduced after it. Gradients come out as means over the workers of each
worker's sum; :meth:`ParallelObjective.gradient_scale` makes the step's mean of
them.

bf16 is autocast: weights, gradients and optimiser stay fp32, whatever the mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from draftline.training.objective import Batch, Objective, StepTerms, Sums
from draftline.training.workers import Workers


class ParallelObjective:
    """Runs an objective so that every worker's gradients are those of all.

    Args:
        objective: With its weights set, equal on all workers.
        workers: All of them construct this at once.
        mode: ``ddp`` or ``fsdp``; one worker alone needs neither.
        precision: Of the forward and backward passes.
    """

    def __init__(
        self,
        objective: Objective[Any],
        workers: Workers,
        mode: Literal["ddp", "fsdp"],
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self._workers = workers
        self._precision = precision
        module = _ObjectiveModule(objective)
        self._module: nn.Module = module
        if workers.size == 1:
            return
        if mode == "fsdp":
            mesh = init_device_mesh(workers.device.type, (workers.size,))
            for part in _layers(objective.model):
                fully_shard(part, mesh=mesh)
            fully_shard(module, mesh=mesh)
        else:
            # Without a search for unused parameters DDP lays its buckets out anew after the first step, also after the
            # first step of a resumed run: with three workers or more, sums would then be added in another order.
            # The search would warn, once a process, if it found none.
            module.unused = nn.Parameter(torch.zeros(1, device=workers.device))
            self._module = DistributedDataParallel(module, find_unused_parameters=True, forward_sync_buffers=False)

    def backward(self, batch: Batch, *, is_last_pass: bool) -> StepTerms:
        """One pass: gradients are added up, and reduced over the workers in the last pass of a step."""
        with self._reduced(is_last_pass):
            terms = self._run(batch, is_validation=False)
            terms.objective.backward()
        return StepTerms(terms.objective.detach(), terms.sums)

    @torch.no_grad()
    def validate(self, batch: Batch) -> Sums:
        """One pass over held-out samples; every worker must take part."""
        return self._run(batch, is_validation=True).sums

    def gradient_scale(self, weight: float) -> float:
        """What turns the reduced gradients into the whole step's: its weight divides them, means become sums."""
        return self._workers.size / max(weight, 1e-9)

    def _run(self, batch: Batch, *, is_validation: bool) -> StepTerms:
        with self._autocast():
            objective, sums = self._module(batch, is_validation)
        return StepTerms(objective, Sums(sums))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self._precision == "bf16"
        return torch.autocast(self._workers.device.type, dtype=torch.bfloat16, enabled=enabled)

    @contextlib.contextmanager
    def _reduced(self, is_last_pass: bool) -> Iterator[None]:
        if isinstance(self._module, DistributedDataParallel) and not is_last_pass:
            with self._module.no_sync():
                yield
            return
        if isinstance(self._module, FSDPModule):
            self._module.set_requires_gradient_sync(is_last_pass)
        yield


class _ObjectiveModule(nn.Module):
    """The objective's passes as a module's ``forward``: what DDP and FSDP2 hook into."""

    def __init__(self, objective: Objective[Any]) -> None:
        super().__init__()
        self.model = objective.model
        self.unused: nn.Parameter | None = None
        self._objective = objective

    def forward(self, batch: Batch, is_validation: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective (nothing in validation) and the named sums."""
        if is_validation:
            sums = self._objective.validate(batch)
            return torch.zeros(()), dict(sums.values)
        terms = self._objective.terms(batch)
        return terms.objective, dict(terms.sums.values)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, each gathered and released by itself."""
    return [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value, gathered from all workers if it is sharded (then all must ask)."""
    if isinstance(tensor, DTensor):
        gathered: Tensor = tensor.full_tensor()
        return gathered
    return tensor


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """This worker's form of a full value that all workers hold: sharded as ``like`` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value
