"""Muon for matrices, AdamW for the rest, one learning-rate schedule, exact state.

``torch.optim.Muon`` orthogonalises in bf16, which a CPU without AMX emulates
at a fraction of fp32's speed; this one follows the weights' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from draftline.spec import TrainSpec

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_MUON_MOMENTUM = 0.95
_EXCLUDED = ("markov_head.", "confidence_head.")


def schedule(step: int, total: int, warmup_fraction: float) -> float:
    """Learning-rate factor of a step: linear warm-up, then cosine to 0."""
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, about (Newton-Schulz; Jordan et al. 2024, "Muon")."""
    a, b, c = _NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.t() if is_tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = a * x + torch.addmm(b * gram, gram, gram, alpha=c) @ x
    result: Tensor = x.t() if is_tall else x
    return result


class DraftOptimizer:
    """Updates a draft's parameters in place.

    Args:
        model: The draft.
        spec: Learning rates, weight decay, clipping, schedule.
    """

    def __init__(self, model: nn.Module, spec: TrainSpec) -> None:
        self._spec = spec
        self._matrices: dict[str, nn.Parameter] = {}
        self._others: dict[str, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            use_muon = spec.optimizer == "muon" and parameter.ndim == 2 and not name.startswith(_EXCLUDED)
            (self._matrices if use_muon else self._others)[name] = parameter
        self._momentum = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        self._adam = torch.optim.AdamW(
            list(self._others.values()), lr=spec.lr, betas=(0.9, 0.95), weight_decay=spec.weight_decay
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, matrices first."""
        return [*self._matrices.values(), *self._others.values()]

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Clip and apply the gradients; returns their norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self._spec.grad_clip))
        factor = schedule(step, self._spec.steps, self._spec.warmup_fraction)
        for name, parameter in self._matrices.items():
            if parameter.grad is None:
                continue
            momentum = self._momentum[name]
            momentum.lerp_(parameter.grad, 1 - _MUON_MOMENTUM)
            update = orthogonalise(parameter.grad.lerp(momentum, _MUON_MOMENTUM))
            lr = self._spec.muon_lr * factor
            parameter.mul_(1 - lr * self._spec.weight_decay)
            # Tall matrices keep the update's root-mean-square of square ones.
            parameter.add_(update, alpha=-lr * max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5)
        for group in self._adam.param_groups:
            group["lr"] = self._spec.lr * factor
        self._adam.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors; :meth:`load_state` restores it exactly."""
        tensors = {f"muon.{name}": value for name, value in self._momentum.items()}
        for name, parameter in self._others.items():
            for field, value in self._adam.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{field}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state`."""
        for name, value in self._momentum.items():
            value.copy_(tensors[f"muon.{name}"])
        for name, parameter in self._others.items():
            prefix = f"adam.{name}."
            fields = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
            if fields:
                self._adam.state[parameter] = fields
