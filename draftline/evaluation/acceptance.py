"""What the target accepts when whole blocks are verified: lengths, positions, bytes, confidences.

Dimension letters: N verified blocks, B positions of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftline.calibration.measures import (
    ConfidenceMeasures,
    SweepPoint,
    measure_confidences,
    survival_events,
    sweep_thresholds,
)
from draftline.calibration.survival import Calibration
from draftline.engine.engine import Engine, StepTrace
from draftline.engine.requests import SpeculationStats
from draftline.evaluation.turns import AnsweredTurn, Decoding, EvaluationPrompt, answer_text, answer_turns
from draftline.target.load import Target

Report = Callable[[float], None]


@dataclass(frozen=True)
class Figures:
    """Acceptance over some answers.

    Attributes:
        num_prompts: Conversations.
        num_turns: Answers.
        num_tokens: Tokens generated.
        accepted_length: Tokens that the answers grew by per target step.
        bytes_per_call: UTF-8 bytes of text that the answers grew by per
            target step: comparable across tokenizers, special tokens are none.
        by_position: P(draft k accepted | the ones before were), whole blocks.
        survival: P(first k drafts accepted), whole blocks.
    """

    num_prompts: int
    num_turns: int
    num_tokens: int
    accepted_length: float
    bytes_per_call: float
    by_position: list[float]
    survival: list[float]

    def to_json(self) -> dict[str, Any]:
        """Plain mapping, in the names of the evaluation step's outputs."""
        return {
            "num_prompts": self.num_prompts,
            "num_turns": self.num_turns,
            "num_tokens": self.num_tokens,
            "accepted_length": self.accepted_length,
            "bytes_per_call": self.bytes_per_call,
            "acceptance_by_position": self.by_position,
            "survival_by_position": self.survival,
        }


@dataclass(frozen=True)
class Acceptance:
    """One suite at one temperature.

    Attributes:
        temperature: Of the requests.
        total: Over all answers.
        domains: By domain.
        num_dropped_turns: Later turns that did not fit the context.
        before: Raw confidences, ``None`` without a head or a whole block.
        after: The same after the calibration's map.
        sweep: What thresholds on the calibrated survival would do.
        turns: Every answer.
    """

    temperature: float
    total: Figures
    domains: Mapping[str, Figures]
    num_dropped_turns: int
    before: ConfidenceMeasures | None
    after: ConfidenceMeasures | None
    sweep: list[SweepPoint]
    turns: list[AnsweredTurn]

    @property
    def ece(self) -> float | None:
        """Calibration error of the cumulative survival after the calibration's map, mean over positions."""
        return float(np.mean(self.after.ece)) if self.after is not None else None

    def to_json(self) -> dict[str, Any]:
        """Plain mapping, in the names of the evaluation step's outputs."""
        confidence = None
        if self.before is not None and self.after is not None:
            confidence = {"before": self.before.to_json(), "after": self.after.to_json()}
        return {
            "temperature": self.temperature,
            **self.total.to_json(),
            "num_dropped_turns": self.num_dropped_turns,
            "ece": self.ece,
            "domains": {name: figures.to_json() for name, figures in self.domains.items()},
            "confidence": confidence,
            "threshold_sweep": [point.to_json() for point in self.sweep],
        }


def accept_whole_blocks(
    engine: Engine,
    target: Target,
    prompts: Sequence[EvaluationPrompt],
    decoding: Decoding,
    context: int,
    report: Report = lambda done: None,
) -> tuple[list[AnsweredTurn], list[StepTrace]]:
    """Decode all turns and record every step; ``report`` gets finished turns."""
    engine.traces = []
    turns = []
    for turn in answer_turns(engine, target, prompts, decoding, context):
        turns.append(turn)
        report(len(turns))
    return turns, engine.traces


def summarise(
    target: Target,
    turns: Sequence[AnsweredTurn],
    traces: Sequence[StepTrace],
    block_size: int,
    *,
    temperature: float,
    calibration: Calibration | None,
) -> Acceptance:
    """Figures of recorded answers.

    Args:
        target: Whose tokenizer turns tokens into text.
        turns: From :func:`accept_whole_blocks`.
        traces: Its steps; those that verified a whole block count for positions and confidences.
        block_size: B.
        temperature: That they were decoded at.
        calibration: Maps confidence logits to survival; ``None`` for a draft without confidences.
    """
    whole = [trace for trace in traces if trace.num_verified == block_size]
    domain_of = {turn.request_id: turn.prompt.domain for turn in turns}
    domains = {
        name: _figures(
            target,
            [turn for turn in turns if turn.prompt.domain == name],
            [trace for trace in whole if domain_of[trace.request_id] == name],
            block_size,
        )
        for name in sorted(set(domain_of.values()))
    }
    asked = {turn.prompt.id: turn.prompt.num_turns for turn in turns}
    before, after, sweep = _confidences(whole, block_size, calibration)
    total = _figures(target, turns, whole, block_size)
    return Acceptance(temperature, total, domains, sum(asked.values()) - len(turns), before, after, sweep, list(turns))


def text_bytes(target: Target, turn: AnsweredTurn) -> int:
    """UTF-8 bytes of an answer that its decode steps wrote; the first token came out of the prompt's forward."""
    whole, first = answer_text(target, turn.answer), answer_text(target, turn.answer[:1])
    return len(whole.encode()) - len(first.encode())


def _figures(target: Target, turns: Sequence[AnsweredTurn], whole: Sequence[StepTrace], block_size: int) -> Figures:
    stats = SpeculationStats()
    for turn in turns:
        stats.add(turn.stats)
    survival = [float(np.mean([t.num_accepted > k for t in whole])) if whole else 0.0 for k in range(block_size)]
    written = sum(text_bytes(target, turn) for turn in turns)
    return Figures(
        num_prompts=len({turn.prompt.id for turn in turns}),
        num_turns=len(turns),
        num_tokens=sum(len(turn.answer) for turn in turns),
        accepted_length=stats.tokens_per_step,
        bytes_per_call=written / stats.num_steps if stats.num_steps else 0.0,
        by_position=[s / p if p else 0.0 for s, p in zip(survival, [1.0, *survival[:-1]], strict=True)],
        survival=survival,
    )


def _confidences(
    whole: Sequence[StepTrace], block_size: int, calibration: Calibration | None
) -> tuple[ConfidenceMeasures | None, ConfidenceMeasures | None, list[SweepPoint]]:
    if not whole or calibration is None:
        return None, None, []
    logits_NB = np.array([trace.confidence_B for trace in whole], dtype=np.float64)
    accepted = [trace.num_accepted for trace in whole]
    events_NB = survival_events(accepted, block_size)
    raw_NB = Calibration.identity(block_size).survival(logits_NB)
    scaled_NB = calibration.survival(logits_NB)
    return (
        measure_confidences(raw_NB, events_NB),
        measure_confidences(scaled_NB, events_NB),
        sweep_thresholds(scaled_NB, accepted),
    )
