"""The chunked loss with hand-written backward against plain autograd, same shapes, one run.

Usage: ``python -m benchmarks.train_step [--vocab 49152] [--slots 1024]``
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import alternating_medians_ms, with_allocator_settings
from draftline.draft.loss import DistillationTargets, LossOptions, distillation_loss


def main() -> None:
    """Print seconds and peak memory of both, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", choices=("chunked", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    runs = _contenders(arguments.slots, arguments.vocab, arguments.hidden)
    if arguments.memory_of:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        runs[arguments.memory_of]()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
        return
    # A fresh process each, with the ordinary allocator, so that the peak is its own.
    memory = {
        name: int(subprocess.run([*sys.orig_argv, "--memory-of", name], capture_output=True, check=True).stdout)
        for name in runs
    }
    with_allocator_settings()
    medians = alternating_medians_ms(runs, arguments.repeats)
    for name in runs:
        print(f"{name:8} {medians[name]:8.0f} ms  {memory[name]:6d} MiB above the inputs")
    print(
        f"chunked is {medians['plain'] / medians['chunked']:.2f}x faster "
        f"with {memory['chunked'] / max(memory['plain'], 1):.2f} of the memory"
    )


def _contenders(slots: int, vocab: int, hidden: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(slots, hidden, generator=generator).requires_grad_()
    latent = torch.randn(slots, 128, generator=generator).requires_grad_()
    w2 = torch.randn(vocab, 128, generator=generator).mul_(0.02).requires_grad_()
    head = torch.randn(vocab, hidden, generator=generator) * 0.05
    target_hidden = torch.randn(slots, hidden, generator=generator)
    normaliser = torch.cat([(part @ head.t()).logsumexp(-1) for part in target_hidden.split(256)])
    labels = torch.randint(0, vocab, (slots,), generator=generator)
    weights = torch.ones(slots)
    targets = DistillationTargets(target_hidden, normaliser, labels, weights)

    def chunked() -> None:
        distillation_loss(x, latent, w2, head, targets, LossOptions(ce=0.1, tv=0.9)).objective.backward()  # type: ignore[no-untyped-call]

    def plain() -> None:
        logits = x @ head.t() + latent @ w2.t()
        law = logits.softmax(-1)
        q: Tensor = (target_hidden @ head.t() - normaliser[:, None]).exp()
        ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        tv = 0.5 * (law - q).abs().sum(-1)
        ((0.1 * ce + 0.9 * tv) * weights).sum().backward()  # type: ignore[no-untyped-call]

    return {"chunked": chunked, "plain": plain}


if __name__ == "__main__":
    main()
