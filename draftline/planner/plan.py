"""A plan: bytes, GPU-hours and money of a run, from its spec and a few assumptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from draftline.errors import SpecError
from draftline.planner.cache import CODECS, REFERENCE, bytes_per_token, cache_bytes
from draftline.planner.hardware import HardwareProfile
from draftline.planner.operations import DraftFacts, target_forward, training_step
from draftline.planner.targets import TargetFacts
from draftline.spec import RunSpec

_GB = 1e9
_HOURS_PER_DAY = 24

SHOWN_CODECS = ("bf16", "fp8", "int4", REFERENCE)
"""Codecs that every plan compares, beside the spec's own."""


@dataclass(frozen=True)
class Corpus:
    """What is trained on.

    Attributes:
        num_samples: Conversations.
        tokens_per_sample: On average, prompt and answer.
        answer_share: Share of the tokens that the target answers.
    """

    num_samples: int
    tokens_per_sample: float
    answer_share: float = 1.0

    @property
    def num_tokens(self) -> float:
        """Tokens in all."""
        return self.num_samples * self.tokens_per_sample


@dataclass(frozen=True)
class Prices:
    """What things cost; any currency, the same for all.

    Attributes:
        gpu_hour: One GPU for an hour, of the kind in the hardware profile.
        storage_gb_month: One GB (1e9 bytes) in the object store for a month.
        storage_months: How long the cache is kept.
    """

    gpu_hour: float = 2.5
    storage_gb_month: float = 0.023
    storage_months: float = 1.0


@dataclass(frozen=True)
class Serving:
    """The deployment that the draft makes faster.

    Attributes:
        num_gpus: GPUs that serve the target today, at the price of :class:`Prices`.
        speedup: Expected work per GPU-hour with the draft over that without it.
    """

    num_gpus: float = 8.0
    speedup: float = 1.5


@dataclass(frozen=True)
class Throughput:
    """Measured tokens per second of one GPU, in place of counted operations; ``None`` where nothing was measured.

    Attributes:
        answer: Answer tokens generated.
        capture: Tokens captured.
        train: Tokens of samples passed through training (each epoch counts).
    """

    answer: float | None = None
    capture: float | None = None
    train: float | None = None


@dataclass(frozen=True)
class Assumptions:
    """All that a plan assumes beside the spec.

    Attributes:
        corpus: Samples and their length.
        hardware: The GPU.
        prices: Money.
        serving: What the draft will speed up.
        measured: Throughput known from an earlier run.
    """

    corpus: Corpus
    hardware: HardwareProfile
    prices: Prices = Prices()
    serving: Serving = Serving()
    measured: Throughput = Throughput()


@dataclass(frozen=True)
class CacheLine:
    """Size of the cache under one codec.

    Attributes:
        codec: Its name.
        token_bytes: Of one token.
        total_bytes: Of the corpus.
        share: Of the reference's layout.
        cost: Of keeping it.
    """

    codec: str
    token_bytes: float
    total_bytes: float
    share: float
    cost: float


@dataclass(frozen=True)
class WorkLine:
    """Work of one step.

    Attributes:
        step: Its name.
        operations: Floating-point operations; 0 where a measured throughput replaces them.
        gpu_hours: Of one GPU of the profile.
        cost: At the price of a GPU-hour.
        basis: Where the hours come from.
    """

    step: str
    operations: float
    gpu_hours: float
    cost: float
    basis: str


@dataclass(frozen=True)
class Plan:
    """See :func:`make_plan`.

    Attributes:
        target: Name of the target.
        num_parameters: Of the target.
        num_taps: Tapped layers.
        codec: The spec's codec; ``None`` where it keeps no cache (mode ``stream``).
        epochs: Passes over the corpus.
        assumptions: What was assumed.
        cache: One line per codec, and the reference's layout.
        work: One line per step.
        cache_cost: Of the spec's codec.
        total_cost: Work and cache.
        saving_per_day: Of the deployment.
        payback_days: Until the saving has paid the total; ``None`` when nothing is saved.
    """

    target: str
    num_parameters: int
    num_taps: int
    codec: str | None
    epochs: float
    assumptions: Assumptions
    cache: tuple[CacheLine, ...]
    work: tuple[WorkLine, ...]
    cache_cost: float
    total_cost: float
    saving_per_day: float
    payback_days: float | None

    @property
    def gpu_hours(self) -> float:
        """Of all steps."""
        return sum(line.gpu_hours for line in self.work)


