"""Measure one suite: accepted length online, speed in alternating runs, losslessness.

All figures come from the engine decoding for real. Accepted length is counted
with whole blocks verified (the paper's tau, bonus token included); speed is
measured under the serving policy, one request at a time, plain and
speculative in turn on every prompt, because machines drift.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftline.calibration.fit import expected_calibration_error, survival_events
from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import DraftModel
from draftline.engine.build import run_to_completion
from draftline.engine.engine import Engine, EngineLimits, StepTrace
from draftline.engine.policy import FixedPolicy, LengthPolicy, OffPolicy
from draftline.engine.requests import EngineRequest, SamplingParams, SpeculationStats
from draftline.target.load import Target

_SLOTS = 8
Report = Callable[[float], None]


@dataclass(frozen=True)
class EvaluationPrompt:
    """A tokenised prompt."""

    id: str
    domain: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Acceptance:
    """What whole-block verification accepted.

    Attributes:
        accepted_length: Tokens that the answers grew by per target step.
        by_position: P(draft k accepted | the ones before were).
        survival: P(first k drafts accepted).
        domains: Accepted length by domain.
        ece: Calibration error of the cumulative survival, mean over positions;
            NaN without a confidence head.
        num_tokens: Tokens generated.
    """

    accepted_length: float
    by_position: list[float]
    survival: list[float]
    domains: dict[str, float]
    ece: float
    num_tokens: int


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
        max_new_tokens: Per prompt.
        temperature: Of acceptance and timing.
        seed: Of sampled requests.
    """

    target: Target
    draft: DraftModel
    calibration: Calibration
    policy: LengthPolicy
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def engine(self, policy: LengthPolicy, slots: int, context: int, *, keep_traces: bool = False) -> Engine:
        """A fresh engine; with the draft unless the policy is off."""
        engine = Engine(
            self.target, EngineLimits(slots, context), policy, calibration=self.calibration, keep_traces=keep_traces
        )
        if policy.wants_draft:
            engine.swap_draft(self.draft)
        return engine

    def request(self, prompt: EvaluationPrompt, number: int, max_new_tokens: int | None = None) -> EngineRequest:
        """The request of one prompt."""
        limit = max_new_tokens or self.max_new_tokens
        return EngineRequest(prompt.id, prompt.ids, SamplingParams(limit, self.temperature, seed=self.seed + number))


def measure_acceptance(bench: Bench, prompts: Sequence[EvaluationPrompt], report: Report) -> Acceptance:
    """Decode all prompts with whole blocks and count; ``report`` gets finished prompts."""
    context = max(len(p.ids) for p in prompts) + bench.max_new_tokens
    engine = bench.engine(FixedPolicy(), _SLOTS, context, keep_traces=True)
    domain_of = {p.id: p.domain for p in prompts}
    total, domains = SpeculationStats(), dict[str, SpeculationStats]()
    num_tokens = finished = 0
    for event in run_to_completion(engine, [bench.request(p, i) for i, p in enumerate(prompts)]):
        num_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            finished += 1
            report(finished)
            total.add(event.stats)
            domains.setdefault(domain_of[event.request_id], SpeculationStats()).add(event.stats)
    block = bench.draft.config.block_size
    whole = [t for t in engine.traces or [] if t.num_verified == block]
    survival = [float(np.mean([t.num_accepted > k for t in whole])) if whole else 0.0 for k in range(block)]
    by_position = [s / p if p else 0.0 for s, p in zip(survival, [1.0, *survival[:-1]], strict=True)]
    return Acceptance(
        accepted_length=total.tokens_per_step,
        by_position=by_position,
        survival=survival,
        domains={name: stats.tokens_per_step for name, stats in sorted(domains.items())},
        ece=_calibration_error(bench, whole),
        num_tokens=num_tokens,
    )


def measure_speed(bench: Bench, prompts: Sequence[EvaluationPrompt], num_hf_prompts: int, report: Report) -> Timing:
    """Time prompts one at a time, plain and speculative in turn."""
    context = max(len(p.ids) for p in prompts) + bench.max_new_tokens
    plain, speculative = bench.engine(OffPolicy(), 1, context), bench.engine(bench.policy, 1, context)
    for engine in (plain, speculative):
        list(run_to_completion(engine, [bench.request(prompts[0], 0, 8)]))
    rates: dict[str, list[float]] = {"plain": [], "speculative": []}
    stats = SpeculationStats()
    for number, prompt in enumerate(prompts):
        order = [("plain", plain), ("speculative", speculative)]
        for name, engine in order if number % 2 == 0 else reversed(order):
            rate, one = _decode_rate(engine, bench.request(prompt, number))
            rates[name].append(rate)
            if name == "speculative":
                stats.add(one)
        report(number + 1)
    over_plain = statistics.median(s / p for s, p in zip(rates["speculative"], rates["plain"], strict=True))
    over_hf: float | None = None
    if num_hf_prompts:
        rates["transformers"] = _transformers_rates(bench, prompts[:num_hf_prompts])
        over_hf = statistics.median(s / h for s, h in zip(rates["speculative"], rates["transformers"], strict=False))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return Timing(medians, over_plain, over_hf, stats.tokens_per_step)


def compare_greedy(
    bench: Bench, prompts: Sequence[EvaluationPrompt], max_new_tokens: int, report: Report
) -> Losslessness:
    """Token-for-token comparison of speculative and plain greedy decoding.

    Meant for an fp32 target: there both must be equal. In bf16 a one-token and
    an eight-token product round differently, and near-ties flip even without
    a draft.
    """
    outputs: list[dict[str, tuple[int, ...]]] = []
    context = max(len(p.ids) for p in prompts) + max_new_tokens
    policies: tuple[LengthPolicy, ...] = (OffPolicy(), FixedPolicy())
    for part, policy in enumerate(policies):
        engine = bench.engine(policy, _SLOTS, context)
        tokens: dict[str, list[int]] = {}
        finished = 0
        requests = [EngineRequest(p.id, p.ids, SamplingParams(max_new_tokens, 0.0)) for p in prompts]
        for event in run_to_completion(engine, requests):
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish_reason is not None:
                finished += 1
                report((part + finished / len(prompts)) / 2 * len(prompts))
        outputs.append({name: tuple(ids) for name, ids in tokens.items()})
    plain, speculative = outputs
    differing = [p.id for p in prompts if plain[p.id] != speculative[p.id]]
    first = None
    if differing:
        name = differing[0]
        pairs = zip(plain[name], speculative[name], strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain[name]), len(speculative[name])))
        first = f"prompt {name}, token {at}"
    return Losslessness("diverged" if differing else "lossless", len(prompts), len(prompts) - len(differing), first)


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


def _calibration_error(bench: Bench, whole: Sequence[StepTrace]) -> float:
    if not whole or not bench.draft.config.enable_confidence_head:
        return float("nan")
    block = bench.draft.config.block_size
    survival = bench.calibration.survival(np.array([t.confidence_B for t in whole], dtype=np.float64))
    events = survival_events([t.num_accepted for t in whole], block)
    return float(np.mean([expected_calibration_error(survival[:, k], events[:, k]) for k in range(block)]))
