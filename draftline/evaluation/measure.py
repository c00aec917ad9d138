"""Measure one suite: accepted length online, speed in alternating runs, losslessness.

All figures come from the engine decoding for real. Accepted length is counted
with whole blocks verified (the paper's tau, bonus token included); speed is
measured under the serving policy, one request at a time, plain and
speculative in turn on every prompt, because machines drift.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import DraftModel
from draftline.engine.build import find_costs, run_to_completion
from draftline.engine.engine import Engine, EngineLimits
from draftline.engine.requests import EngineRequest, SpeculationStats
from draftline.evaluation.acceptance import Acceptance, Report, accept_whole_blocks, summarise
from draftline.evaluation.turns import Decoding, EvaluationPrompt, answer_turns, context_for
from draftline.scheduling.policies import FixedPolicy, LengthPolicy, OffPolicy
from draftline.target.load import Target

SLOTS = 8
"""Requests decoded together where nothing is timed."""


@dataclass(frozen=True)
class Losslessness:
    """Whether speculation changed a token."""

    verdict: str
    num_prompts: int = 0
    num_equal: int = 0
    first_difference: str | None = None


@dataclass(frozen=True)
class Timing:
    """Speed of one request at a time; medians over prompts.

    Attributes:
        tokens_per_s: By way of decoding.
        speedup_over_plain: Median of per-prompt ratios.
        speedup_over_transformers: The same, ``None`` when not measured.
        serving_accepted_length: The same under the serving policy, steps without a draft included.
    """

    tokens_per_s: dict[str, float]
    speedup_over_plain: float
    speedup_over_transformers: float | None
    serving_accepted_length: float


@dataclass(frozen=True)
class Bench:
    """What is being measured.

    Attributes:
        target: The target in its serving dtype.
        draft: The draft.
        calibration: Its calibration.
        policy: The serving policy.
        max_new_tokens: Per turn.
        max_context: No conversation may grow beyond.
        seed: Of sampled requests.
    """

    target: Target
    draft: DraftModel
    calibration: Calibration
    policy: LengthPolicy
    max_new_tokens: int
    max_context: int
    seed: int = 0

    def engine(self, policy: LengthPolicy, slots: int, context: int) -> Engine:
        """A fresh engine; with the draft unless the policy is off."""
        engine = Engine(self.target, EngineLimits(slots, context), policy, calibration=self.calibration)
        if policy.wants_draft:
            engine.swap_draft(self.draft)
        if policy.is_adaptive:
            find_costs(engine, self.calibration)
        return engine

    def decoding(self, temperature: float) -> Decoding:
        """How its prompts are decoded at a temperature."""
        return Decoding(self.max_new_tokens, temperature, self.seed)

    def context(self, prompts: Sequence[EvaluationPrompt]) -> int:
        """Context that holds the prompts with all their turns."""
        return context_for(self.target, prompts, self.max_new_tokens, self.max_context)


def measure_acceptance(
    bench: Bench, prompts: Sequence[EvaluationPrompt], temperature: float, report: Report
) -> Acceptance:
    """Decode all turns of all prompts with whole blocks and count; ``report`` gets finished turns."""
    context = bench.context(prompts)
    engine = bench.engine(FixedPolicy(), SLOTS, context)
    turns, traces = accept_whole_blocks(engine, bench.target, prompts, bench.decoding(temperature), context, report)
    return summarise(
        bench.target,
        turns,
        traces,
        bench.draft.config.block_size,
        temperature=temperature,
        calibration=bench.calibration if bench.draft.config.enable_confidence_head else None,
    )


def measure_speed(
    bench: Bench, prompts: Sequence[EvaluationPrompt], temperature: float, num_hf_prompts: int, report: Report
) -> Timing:
    """Time prompts one at a time, plain and speculative in turn; the first turn of each only."""
    context = max(len(p.ids) for p in prompts) + bench.max_new_tokens
    engines = {"plain": bench.engine(OffPolicy(), 1, context), "speculative": bench.engine(bench.policy, 1, context)}
    rates, stats = time_alternately(engines, prompts, bench.decoding(temperature), report)
    over_plain = statistics.median(s / p for s, p in zip(rates["speculative"], rates["plain"], strict=True))
    over_hf: float | None = None
    if num_hf_prompts:
        rates["transformers"] = _transformers_rates(bench, prompts[:num_hf_prompts])
        over_hf = statistics.median(s / h for s, h in zip(rates["speculative"], rates["transformers"], strict=False))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return Timing(medians, over_plain, over_hf, stats["speculative"].tokens_per_step)


def time_alternately(
    engines: Mapping[str, Engine],
    prompts: Sequence[EvaluationPrompt],
    decoding: Decoding,
    report: Report = lambda done: None,
) -> tuple[dict[str, list[float]], dict[str, SpeculationStats]]:
    """Tokens per second of every prompt on every engine, one request at a time, and each engine's counters.

    The engines take turns on each prompt, in an order that shifts from prompt
    to prompt: a machine that warms up or is disturbed treats all alike.

    Args:
        engines: Idle, with one slot each.
        prompts: Their first turns are decoded.
        decoding: Law and lengths.
        report: Gets finished prompts.
    """
    warm_up = replace(decoding, max_new_tokens=min(8, decoding.max_new_tokens))
    for engine in engines.values():
        list(run_to_completion(engine, [warm_up.request(prompts[0].id, prompts[0].ids, 0)]))
    rates: dict[str, list[float]] = {name: [] for name in engines}
    stats = {name: SpeculationStats() for name in engines}
    names = list(engines)
    for number, prompt in enumerate(prompts):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            rate, one = _decode_rate(engines[name], decoding.request(prompt.id, prompt.ids, number))
            rates[name].append(rate)
            stats[name].add(one)
        report(number + 1)
    return rates, stats


def compare_greedy(
    bench: Bench, prompts: Sequence[EvaluationPrompt], max_new_tokens: int, report: Report
) -> Losslessness:
    """Token-for-token comparison of speculative and plain greedy decoding, all turns.

    Meant for an fp32 target: there both must be equal. In bf16 a one-token and
    an eight-token product round differently, and near-ties flip even without
    a draft.
    """
    short = replace(bench, max_new_tokens=max_new_tokens)
    context, total = short.context(prompts), sum(prompt.num_turns for prompt in prompts)
    outputs: list[dict[str, tuple[tuple[int, ...], ...]]] = []

    def progress(part: int) -> Report:
        return lambda done: report((part + done / total) / 2 * len(prompts))

    policies: tuple[LengthPolicy, ...] = (OffPolicy(), FixedPolicy())
    for part, policy in enumerate(policies):
        engine = short.engine(policy, SLOTS, context)
        outputs.append(greedy_answers(engine, short.target, prompts, max_new_tokens, context, progress(part)))
    return compare_answers(prompts, *outputs)


def greedy_answers(
    engine: Engine,
    target: Target,
    prompts: Sequence[EvaluationPrompt],
    max_new_tokens: int,
    context: int,
    report: Report = lambda done: None,
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Greedy answers to every turn, by prompt; ``report`` gets finished turns."""
    answers: dict[str, list[tuple[int, ...]]] = {prompt.id: [] for prompt in prompts}
    for done, turn in enumerate(answer_turns(engine, target, prompts, Decoding(max_new_tokens), context), start=1):
        answers[turn.prompt.id].append(turn.answer)
        report(done)
    return {name: tuple(turns) for name, turns in answers.items()}


