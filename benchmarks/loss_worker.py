"""One contender of ``train_step.py`` in a process of its own, so that it may run under another Python.

Usage: ``python loss_worker.py CONTENDER INPUTS.safetensors``, then one command a line on standard input: ``time``
answers the milliseconds of a step, ``memory`` the MiB by which a step's peak exceeds what was resident before it.
Imports nothing but torch and safetensors at its top; each contender imports what it measures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

BLOCK = 7
CE, TV, CONFIDENCE, DECAY = 0.1, 0.9, 1.0, 4.0


def main(contender: str, path: str) -> None:
    """Answer commands until standard input ends."""
    # Cloned, so that no page of the file counts as memory of a step.
    inputs = {name: value.clone() for name, value in load_file(path).items()}
    for name in ("hidden", "latent", "w2", "confidence"):
        inputs[name].requires_grad_()
    step = CONTENDERS[contender](inputs)
    for line in sys.stdin:
        for name in ("hidden", "latent", "w2", "confidence"):
            inputs[name].grad = None
        answer = _peak_mib(step) if line.strip() == "memory" else _milliseconds(step)
        print(answer, flush=True)


def _milliseconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - started)


def _peak_mib(step: Callable[[], None]) -> float:
    Path("/proc/self/clear_refs").write_text("5")  # Sets the peak back to what is resident now.
    before = _status_kib("VmRSS")
    step()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def _draftline(inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    from draftline.draft.loss import DistillationTargets, LossOptions, confidence_loss, distillation_loss

    targets = DistillationTargets(
        inputs["target_hidden"], inputs["log_normaliser"], inputs["labels"], inputs["weights"], inputs["rows"]
    )
    options = LossOptions(CE, TV, count_matches=False)

    def step() -> None:
        terms = distillation_loss(inputs["hidden"], inputs["latent"], inputs["w2"], inputs["head"], targets, options)
        bce = confidence_loss(inputs["confidence"], terms.accept_N, targets.weights_N)
        ((terms.objective + CONFIDENCE * bce) / terms.weight_sum).backward()

    return step


def _plain(inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    """The formulas in autograd; the target's logits at every slot, as in the reference."""
    head, weights, labels = inputs["head"], inputs["weights"], inputs["labels"]

    def step() -> None:
        hidden, latent, w2 = (inputs[name].to(head.dtype) for name in ("hidden", "latent", "w2"))
        logits = (hidden @ head.t() + latent @ w2.t()).float()
        with torch.no_grad():
            q = (inputs["target_hidden"][inputs["rows"]].to(head.dtype) @ head.t()).float().softmax(-1)
        tv = 0.5 * (logits.softmax(-1) - q).abs().sum(-1)
        ce = functional.cross_entropy(logits, labels, reduction="none")
        bce = functional.binary_cross_entropy_with_logits(inputs["confidence"], 1 - tv.detach(), reduction="none")
        (((CE * ce + TV * tv + CONFIDENCE * bce) * weights).sum() / weights.sum()).backward()

    return step


def _speculators(inputs: Mapping[str, Tensor]) -> Callable[[], None]:
    """Its own Markov head, losses and metrics (DSpark, 0.9), the eager losses: its fused ones need Triton and a GPU."""
    from functools import partial

    from speculators.losses import resolve_loss_config  # type: ignore[import-not-found]
    from speculators.losses.eager import tv_loss  # type: ignore[import-not-found]
    from speculators.models.dspark.metrics import compute_metrics  # type: ignore[import-not-found]
    from speculators.models.dspark.model_definitions import MarkovHead  # type: ignore[import-not-found]

    head, rows = inputs["head"], inputs["rows"]
    vocab, rank = inputs["w2"].shape
    markov = MarkovHead(verifier_vocab_size=1, draft_vocab_size=vocab, markov_rank=rank, hidden_size=head.shape[1])
    markov.markov_w2.weight = torch.nn.Parameter(inputs["w2"].detach().to(head.dtype))
    losses = resolve_loss_config(f'{{"ce": {CE}, "tv": {TV}}}', "eager")
    mask = torch.ones(1, len(rows))
    metrics = partial(compute_metrics, loss_config=losses, tv_loss_fn=tv_loss, gamma=DECAY, block_size=BLOCK)

    def step() -> None:
        markov.markov_w2.weight.grad = None
        with torch.no_grad():
            targets = functional.linear(inputs["target_hidden"][rows].to(head.dtype), head)[None]
        logits = functional.linear(inputs["hidden"].to(head.dtype), head)
        blocks = inputs["latent"].view(-1, BLOCK, rank)
        bias = markov.block_bias(prev_token_ids=rows, hidden_states=blocks, prev_emb=blocks)
        logits = (logits.view(-1, BLOCK, vocab) + bias).view(1, -1, vocab)
        loss, _ = metrics(logits, targets, inputs["confidence"][None], mask, confidence_head_alpha=CONFIDENCE)
        loss.backward()

    return step


def _products(inputs: Mapping[str, Tensor], rows: str) -> Callable[[], None]:
    """Nothing but the matrix products: no version can be faster than its own."""
    head, w2 = inputs["head"], inputs["w2"].detach().to(inputs["head"].dtype)
    hidden, latent = (inputs[name].detach().to(head.dtype) for name in ("hidden", "latent"))
    target = inputs["target_hidden"].to(head.dtype)
    target = target[inputs["rows"]] if rows == "slots" else target

    def step() -> None:
        target @ head.t()
        logits = hidden @ head.t()
        latent @ w2.t()
        logits @ head
        logits @ w2
        logits.t() @ latent

    return step


CONTENDERS: Mapping[str, Callable[[Mapping[str, Tensor]], Callable[[], None]]] = {
    "draftline": _draftline,
    "plain": _plain,
    "speculators": _speculators,
    "products": lambda inputs: _products(inputs, "slots"),
}

if __name__ == "__main__":
    main(*sys.argv[1:])
