"""Verification of a step: all requests in a few tensor operations against one request after the other.

Usage: ``python -m benchmarks.verify_step [--vocab 49152] [--block 7]``
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import alternating_medians_ms, with_allocator_settings
from draftline.decoding.verify import SamplingLaw, law_of
from draftline.draft.proposer import Proposal
from draftline.engine.requests import SamplingParams
from draftline.engine.verification import Deciding, Verdict, verify_step
from tests.decoding.plain import num_matching, verify_sampled

LAWS = {
    "greedy": SamplingParams(1, 0.0, has_logprobs=True),
    "temperature 1": SamplingParams(1, 1.0, has_logprobs=True),
    "top-k 50, top-p 0.9": SamplingParams(1, 0.8, top_p=0.9, top_k=50, has_logprobs=True),
}


def main() -> None:
    """Print medians and ratios by number of requests and sampling law."""
    with_allocator_settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--block", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, V = {arguments.vocab}, blocks of {arguments.block}, ragged")
    for name, sampling in LAWS.items():
        for count in (1, 8, 64):
            step = _Step(sampling, count, arguments.block, arguments.vocab)
            medians = alternating_medians_ms(
                {"one by one": step.one_by_one, "at once": step.at_once}, arguments.repeats
            )
            loops, at_once = medians["one by one"], medians["at once"]
            print(
                f"{name}, {count:2} requests, {len(step.logits_NV):3} rows: "
                f"one by one {loops:7.2f} ms, at once {at_once:7.2f} ms, {loops / at_once:.2f}x faster"
            )


def _score(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    return logits_NV.argmax(-1), logits_NV.logsumexp(-1)


class _Step:
    """Logits and drafts of some requests; about two thirds of the drafts are likely ones."""

    def __init__(self, sampling: SamplingParams, count: int, block: int, vocab: int) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = np.random.default_rng(0).integers(0, block + 1, size=count).tolist()
        self.logits_NV = torch.randn(sum(lengths) + count, vocab, generator=generator).mul_(2)
        self._sampling, self._block = sampling, block
        law_RBW = torch.randn(count, block, vocab, generator=generator).mul_(2).softmax(-1)
        ids_RB = law_RBW.argmax(-1)
        first = np.cumsum([0, *(n + 1 for n in lengths)]).tolist()
        for row, length in enumerate(lengths):
            likely = self.logits_NV[first[row] : first[row] + length].argmax(-1)
            ids_RB[row, :length] = torch.where(torch.arange(length) % 3 < 2, likely, ids_RB[row, :length])
        is_sampled = sampling.temperature > 0
        self._proposal = Proposal(ids_RB, ids_RB, None, law_RBW if is_sampled else None)
        self._drafted = [ids_RB[row, :length].tolist() for row, length in enumerate(lengths)]
        self._first = first

    def at_once(self) -> list[Verdict]:
        """As the engine does it."""
        deciding = [
            Deciding(self._sampling, np.random.default_rng(row), ids, row) for row, ids in enumerate(self._drafted)
        ]
        return verify_step(self.logits_NV, deciding, self._proposal, None, _score)

    def one_by_one(self) -> list[tuple[Sequence[int], list[float]]]:
        """The same with a Python loop over requests and drafts, which reads every probability on the host."""
        sampling, logits_NV = self._sampling, self.logits_NV
        best, normaliser_N = logits_NV.argmax(-1).tolist(), logits_NV.logsumexp(-1)
        law_NV = None
        if sampling.temperature > 0:
            law_NV = law_of(logits_NV, SamplingLaw(sampling.temperature, sampling.top_p, sampling.top_k))
        found: list[tuple[Sequence[int], list[float]]] = []
        for row, drafted in enumerate(self._drafted):
            start, end = self._first[row], self._first[row + 1]
            accepted, following = self._decide(
                row, drafted, best[start:end], None if law_NV is None else law_NV[start:end]
            )
            ids = [*drafted[:accepted], following]
            chosen = logits_NV[torch.arange(start, start + len(ids)), torch.tensor(ids)]
            found.append((ids, (chosen - normaliser_N[start : start + len(ids)]).tolist()))
        return found

    def _decide(self, row: int, drafted: list[int], best: list[int], law: Tensor | None) -> tuple[int, int]:
        if law is None:
            accepted = num_matching(best, drafted)
            return accepted, best[accepted]
        assert self._proposal.law_RBW is not None
        uniforms = torch.from_numpy(np.random.default_rng(row).random(len(drafted) + 1))
        return verify_sampled(law, self._proposal.law_RBW[row], drafted, drafted, None, uniforms)


if __name__ == "__main__":
    main()
