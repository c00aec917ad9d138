"""The gate: a written policy, judged by one pure function.

A draft becomes ``champion`` only when every rule holds. A figure that is
missing, not a number, or not checked fails its rule: the gate never gives the
benefit of the doubt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class DraftFile:
    """One file of a registered draft, as found.

    Attributes:
        path: In the version's folder.
        num_bytes: Its size.
        problem: What is wrong with its format; empty when it can be read.
    """

    path: str
    num_bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Standing:
    """What the registry says of a version beyond its figures.

    Attributes:
        files: Its draft's files.
        rolled_back: Why it was taken back once; empty if it never was.
    """

    files: Sequence[DraftFile]
    rolled_back: str = ""


def judge(
    policy: GateSpec,
    candidate: Mapping[str, Figures],
    calibration: Figures,
    champion: Mapping[str, Figures] | None,
    *,
    has_confidence_head: bool = True,
    standing: Standing | None = None,
) -> Verdict:
    """Judge a candidate draft.

    Args:
        policy: The rules' numbers.
        candidate: Evaluation outputs by suite.
        calibration: Outputs of the calibration step (``ece_after`` is read).
        champion: Evaluation outputs of the present champion, or ``None``.
        has_confidence_head: Without one there is no confidence to calibrate
            and the calibration rules do not apply.
        standing: Of the registered version; ``None`` asks about the figures
            alone, for a draft that is not registered.

    Returns:
        The verdict with every rule listed.
    """
    home = candidate.get(HOME_SUITE, {})
    reasons = [
        *_lossless_rules(policy, candidate),
        _at_least(f"accepted length on {HOME_SUITE}", _number(home.get("accepted_length")), policy.min_accepted_length),
        _speed_rule(policy, home),
        *_calibration_rules(policy, home, calibration, has_confidence_head),
        *_champion_rules(policy, candidate, champion),
        *(_standing_rules(policy, standing) if standing is not None else ()),
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


def _speed_rule(policy: GateSpec, home: Figures) -> Reason:
    """One request alone, or as many together as the draft is meant for: the gain shrinks with load."""
    rule = f"speed-up over plain decoding on {HOME_SUITE}"
    if policy.concurrency == 1:
        return _at_least(rule, _number(home.get("speedup_over_plain")), policy.min_speedup)
    rule += f", {policy.concurrency} requests together"
    found = home.get("by_concurrency")
    rows = [row for row in found if isinstance(row, Mapping)] if isinstance(found, list | tuple) else []
    measured = next((row for row in rows if row.get("concurrency") == policy.concurrency), None)
    if measured is None:
        return Reason(rule, False, "not measured at this load (evaluation.concurrencies)", _least(policy.min_speedup))
    return _at_least(rule, _number(measured.get("speedup_over_plain")), policy.min_speedup)


def _standing_rules(policy: GateSpec, standing: Standing) -> list[Reason]:
    problems = [f"{file.path}: {file.problem}" for file in standing.files if file.problem]
    got = "; ".join(problems) or (f"{len(standing.files)} files can be read" if standing.files else "no files")
    reasons = [Reason("formats of the draft's files", bool(standing.files) and not problems, got, "all readable")]
    total = sum(file.num_bytes for file in standing.files)
    most, rule = policy.max_draft_bytes, "size of the draft"
    if most is None:
        reasons.append(Reason(rule, total > 0, f"{total:,} bytes", "more than nothing"))
    else:
        reasons.append(Reason(rule, 0 < total <= most, f"{total:,} bytes", f"at most {most:,} bytes"))
    was = f"yes: {standing.rolled_back}" if standing.rolled_back else "never"
    reasons.append(Reason("taken back before", not standing.rolled_back, was, "never, or a promotion by force"))
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
    return Reason(rule, value >= least, _text(value), _least(least))


def _least(least: float) -> str:
    return f"at least {least:.3f}"


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
