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
from draftline.training.parallel import placed_like, whole

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
    """Updates a draft's parameters in place, whole or sharded.

    Args:
        model: The draft; sharded already, if it is to be.
        spec: Learning rates, weight decay, clipping, schedule.
        num_steps: Of the whole run.
    """

    def __init__(self, model: nn.Module, spec: TrainSpec, num_steps: int) -> None:
        self._spec = spec
        self._num_steps = num_steps
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
    def step(self, step: int, gradient_scale: float = 1.0) -> float:
        """Scale, clip and apply the gradients, then drop them.

        Args:
            step: Number of the step, from 0.
            gradient_scale: Multiplies every gradient first.

        Returns:
            The global norm before clipping. If it is not finite, nothing was
            applied: parameters and state are those before the step.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(gradient_scale)
        total = whole(nn.utils.get_total_norm(gradients))
        norm = float(total)
        if math.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self.parameters, self._spec.grad_clip, total)
            self._apply(schedule(step, self._num_steps, self._spec.warmup_fraction))
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def _apply(self, factor: float) -> None:
        lr = self._spec.muon_lr * factor
        for name, parameter in self._matrices.items():
            if parameter.grad is None:
                continue
            momentum = self._momentum[name]
            momentum.lerp_(parameter.grad, 1 - _MUON_MOMENTUM)
            # A shard has singular values of its own: only the whole matrix can be orthogonalised.
            update = orthogonalise(whole(parameter.grad.lerp(momentum, _MUON_MOMENTUM)))
            parameter.mul_(1 - lr * self._spec.weight_decay)
            # Tall matrices keep the update's root-mean-square of square ones.
            scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            parameter.add_(placed_like(update, parameter), alpha=-lr * scale)
        for group in self._adam.param_groups:
            group["lr"] = self._spec.lr * factor
        self._adam.step()

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors, sharded as the parameters are; :meth:`load_state` restores it exactly."""
        tensors: dict[str, Tensor] = {f"muon.{name}": value for name, value in self._momentum.items()}
        for name, parameter in self._others.items():
            for field, value in self._adam.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{field}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state` from whole tensors, which every worker holds."""
        for name, value in self._momentum.items():
            value.copy_(placed_like(tensors[f"muon.{name}"], value))
        for name, parameter in self._others.items():
            prefix = f"adam.{name}."
            fields = {k.removeprefix(prefix): v.clone() for k, v in tensors.items() if k.startswith(prefix)}
            if fields:
                self._adam.state[parameter] = {
                    field: value if field == "step" else placed_like(value, parameter)
                    for field, value in fields.items()
                }
