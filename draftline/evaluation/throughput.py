"""Throughput of many requests together, under the serving policy and without a draft.

One request alone says how much a draft can gain; a busy machine has less to
spare for wrong guesses. The gate may ask for the gain at the load that the
draft is meant for (``gate.concurrency``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from draftline.engine.build import run_to_completion
from draftline.engine.engine import Engine
from draftline.evaluation.acceptance import Report
from draftline.evaluation.measure import Bench
from draftline.evaluation.turns import Decoding, EvaluationPrompt
from draftline.scheduling.policies import OffPolicy

ROUNDS = 3
"""Pairs of runs, plain and speculative in turn; the median ratio counts."""


@dataclass(frozen=True)
class Load:
    """Speed with a number of requests together.

    Attributes:
        concurrency: Requests decoded together.
        tokens_per_s: Of all requests, prefill included, medians over the rounds, by way of decoding.
        speedup_over_plain: Median of the rounds' ratios.
    """

    concurrency: int
    tokens_per_s: dict[str, float]
    speedup_over_plain: float


def measure_load(
    bench: Bench, prompts: Sequence[EvaluationPrompt], concurrency: int, temperature: float, report: Report
) -> Load:
    """Time ``concurrency`` requests that begin together; prompts repeat where there are fewer.

    Args:
        bench: What is measured.
        prompts: Their first turns are decoded.
        concurrency: At least 2; one alone is :func:`draftline.evaluation.measure.measure_speed`.
        temperature: Of the requests.
        report: Gets finished rounds.
    """
    batch = list(islice(cycle(prompts), concurrency))
    context = max(len(prompt.ids) for prompt in batch) + bench.max_new_tokens
    engines = {
        "plain": bench.engine(OffPolicy(), concurrency, context),
        "speculative": bench.engine(bench.policy, concurrency, context),
    }
    decoding = bench.decoding(temperature)
    for engine in engines.values():
        _rate(engine, batch, decoding)  # warms up, and leaves both with the same prefixes
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(ROUNDS):
        for name in sorted(engines, reverse=bool(number % 2)):
            rates[name].append(_rate(engines[name], batch, decoding))
        report(number + 1)
    ratio = statistics.median(s / p for s, p in zip(rates["speculative"], rates["plain"], strict=True))
    return Load(concurrency, {name: statistics.median(found) for name, found in rates.items()}, ratio)


def _rate(engine: Engine, prompts: Sequence[EvaluationPrompt], decoding: Decoding) -> float:
    # A prompt that comes twice is two requests.
    requests = [decoding.request(f"{number}-{p.id}", p.ids, number) for number, p in enumerate(prompts)]
    started, count = time.perf_counter(), 0
    for event in run_to_completion(engine, requests):
        count += len(event.token_ids)
    return count / max(time.perf_counter() - started, 1e-9)