def compare_answers(
    prompts: Sequence[EvaluationPrompt],
    plain: Mapping[str, tuple[tuple[int, ...], ...]],
    speculative: Mapping[str, tuple[tuple[int, ...], ...]],
) -> Losslessness:
    """Whether two engines answered every turn of every prompt alike, and where they first did not."""
    differing = [prompt.id for prompt in prompts if plain[prompt.id] != speculative[prompt.id]]
    first = None
    if differing:
        first = _first_difference(differing[0], plain[differing[0]], speculative[differing[0]])
    return Losslessness("diverged" if differing else "lossless", len(prompts), len(prompts) - len(differing), first)


def _first_difference(name: str, plain: tuple[tuple[int, ...], ...], speculative: tuple[tuple[int, ...], ...]) -> str:
    turn, pair = next((t, pair) for t, pair in enumerate(zip(plain, speculative, strict=False)) if pair[0] != pair[1])
    one, other = pair
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"prompt {name}, " + (f"turn {turn + 1}, " if len(plain) > 1 else "") + f"token {at}"


def _decode_rate(engine: Engine, request: EngineRequest) -> tuple[float, SpeculationStats]:
    """Tokens per second after the first token (prefill is the same work for all), and counters."""
    started: float | None = None
    count = 0
    stats = SpeculationStats()
    for event in run_to_completion(engine, [request]):
        if started is None:
            started = time.perf_counter()
        else:
            count += len(event.token_ids)
        stats = event.stats
    elapsed = time.perf_counter() - started if started is not None else 0.0
    return (count / elapsed if count and elapsed > 0 else 1.0), stats


def _transformers_rates(bench: Bench, prompts: Sequence[EvaluationPrompt]) -> list[float]:
    """Tokens per second of ``transformers.generate``, prefill subtracted."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(bench.target.folder, dtype=bench.target.dtype)
    rates = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        times, lengths = [], []
        # One token costs the prefill; the rest is decoding.
        for limit in (1, bench.max_new_tokens):
            started = time.perf_counter()
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False, pad_token_id=0
            )
            times.append(time.perf_counter() - started)
            lengths.append(out.shape[1] - ids.shape[1])
        rates.append(max(1, lengths[1] - lengths[0]) / max(times[1] - times[0], 1e-9))
    return rates
