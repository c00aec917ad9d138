"""One table for several ways of decoding: same prompts, same lengths, alternating runs.

A contender is a function that makes a fresh engine; whatever drafts for it is
its own affair. One of them decodes without speculation and is the measure of
the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from draftline.engine.engine import Engine, StepTrace
from draftline.engine.requests import SpeculationStats
from draftline.errors import InputError
from draftline.evaluation.acceptance import accept_whole_blocks, text_bytes
from draftline.evaluation.measure import (
    SLOTS,
    Losslessness,
    compare_answers,
    greedy_answers,
    time_alternately,
)
from draftline.evaluation.turns import AnsweredTurn, Decoding, EvaluationPrompt, context_for
from draftline.prompts.spread import even_spread
from draftline.target.load import Target

PLAIN = "no speculation"
"""Name of the contender that the others are compared with."""

EngineFactory = Callable[[int, int], Engine]
"""Makes a fresh engine for so many slots and so much context, its draft (if any) already in it."""

Progress = Callable[[str, float], None]

_Recorded = tuple[list[AnsweredTurn], list[StepTrace]]


@dataclass(frozen=True)
class BaselineSettings:
    """How contenders are measured.

    Attributes:
        max_new_tokens: Per turn.
        max_context: No conversation may grow beyond.
        temperatures: Acceptance is measured at each.
        timing_temperature: Of the timed runs.
        timing_prompts: Turns timed on every contender.
        lossless_prompts: Prompts whose greedy answers are compared, 0 for none.
        seed: Of sampled requests.
    """

    max_new_tokens: int
    max_context: int
    temperatures: tuple[float, ...] = (0.0, 1.0)
    timing_temperature: float = 0.0
    timing_prompts: int = 8
    lossless_prompts: int = 16
    seed: int = 0


@dataclass(frozen=True)
class ContenderFigures:
    """One row of the table.

    Attributes:
        accepted_length: By temperature, in the settings' order: tokens per
            target step, steps without a draft included.
        bytes_per_call: By temperature: UTF-8 bytes of text per target step.
        acceptance_by_position: At the first temperature: P(draft k accepted |
            it was verified and the ones before were accepted).
        tokens_per_s: One request at a time, median over turns.
        speedup: Over no speculation, median of per-turn ratios.
        lossless: Greedy answers against those without speculation.
    """

    accepted_length: tuple[float, ...]
    bytes_per_call: tuple[float, ...]
    acceptance_by_position: tuple[float, ...]
    tokens_per_s: float
    speedup: float
    lossless: Losslessness


@dataclass(frozen=True)
class BaselineTable:
    """All contenders on one set of prompts.

    Attributes:
        settings: As measured.
        num_prompts: Prompts of the acceptance runs.
        num_timed: Turns timed.
        rows: By contender, in the order given.
    """

    settings: BaselineSettings
    num_prompts: int
    num_timed: int
    rows: Mapping[str, ContenderFigures]

    def to_json(self) -> dict[str, Any]:
        """Plain mapping."""
        return {
            "settings": {**asdict(self.settings), "temperatures": list(self.settings.temperatures)},
            "num_prompts": self.num_prompts,
            "num_timed": self.num_timed,
            "contenders": {
                name: {
                    **asdict(row),
                    "accepted_length": list(row.accepted_length),
                    "bytes_per_call": list(row.bytes_per_call),
                    "acceptance_by_position": list(row.acceptance_by_position),
                }
                for name, row in self.rows.items()
            },
        }

    def to_markdown(self) -> str:
        """The table for people, one row a contender."""
        temperatures = self.settings.temperatures
        header = ["", *(f"accepted length, T={t:g}" for t in temperatures), f"bytes per call, T={temperatures[0]:g}"]
        header += ["tokens/s", "over no speculation", "greedy output equal"]
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        for name, row in self.rows.items():
            equal = f"{row.lossless.num_equal} of {row.lossless.num_prompts}"
            lines.append(
                [
                    name,
                    *(f"{value:.2f}" for value in row.accepted_length),
                    f"{row.bytes_per_call[0]:.1f}",
                    f"{row.tokens_per_s:.1f}",
                    f"{row.speedup:.2f}x",
                    "not checked" if row.lossless.verdict == "not-checked" else equal,
                ]
            )
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def measure_baselines(
    target: Target,
    contenders: Mapping[str, EngineFactory],
    prompts: Sequence[EvaluationPrompt],
    settings: BaselineSettings,
    *,
    exact: tuple[Target, Mapping[str, EngineFactory]] | None = None,
    on_progress: Progress = lambda what, done: None,
) -> BaselineTable:
    """Measure every contender on the same prompts.

    Accepted length is counted over all decode steps of a batched run; speed
    one request at a time, the contenders taking turns on every prompt in an
    order that shifts; losslessness against the greedy answers of
    :data:`PLAIN`.

    Args:
        target: That all of them decode for.
        contenders: By name; one is :data:`PLAIN`. Engines verify whatever
            their policy says: give all the same one, or each its best.
        prompts: Any number of turns each; they must fit the context.
        settings: Lengths and laws.
        exact: An fp32 copy of the target and the same contenders on it, for
            losslessness. In bf16 near-ties flip without a draft too, so
            without it the comparison says what this machine's arithmetic does.
        on_progress: Called with what is measured and finished prompts of it.

    Raises:
        InputError: no contender decodes without speculation, or there is no prompt.
    """
    if PLAIN not in contenders:
        raise InputError(
            "nothing to compare the contenders with", got=sorted(contenders), expected=f"one named {PLAIN!r}"
        )
    if not prompts:
        raise InputError("there is no prompt to compare the contenders on", expected="at least one")
    context = context_for(target, prompts, settings.max_new_tokens, settings.max_context)

    def recorded(name: str, make: EngineFactory, temperature: float) -> _Recorded:
        what = f"{name}, temperature {temperature:g}"
        decoding = Decoding(settings.max_new_tokens, temperature, settings.seed)
        engine = make(SLOTS, context)
        return accept_whole_blocks(engine, target, prompts, decoding, context, lambda done: on_progress(what, done))

    accepted = {
        name: [recorded(name, make, temperature) for temperature in settings.temperatures]
        for name, make in contenders.items()
    }
    turns = sorted(accepted[PLAIN][0][0], key=lambda turn: (turn.number, turn.turn))
    timed = even_spread([turn.as_prompt() for turn in turns], settings.timing_prompts)
    rates = _rates(contenders, timed, settings, on_progress)
    lossless = _losslessness(exact or (target, contenders), prompts, settings, on_progress)
    rows = {
        name: ContenderFigures(
            accepted_length=tuple(_stats(turns).tokens_per_step for turns, _ in accepted[name]),
            bytes_per_call=tuple(_bytes_per_call(target, turns) for turns, _ in accepted[name]),
            acceptance_by_position=acceptance_by_position(accepted[name][0][1]),
            tokens_per_s=statistics.median(rates[name]),
            speedup=statistics.median(own / plain for own, plain in zip(rates[name], rates[PLAIN], strict=True)),
            lossless=lossless[name],
        )
        for name in contenders
    }
    return BaselineTable(settings, len(prompts), len(timed), rows)


def acceptance_by_position(traces: Sequence[StepTrace]) -> tuple[float, ...]:
    """P(draft k accepted | verified, and the ones before accepted), also where blocks differ in length."""
    shares = []
    for k in range(max((trace.num_verified for trace in traces), default=0)):
        reached = [trace for trace in traces if trace.num_verified > k and trace.num_accepted >= k]
        shares.append(sum(trace.num_accepted > k for trace in reached) / len(reached) if reached else 0.0)
    return tuple(shares)


def _rates(
    contenders: Mapping[str, EngineFactory],
    timed: Sequence[EvaluationPrompt],
    settings: BaselineSettings,
    on_progress: Progress,
) -> dict[str, list[float]]:
    context = max(len(prompt.ids) for prompt in timed) + settings.max_new_tokens
    engines = {name: make(1, context) for name, make in contenders.items()}
    decoding = Decoding(settings.max_new_tokens, settings.timing_temperature, settings.seed)
    rates, _ = time_alternately(engines, timed, decoding, lambda done: on_progress("speed", done))
    return rates


def _losslessness(
    exact: tuple[Target, Mapping[str, EngineFactory]],
    prompts: Sequence[EvaluationPrompt],
    settings: BaselineSettings,
    on_progress: Progress,
) -> dict[str, Losslessness]:
    target, contenders = exact
    if settings.lossless_prompts == 0:
        return dict.fromkeys(contenders, Losslessness("not-checked"))
    chosen = even_spread(prompts, settings.lossless_prompts)
    context = context_for(target, chosen, settings.max_new_tokens, settings.max_context)
    answers = {}
    for name, make in contenders.items():
        answers[name] = greedy_answers(make(SLOTS, context), target, chosen, settings.max_new_tokens, context)
        on_progress(f"{name}, losslessness", len(chosen))
    return {name: compare_answers(chosen, answers[PLAIN], answers[name]) for name in contenders}


def _stats(turns: Sequence[AnsweredTurn]) -> SpeculationStats:
    total = SpeculationStats()
    for turn in turns:
        total.add(turn.stats)
    return total


def _bytes_per_call(target: Target, turns: Sequence[AnsweredTurn]) -> float:
    steps = _stats(turns).num_steps
    return sum(text_bytes(target, turn) for turn in turns) / steps if steps else 0.0
