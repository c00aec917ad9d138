"""The gate's policy: what passes, what fails, and that worse is never better."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftline.gate import DraftFile, Standing, Verdict, describe_verdict, judge
from draftline.spec import GateSpec
from tests.report.examples import calibration_outputs, evaluation_outputs

POLICY = GateSpec()
SUITE_NAMES = ("held-out", "humaneval")


def suites(**figures: Any) -> dict[str, dict[str, Any]]:
    return {name: evaluation_outputs(name) | figures for name in SUITE_NAMES}


def failed(verdict: Verdict) -> list[str]:
    return [reason.rule for reason in verdict.reasons if not reason.ok]


def test_good_draft_passes_with_every_rule_listed() -> None:
    verdict = judge(POLICY, suites(), calibration_outputs(), None)
    assert verdict.passed
    assert [reason.rule for reason in verdict.reasons] == [
        "lossless on held-out",
        "lossless on humaneval",
        "accepted length on held-out",
        "speed-up over plain decoding on held-out",
        "calibration error on held-out",
        "calibration error on the calibration split (mean over positions)",
        "accepted length against the champion",
    ]
    assert "ok    accepted length on held-out: 2.600 (needs at least 1.500)" in describe_verdict(verdict)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"accepted_length": 1.49}, "accepted length on held-out"),
        ({"speedup_over_plain": 0.99}, "speed-up over plain decoding on held-out"),
        ({"ece": 0.151}, "calibration error on held-out"),
        ({"lossless": {"verdict": "diverged", "num_prompts": 50, "num_equal": 49}}, "lossless on held-out"),
        ({"lossless": {"verdict": "not-checked", "num_prompts": 0, "num_equal": 0}}, "lossless on held-out"),
        ({"lossless": {"verdict": "lossless", "num_prompts": 50, "num_equal": 49}}, "lossless on held-out"),
        ({"lossless": {"verdict": "lossless", "num_prompts": 0, "num_equal": 0}}, "lossless on held-out"),
        ({"lossless": None}, "lossless on held-out"),
        *(
            ({figure: value}, rule)
            for figure, rule in (
                ("accepted_length", "accepted length on held-out"),
                ("speedup_over_plain", "speed-up over plain decoding on held-out"),
                ("ece", "calibration error on held-out"),
            )
            for value in (None, math.nan, math.inf, "2.6", True)
        ),
    ],
)
def test_each_rule_fails_alone(change: dict[str, Any], rule: str) -> None:
    candidate = suites()
    candidate["held-out"] |= change
    assert failed(judge(POLICY, candidate, calibration_outputs(), None)) == [rule]


def test_boundary_values_pass() -> None:
    candidate = suites(accepted_length=1.5, speedup_over_plain=1.0, ece=0.15)
    assert judge(POLICY, candidate, {"ece_after": [0.15]}, None).passed


@pytest.mark.parametrize("ece_after", [None, [], [0.01, None], [0.01, math.nan], [0.4, 0.01], "0.1"])
def test_calibration_must_be_there_and_small(ece_after: object) -> None:
    verdict = judge(POLICY, suites(), {"ece_after": ece_after}, None)
    assert failed(verdict) == ["calibration error on the calibration split (mean over positions)"]


def test_without_a_confidence_head_calibration_does_not_apply() -> None:
    verdict = judge(POLICY, suites(ece=None), {"ece_after": []}, None, has_confidence_head=False)
    assert verdict.passed
    assert not judge(POLICY, suites(ece=None), {"ece_after": []}, None).passed


def test_other_suites_need_not_be_checked_but_must_not_diverge() -> None:
    candidate = suites()
    candidate["humaneval"]["lossless"] = {"verdict": "not-checked", "num_prompts": 0, "num_equal": 0}
    assert judge(POLICY, candidate, calibration_outputs(), None).passed
    candidate["humaneval"]["lossless"] = {"verdict": "diverged", "num_prompts": 50, "num_equal": 49}
    assert failed(judge(POLICY, candidate, calibration_outputs(), None)) == ["lossless on humaneval"]


def test_losslessness_can_be_waived_in_writing() -> None:
    candidate = suites(lossless={"verdict": "not-checked", "num_prompts": 0, "num_equal": 0})
    verdict = judge(GateSpec(require_lossless=False), candidate, calibration_outputs(), None)
    assert verdict.passed
    assert verdict.reasons[0].needs == "nothing (require_lossless is off)"


def test_no_evaluation_at_all_fails_everything() -> None:
    verdict = judge(POLICY, {}, {}, None)
    assert len(failed(verdict)) == 5


@pytest.mark.parametrize(("now", "ok"), [(2.48, True), (2.46, False)])
def test_champion_may_be_missed_by_five_percent(now: float, ok: bool) -> None:
    candidate = suites()
    candidate["humaneval"]["accepted_length"] = now
    verdict = judge(POLICY, candidate, calibration_outputs(), suites())
    assert verdict.passed is ok
    assert failed(verdict) == ([] if ok else ["accepted length on humaneval against the champion"])


def test_suite_that_the_champion_has_must_be_measured() -> None:
    candidate = {"held-out": evaluation_outputs("held-out")}
    assert failed(judge(POLICY, candidate, calibration_outputs(), suites())) == [
        "accepted length on humaneval against the champion"
    ]
    champion = {"held-out": evaluation_outputs("held-out")}
    assert judge(POLICY, suites(), calibration_outputs(), champion).passed


def test_champion_without_a_figure_does_not_let_anything_past() -> None:
    assert not judge(POLICY, suites(), calibration_outputs(), suites(accepted_length=None)).passed


numbers = st.floats(min_value=0.0, max_value=4.0)
errors = st.floats(min_value=0.0, max_value=0.5)


@st.composite
def evaluated(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    compared = draw(st.integers(0, 3))
    found = {}
    for name in SUITE_NAMES:
        equal = draw(st.integers(0, compared))
        verdict = "not-checked" if not compared else "lossless" if equal == compared else "diverged"
        found[name] = {
            "accepted_length": draw(numbers),
            "speedup_over_plain": draw(numbers),
            "ece": draw(errors),
            "lossless": {"verdict": verdict, "num_prompts": compared, "num_equal": equal},
        }
    return found


WORSE = {
    "accepted_length": lambda value, amount: value - amount,
    "speedup_over_plain": lambda value, amount: value - amount,
    "ece": lambda value, amount: value + amount,
}
LOSSLESS_WORSE = {"lossless": "diverged", "diverged": "diverged", "not-checked": "diverged"}


@settings(deadline=None)
@given(
    evaluated(),
    st.lists(errors, min_size=1, max_size=4),
    st.none() | evaluated(),
    st.sampled_from(SUITE_NAMES),
    st.sampled_from([*WORSE, "lossless", "ece_after"]),
    st.sampled_from(["amount", "missing", "nan"]),
    st.floats(min_value=0.0, max_value=3.0),
)
def test_worse_never_turns_fail_into_pass(
    candidate: dict[str, dict[str, Any]],
    ece_after: list[float],
    champion: dict[str, dict[str, Any]] | None,
    suite: str,
    figure: str,
    how: str,
    amount: float,
) -> None:
    worse = copy.deepcopy(candidate)
    worse_ece: list[float | None] = list(ece_after)
    replacement = {"missing": None, "nan": math.nan}
    if figure == "ece_after":
        worse_ece[0] = replacement[how] if how in replacement else ece_after[0] + amount
    elif figure == "lossless":
        found = worse[suite]["lossless"]
        found["verdict"] = LOSSLESS_WORSE[found["verdict"]]
        found["num_equal"] = max(0, found["num_equal"] - 1)
    elif how in replacement:
        worse[suite][figure] = replacement[how]
    else:
        worse[suite][figure] = WORSE[figure](worse[suite][figure], amount)
    policy = GateSpec(min_accepted_length=1.0, min_speedup=0.2, max_ece=0.4, max_drop=0.5)
    before = judge(policy, candidate, {"ece_after": ece_after}, champion)
    after = judge(policy, worse, {"ece_after": worse_ece}, champion)
    assert before.passed or not after.passed
    # Rule by rule too, so that no rule makes up for another.
    was = {reason.rule: reason.ok for reason in before.reasons}
    assert all(was[reason.rule] or not reason.ok for reason in after.reasons)


@settings(deadline=None)
@given(evaluated(), st.lists(errors, max_size=4), st.none() | evaluated())
def test_verdict_is_the_conjunction_of_its_rules(
    candidate: dict[str, dict[str, Any]], ece_after: list[float], champion: dict[str, dict[str, Any]] | None
) -> None:
    verdict = judge(POLICY, candidate, {"ece_after": ece_after}, champion)
    assert verdict.passed == (not failed(verdict))
    document = verdict.to_document()
    assert all(set(reason) == {"rule", "ok", "got", "needs"} for reason in document["reasons"])


@pytest.mark.parametrize(("concurrency", "least", "ok"), [(8, 1.2, True), (8, 1.21, False), (1, 1.7, True)])
def test_speed_counts_at_the_load_that_the_draft_is_meant_for(concurrency: int, least: float, ok: bool) -> None:
    policy = GateSpec(concurrency=concurrency, min_speedup=least)
    assert judge(policy, suites(), calibration_outputs(), None).passed is ok


@pytest.mark.parametrize("found", [None, [], "8", [None], [{"concurrency": 4, "speedup_over_plain": 9.0}]])
def test_load_that_was_not_measured_fails_and_says_so(found: object) -> None:
    verdict = judge(GateSpec(concurrency=8), suites(by_concurrency=found), calibration_outputs(), None)
    (reason,) = [reason for reason in verdict.reasons if not reason.ok]
    assert reason.rule == "speed-up over plain decoding on held-out, 8 requests together"
    assert reason.got == "not measured at this load (evaluation.concurrencies)"


@pytest.mark.parametrize(
    ("standing", "rules"),
    [
        (Standing((DraftFile("a", 60), DraftFile("b", 40))), []),
        (Standing((DraftFile("a", 60), DraftFile("b", 41))), ["size of the draft"]),
        (Standing(()), ["formats of the draft's files", "size of the draft"]),
        (Standing((DraftFile("a", 60, "not safetensors"),)), ["formats of the draft's files"]),
        (Standing((DraftFile("a", 60),), "yesterday by ada: slow"), ["taken back before"]),
    ],
)
def test_files_and_past_of_a_registered_version_count(standing: Standing, rules: list[str]) -> None:
    policy = GateSpec(max_draft_bytes=100)
    assert failed(judge(policy, suites(), calibration_outputs(), None, standing=standing)) == rules
