"""The gate: a written policy, judged by one pure function.

A draft becomes ``champion`` only when every rule holds. A figure that is
missing, not a number, or not checked fails its rule: the gate never gives the
benefit of the doubt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from draftline.spec.models import GateSpec

HOME_SUITE = "held-out"

Figures = Mapping[str, Any]
"""Outputs of one evaluation or calibration step, as stored in JSON."""


@dataclass(frozen=True)
class Reason:
    """One rule and how it went.

    Attributes:
        rule: What was asked, for people.
        ok: Whether it holds.
        got: The figure found.
        needs: What would pass.
    """

    rule: str
    ok: bool
    got: str
    needs: str


@dataclass(frozen=True)
class Verdict:
    """The gate's answer.

    Attributes:
        passed: Whether every rule holds.
        reasons: Every rule, whether it holds or not, in a fixed order.
    """

    passed: bool
    reasons: tuple[Reason, ...]

    def to_document(self) -> dict[str, Any]:
        """Plain JSON form: ``{"passed", "reasons": [{"rule", "ok", "got", "needs"}]}``."""
        return {"passed": self.passed, "reasons": [asdict(reason) for reason in self.reasons]}


def judge(
    policy: GateSpec,
    candidate: Mapping[str, Figures],
    calibration: Figures,
    champion: Mapping[str, Figures] | None,
    *,
    has_confidence_head: bool = True,
) -> Verdict:
    """Judge a candidate draft.

    Args:
        policy: The rules' numbers.
        candidate: Evaluation outputs by suite.
        calibration: Outputs of the calibration step (``ece_after`` is read).
        champion: Evaluation outputs of the present champion, or ``None``.
        has_confidence_head: Without one there is no confidence to calibrate
            and the calibration rules do not apply.

    Returns:
        The verdict with every rule listed.
    """
    home = candidate.get(HOME_SUITE, {})
    reasons = [
        *_lossless_rules(policy, candidate),
        _at_least(f"accepted length on {HOME_SUITE}", _number(home.get("accepted_length")), policy.min_accepted_length),
        _at_least(
            f"speed-up over plain decoding on {HOME_SUITE}", _number(home.get("speedup_over_plain")), policy.min_speedup
        ),
        *_calibration_rules(policy, home, calibration, has_confidence_head),
        *_champion_rules(policy, candidate, champion),
    ]
    return Verdict(all(reason.ok for reason in reasons), tuple(reasons))


def describe_verdict(verdict: Verdict) -> str:
    """A short text for people, one rule a line."""
    head = "The gate passed" if verdict.passed else "The gate did not pass"
    lines = [f"{'ok  ' if r.ok else 'FAIL'}  {r.rule}: {r.got} (needs {r.needs})" for r in verdict.reasons]
    return "\n".join([head, *lines])


def _lossless_rules(policy: GateSpec, candidate: Mapping[str, Figures]) -> list[Reason]:
    """The home suite must be proven equal; no other suite may have diverged."""
    reasons = []
    for suite in sorted({HOME_SUITE, *candidate}, key=lambda name: (name != HOME_SUITE, name)):
        found = candidate.get(suite, {}).get("lossless") or {}
        verdict = found.get("verdict", "not-checked")
        compared, equal = _number(found.get("num_prompts")), _number(found.get("num_equal"))
        proven = verdict == "lossless" and compared >= 1 and equal == compared
        if suite == HOME_SUITE:
            needs, ok = "equal output for every prompt compared", proven
        else:
            needs, ok = "no difference where compared", proven or verdict == "not-checked"
        if not policy.require_lossless:
            needs, ok = "nothing (require_lossless is off)", True
        got = "not checked" if verdict == "not-checked" else f"{_text(equal, 0)} of {_text(compared, 0)} prompts equal"
        reasons.append(Reason(f"lossless on {suite}", ok, got, needs))
    return reasons


def _calibration_rules(
    policy: GateSpec, home: Figures, calibration: Figures, has_confidence_head: bool
) -> list[Reason]:
    figures = {
        f"calibration error on {HOME_SUITE}": _number(home.get("ece")),
        "calibration error on the calibration split (mean over positions)": _mean(calibration.get("ece_after")),
    }
    if not has_confidence_head:
        return [Reason(rule, True, "no confidence head", "nothing (no confidence head)") for rule in figures]
    return [
        Reason(rule, value <= policy.max_ece, _text(value), f"at most {policy.max_ece:.3f}")
        for rule, value in figures.items()
    ]


def _champion_rules(
    policy: GateSpec, candidate: Mapping[str, Figures], champion: Mapping[str, Figures] | None
) -> list[Reason]:
    if not champion:
        return [Reason("accepted length against the champion", True, "no champion to compare with", "nothing")]
    reasons = []
    for suite in sorted(champion):
        before = _number(champion[suite].get("accepted_length"))
        now = _number(candidate.get(suite, {}).get("accepted_length"))
        least = before * (1.0 - policy.max_drop)
        needs = f"at least {_text(least)} (champion {_text(before)}, at most {policy.max_drop:.0%} less)"
        reasons.append(Reason(f"accepted length on {suite} against the champion", now >= least, _text(now), needs))
    for suite in sorted(set(candidate) - set(champion)):
        rule = f"accepted length on {suite} against the champion"
        reasons.append(Reason(rule, True, "the champion was not measured on it", "nothing"))
    return reasons


def _at_least(rule: str, value: float, least: float) -> Reason:
    return Reason(rule, value >= least, _text(value), f"at least {least:.3f}")


def _number(value: object) -> float:
    """The figure, or NaN (which fails every comparison) for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def _mean(values: object) -> float:
    if not isinstance(values, list | tuple) or not values:
        return math.nan
    return sum(_number(value) for value in values) / len(values)


def _text(value: float, digits: int = 3) -> str:
    return "missing" if math.isnan(value) else f"{value:.{digits}f}"
