"""Fits on data whose truth is known, the file, and measures against plain ones."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from draftline.calibration.choice import fit_calibration
from draftline.calibration.fit import FITS, fit_curves, fit_slopes_and_biases, fit_temperatures
from draftline.calibration.maps import Curves, SlopesAndBiases
from draftline.calibration.measures import (
    area_under_curve,
    brier_score,
    expected_calibration_error,
    log_loss,
    measure_confidences,
    reliability,
    survival_events,
    sweep_thresholds,
)
from draftline.calibration.survival import Calibration
from draftline.errors import FormatError
from tests.calibration.cases import Array, blocks, drawn, normal_logits, sigmoid

TRUE = np.array([2.5, 0.5, 1.6])


def ece(survival: Array, accepted: list[int]) -> list[float]:
    events = survival_events(accepted, survival.shape[1])
    return [expected_calibration_error(survival[:, k], events[:, k]) for k in range(survival.shape[1])]


def test_known_temperatures_are_recovered_left_to_right() -> None:
    """ECE has noise of about 1 / sqrt(bin size) = 2 %; the curve is flat to that near its minimum."""
    right = normal_logits(20000, 3, 0)
    fitted = fit_temperatures(right * TRUE, survival_events(drawn(right, 0), 3))
    assert fitted.temperatures == pytest.approx(TRUE, rel=0.2)
    fresh = normal_logits(20000, 3, 1)
    assert max(ece(fitted.survival(fresh * TRUE), drawn(fresh, 1))) < 0.03
    assert min(ece(Calibration.identity(3).survival(fresh * TRUE), drawn(fresh, 1))) > 0.02


def test_known_slopes_and_biases_are_recovered() -> None:
    """Of 20,000 blocks three quarters reach position 2 and half of them position 3: standard errors about 0.03."""
    slopes, biases = np.array([0.5, 2.0, 0.8]), np.array([-1.0, 0.5, 1.5])
    reported = normal_logits(20000, 3, 0)
    accepted = drawn(slopes * reported + biases, 0)
    fitted = fit_slopes_and_biases(reported, survival_events(accepted, 3))
    assert fitted.slopes == pytest.approx(slopes, rel=0.15)
    assert fitted.biases == pytest.approx(biases, abs=0.15)


def test_a_bend_that_no_line_follows_is_followed_by_a_curve() -> None:
    reported = normal_logits(20000, 2, 0) * 2 - 2
    right = np.where(reported > 0, 3.0, -1.0) + 0.1 * reported
    events = survival_events(drawn(right, 0), 2)
    fresh = normal_logits(20000, 2, 1) * 2 - 2
    accepted = drawn(np.where(fresh > 0, 3.0, -1.0) + 0.1 * fresh, 1)
    curve, line = fit_curves(reported, events), fit_slopes_and_biases(reported, events)
    assert ece(curve.survival(fresh), accepted)[0] < 0.02 < ece(line.survival(fresh), accepted)[0]


def test_curves_keep_equal_confidences_equal() -> None:
    """Bins that cut blocks of one confidence apart would differ by chance, and the highest would win."""
    events = survival_events(drawn(np.zeros((1000, 1)), 3), 1)
    fitted = fit_curves(np.zeros((1000, 1)), events)
    assert fitted.predicted == ((0.5,),)
    assert fitted.observed[0][0] == pytest.approx((events.sum() + 0.5) / 1001)
    two = np.array([[0.0]] * 500 + [[3.0]] * 500)
    assert len(fit_curves(two, events[np.argsort(events[:, 0])]).predicted[0]) == 2


@pytest.mark.parametrize("method", FITS)
@pytest.mark.parametrize(
    ("accepted", "lowest", "highest"),
    [([3] * 400, 0.85, 1.0), ([0] * 400, 0.0, 0.15)],
    ids=["everything accepted", "nothing accepted"],
)
def test_one_outcome_only_gives_no_nonsense(method: str, accepted: list[int], lowest: float, highest: float) -> None:
    """The raw confidences say about 0.5 at position 3; the fitted ones go where the outcomes are."""
    fitted = FITS[method](normal_logits(400, 3, 5), survival_events(accepted, 3))  # type: ignore[index]
    survival = fitted.survival(normal_logits(400, 3, 6))
    assert np.isfinite(survival).all()
    if method in ("bias", "isotonic"):
        assert lowest <= survival.mean(axis=0)[-1] <= highest


@pytest.mark.parametrize("method", FITS)
def test_a_position_never_reached_says_so(method: str) -> None:
    accepted = [min(n, 2) for n in drawn(normal_logits(2000, 4, 7), 7)]
    fitted = FITS[method](normal_logits(2000, 4, 7), survival_events(accepted, 4))  # type: ignore[index]
    survival = fitted.survival(normal_logits(500, 4, 8))
    assert np.isfinite(survival).all()
    if method in ("bias", "isotonic"):
        assert survival[:, 2:].mean() < 0.03 and survival[:, 1].mean() > 0.4


def test_extreme_logits_are_fitted() -> None:
    logits = np.array([[np.inf, 500.0], [-np.inf, 0.0], [1e300, -1e300], [2.0, 1.0]] * 50)
    events = survival_events([2, 0, 1, 1] * 50, 2)
    for fit in FITS.values():
        assert np.isfinite(fit(logits, events).survival(logits)).all()


def test_survival_events() -> None:
    assert survival_events([0, 2, 3], 3).tolist() == [
        [False, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_ece_by_hand() -> None:
    predicted = np.array([0.1, 0.9, 0.2, 0.8])
    observed = np.array([False, True, True, False])
    # Two bins of two: |0.15 - 0.5| and |0.85 - 0.5|.
    assert expected_calibration_error(predicted, observed, 2) == pytest.approx(0.35)
    # Four bins of one.
    assert expected_calibration_error(predicted, observed, 4) == pytest.approx((0.1 + 0.8 + 0.8 + 0.1) / 4)
    assert expected_calibration_error(predicted, observed, 99) == pytest.approx(0.45)
    assert np.isnan(expected_calibration_error(np.array([]), np.array([], dtype=bool)))
    points = reliability(predicted, observed, 2)
    assert points[0] == pytest.approx({"predicted": 0.15, "observed": 0.5, "count": 2.0})
    assert points[1] == pytest.approx({"predicted": 0.85, "observed": 0.5, "count": 2.0})


@pytest.mark.parametrize("seed", range(5))
def test_auc_equals_counting_pairs(seed: int) -> None:
    random = np.random.default_rng(seed)
    predicted, observed = random.integers(0, 6, 40) / 6, random.random(40) < 0.4
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in predicted[observed] for n in predicted[~observed]]
    assert area_under_curve(predicted, observed) == pytest.approx(float(np.mean(pairs)))


def test_auc_of_one_outcome_is_nothing() -> None:
    assert np.isnan(area_under_curve(np.array([0.1, 0.2]), np.array([True, True])))


@pytest.mark.parametrize("method", FITS)
def test_json_round_trip(method: str) -> None:
    right = normal_logits(300, 3, 5)
    fitted = fit_calibration(blocks(right * TRUE, right, 5), "support-desk calibration split", method)  # type: ignore[arg-type]
    text = fitted.to_json()
    read = Calibration.from_json(text)
    assert read == fitted and read.method == method
    assert read.to_json() == text
    assert np.array_equal(read.survival(right), fitted.survival(right))
    assert len(json.loads(text)["temperatures"]) == 3


def test_the_identity_round_trips() -> None:
    assert Calibration.from_json(Calibration.identity(4).to_json()) == Calibration.identity(4)


def test_files_of_version_1_load_as_temperatures() -> None:
    old = {"temperatures": [2.0, 0.5], "draftline": {"version": 1, "ece_before": [0.1, 0.2], "ece_after": [0.1, 0.1]}}
    read = Calibration.from_json(json.dumps(old))
    assert (read.method, read.ece_before) == ("sts", (0.1, 0.2))
    assert np.array_equal(read.survival(np.ones((1, 2))), Calibration((2.0, 0.5)).survival(np.ones((1, 2))))


def test_a_calibration_uses_its_map_and_keeps_the_temperatures_for_others() -> None:
    logits = np.array([[2.0, -1.0]])
    assert Calibration((2.0, 2.0), method="raw").survival(logits)[0] == pytest.approx(sigmoid(logits[0]).cumprod())
    assert Calibration((2.0, 2.0)).survival(logits)[0] == pytest.approx(sigmoid(logits[0] / 2).cumprod())
    bias = Calibration((2.0, 2.0), method="bias", chosen=SlopesAndBiases((1.0, 1.0), (1.0, 1.0)))
    assert bias.survival(logits)[0] == pytest.approx(sigmoid(logits[0] + 1).cumprod())
    assert json.loads(bias.to_json())["temperatures"] == [2.0, 2.0]
    for wrong in ({"method": "sts"}, {"method": "bias", "chosen": None}, {"chosen": Curves(((0.5,),), ((0.5,),))}):
        with pytest.raises(ValueError, match=r"method|positions"):
            replace(bias, **wrong)  # type: ignore[arg-type]


def test_sglang_reads_our_document_and_we_read_sglangs() -> None:
    ours = json.loads(Calibration((1.5, 0.75), "d", 9, (0.2, 0.4), (0.1, 0.1)).to_json())
    assert {k: v for k, v in ours.items() if k != "draftline"} == {
        "temperatures": [1.5, 0.75],
        "dataset": "d",
        "num_samples": 9,
        "ece_before": pytest.approx(0.3),
        "ece_after": pytest.approx(0.1),
    }
    theirs = {"temperatures": [1.2, 1.0], "dataset": "alpaca", "num_samples": 7, "ece_before": 0.2, "ece_after": 0.1}
    read = Calibration.from_json(json.dumps(theirs))
    assert (read.temperatures, read.dataset, read.num_samples) == ((1.2, 1.0), "alpaca", 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"temperatures": "abc"}', "damaged"),
        ('{"temperatures": [1, null]}', "damaged"),
        ('{"temperatures": [1], "draftline": 3}', "damaged"),
        ('{"temperatures": [1], "draftline": {"version": 1, "ece_before": null}}', "damaged"),
        ('{"temperatures": [1], "draftline": {"version": "x"}}', "damaged"),
        ('{"temperatures": [1], "draftline": {"version": 3}}', "newer"),
        ('{"temperatures": [1], "draftline": {"version": 2, "method": "beta"}}', "method is unknown"),
        ('{"temperatures": [1], "draftline": {"version": 2, "method": ["sts"]}}', "method is unknown"),
        ('{"temperatures": [1], "draftline": {"version": 2, "method": "bias"}}', "damaged"),
        ('{"temperatures": [1], "draftline": {"version": 2, "method": "bias", "map": {"slopes": [1]}}}', "damaged"),
        (
            '{"temperatures": [1], "draftline": {"version": 2, "method": "bias", '
            '"map": {"slopes": [-1], "biases": [0]}}}',
            "impossible slopes",
        ),
        (
            '{"temperatures": [1], "draftline": {"version": 2, "method": "bias", '
            '"map": {"slopes": [1, 1], "biases": [0, 0]}}}',
            "1 temperatures, a map of 2 positions",
        ),
        (
            '{"temperatures": [1], "draftline": {"version": 2, "method": "isotonic", '
            '"map": {"predicted": "12", "observed": [[1]]}}}',
            "damaged",
        ),
        ('{"temperatures": []}', "impossible"),
        ('{"temperatures": [1, 0]}', "impossible"),
        ('{"temperatures": [NaN]}', "impossible"),
        ('{"temperatures": [-1]}', "impossible"),
    ],
)
def test_damaged_and_newer_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Calibration.from_json(text)


def test_brier_by_hand() -> None:
    predicted, observed = np.array([0.0, 0.5, 1.0]), np.array([False, True, False])
    assert brier_score(predicted, observed) == pytest.approx((0 + 0.25 + 1) / 3)
    assert np.isnan(brier_score(np.array([]), np.array([], dtype=bool)))


def test_log_loss_by_hand() -> None:
    predicted, observed = np.array([0.25, 0.5, 1.0]), np.array([False, True, False])
    assert log_loss(predicted, observed) == pytest.approx(-(np.log(0.75) + np.log(0.5) + np.log(1e-6)) / 3)
    assert np.isnan(log_loss(np.array([]), np.array([], dtype=bool)))


def test_measures_are_one_value_a_position() -> None:
    right = normal_logits(300, 3, 6)
    events = survival_events(drawn(right, 6), 3)
    survival = Calibration.identity(3).survival(right * TRUE)
    found = measure_confidences(survival, events)
    for k in range(3):
        assert found.ece[k] == expected_calibration_error(survival[:, k], events[:, k])
        assert found.brier[k] == brier_score(survival[:, k], events[:, k])
        assert found.log_loss[k] == log_loss(survival[:, k], events[:, k])
        assert found.auc[k] == area_under_curve(survival[:, k], events[:, k])
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    one_outcome = measure_confidences(np.full((5, 1), 0.5), np.ones((5, 1), dtype=bool))
    assert one_outcome.to_json()["auc"] == [None]


def test_sweep_cuts_each_block_at_the_first_low_survival() -> None:
    survival = np.array([[0.9, 0.6, 0.5], [0.7, 0.3, 0.1], [0.2, 0.1, 0.05]])
    whole, half, high, none = sweep_thresholds(survival, [3, 2, 1], (0.0, 0.5, 0.8, 0.95))
    assert (whole.acceptance_rate, whole.verified_length, whole.accepted_length) == pytest.approx((6 / 9, 3.0, 3.0))
    # 0.5 itself is not below 0.5: lengths 3, 1, 0, of which 3, 1, 0 are accepted.
    assert (half.acceptance_rate, half.verified_length, half.accepted_length) == pytest.approx((1.0, 4 / 3, 1 + 4 / 3))
    assert (high.acceptance_rate, high.verified_length, high.accepted_length) == pytest.approx((1.0, 1 / 3, 1 + 1 / 3))
    assert np.isnan(none.acceptance_rate) and none.accepted_length == 1.0
    assert none.to_json() == {"threshold": 0.95, "acceptance_rate": None, "verified_length": 0, "accepted_length": 1}