def make_plan(spec: RunSpec, target: TargetFacts, assumptions: Assumptions) -> Plan:
    """Count bytes, hours and money of a run.

    Args:
        spec: The run.
        target: Facts of its target.
        assumptions: Corpus, hardware, prices, deployment.

    Raises:
        SpecError: an assumption is impossible.
    """
    _check(assumptions)
    num_taps = len(spec.draft.target_layer_ids) if spec.draft.target_layer_ids is not None else spec.draft.num_taps
    codecs = [codec for codec in CODECS if codec in SHOWN_CODECS or codec == spec.cache.codec]
    cache = _cache_lines(codecs, num_taps, target.hidden_size, assumptions)
    epochs = _epochs(spec, assumptions.corpus)
    work = _work_lines(spec, target, num_taps, epochs, assumptions)
    is_stored = spec.cache.mode == "store"
    cache_cost = next(line.cost for line in cache if line.codec == spec.cache.codec) if is_stored else 0.0
    total = sum(line.cost for line in work) + cache_cost
    serving = assumptions.serving
    saving = serving.num_gpus * (1 - 1 / serving.speedup) * _HOURS_PER_DAY * assumptions.prices.gpu_hour
    return Plan(
        target=target.name,
        num_parameters=target.num_parameters,
        num_taps=num_taps,
        codec=spec.cache.codec if is_stored else None,
        epochs=epochs,
        assumptions=assumptions,
        cache=cache,
        work=work,
        cache_cost=cache_cost,
        total_cost=total,
        saving_per_day=saving,
        payback_days=total / saving if saving > 0 else None,
    )


def _cache_lines(
    codecs: Sequence[str], num_taps: int, hidden_size: int, assumptions: Assumptions
) -> tuple[CacheLine, ...]:
    corpus, prices = assumptions.corpus, assumptions.prices
    token_bytes = {codec: bytes_per_token(codec, num_taps, hidden_size, corpus.answer_share) for codec in codecs}
    sizes = {codec: cache_bytes(codec, corpus.num_samples, corpus.num_tokens, token_bytes[codec]) for codec in codecs}
    return tuple(
        CacheLine(
            codec=codec,
            token_bytes=token_bytes[codec],
            total_bytes=size,
            share=size / sizes[REFERENCE],
            cost=size / _GB * prices.storage_gb_month * prices.storage_months,
        )
        for codec, size in sizes.items()
    )


def _work_lines(
    spec: RunSpec, target: TargetFacts, num_taps: int, epochs: float, assumptions: Assumptions
) -> tuple[WorkLine, ...]:
    corpus, hardware, measured = assumptions.corpus, assumptions.hardware, assumptions.measured
    length = corpus.tokens_per_sample
    draft = DraftFacts(
        num_layers=spec.draft.num_layers,
        num_taps=num_taps,
        block_size=spec.draft.block_size,
        vocab_size=spec.draft.vocab_size or target.vocab_size,
        markov_rank=spec.draft.markov_rank,
        # A sample has no more anchors than tokens.
        anchors_per_sample=min(spec.train.anchors_per_sample, int(length)),
        ttt_length=spec.draft.ttt_length if spec.draft.algorithm == "eagle3" else 0,
    )
    passes, answered = epochs * corpus.num_samples, corpus.num_tokens * corpus.answer_share
    # Without a cache, hidden states are captured anew in every epoch.
    captured = corpus.num_tokens * (1 if spec.cache.mode == "store" else math.ceil(epochs))
    steps = (
        (
            "responses",
            target_forward(target, answered, length, head_share=1.0),
            hardware.decode_utilisation,
            answered,
            measured.answer,
        ),
        (
            "hidden-states",
            target_forward(target, captured, length, head_share=corpus.answer_share),
            hardware.capture_utilisation,
            captured,
            measured.capture,
        ),
        (
            "draft",
            passes * training_step(target, draft, length),
            hardware.train_utilisation,
            passes * length,
            measured.train,
        ),
    )
    lines = []
    for step, operations, utilisation, tokens, tokens_per_s in steps:
        if tokens_per_s is None:
            hours = hardware.hours(operations, utilisation)
            basis = f"{operations:.2e} operations at {utilisation:.0%} of {hardware.peak_tflops:g} TFLOPS"
        else:
            hours, basis = tokens / tokens_per_s / 3600, f"{tokens:.2e} tokens at {tokens_per_s:g}/s, measured"
        cost = hours * assumptions.prices.gpu_hour
        lines.append(WorkLine(step, operations if tokens_per_s is None else 0.0, hours, cost, basis))
    return tuple(lines)


def _epochs(spec: RunSpec, corpus: Corpus) -> float:
    if spec.train.epochs is not None:
        return spec.train.epochs
    return spec.train.steps * spec.train.samples_per_step / corpus.num_samples


def _check(assumptions: Assumptions) -> None:
    corpus, prices, serving, measured = (
        assumptions.corpus,
        assumptions.prices,
        assumptions.serving,
        assumptions.measured,
    )
    positive = {
        "samples": corpus.num_samples,
        "tokens per sample": corpus.tokens_per_sample,
        "answer share": corpus.answer_share,
        "speedup": serving.speedup,
        "answer tokens/s": measured.answer,
        "capture tokens/s": measured.capture,
        "train tokens/s": measured.train,
    }
    at_least_zero = {
        "GPU-hour price": prices.gpu_hour,
        "storage price": prices.storage_gb_month,
        "storage months": prices.storage_months,
        "serving GPUs": serving.num_gpus,
    }
    for name, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            raise SpecError(f"cannot plan with {name}={value:g}", expected="a number above 0")
    if corpus.answer_share > 1:
        raise SpecError(f"cannot plan with answer share={corpus.answer_share:g}", expected="a share of at most 1")
    for name, value in at_least_zero.items():
        if not 0 <= value < float("inf"):
            raise SpecError(f"cannot plan with {name}={value:g}", expected="a number of at least 0")
