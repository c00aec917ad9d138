"""Sequential temperature scaling on data whose temperatures are known, and its measures against plain ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.typing import NDArray

from draftline.calibration.fit import fit_temperatures
from draftline.calibration.measures import (
    area_under_curve,
    brier_score,
    expected_calibration_error,
    measure_confidences,
    reliability,
    survival_events,
    sweep_thresholds,
)
from draftline.calibration.survival import Calibration
from draftline.errors import FormatError

TRUE = (2.5, 0.5, 1.6)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = 1 / (1 + np.exp(-x))
    return out


def over_and_underconfident(count: int, seed: int) -> tuple[NDArray[np.float64], list[int]]:
    """Logits that are right after division by ``TRUE``, and how many drafts were accepted."""
    random = np.random.default_rng(seed)
    right = random.normal(1.5, 1.2, (count, len(TRUE)))
    is_accepted = random.random(right.shape) < sigmoid(right)
    return right * np.array(TRUE), [int(row) for row in is_accepted.cumprod(axis=1).sum(axis=1)]


def test_known_temperatures_are_recovered_left_to_right() -> None:
    """ECE has noise of about 1 / sqrt(bin size) = 2 %; the curve is flat to that near its minimum."""
    logits, accepted = over_and_underconfident(20000, 0)
    fitted = fit_temperatures(logits, accepted, "synthetic")
    assert fitted.temperatures == pytest.approx(TRUE, rel=0.2)
    assert all(after < before for before, after in zip(fitted.ece_before, fitted.ece_after, strict=True))
    assert max(fitted.ece_after) < 0.02 < min(fitted.ece_before)
    fresh, fresh_accepted = over_and_underconfident(20000, 1)
    survival, events = fitted.survival(fresh), survival_events(fresh_accepted, 3)
    assert all(expected_calibration_error(survival[:, k], events[:, k]) < 0.03 for k in range(3))
    assert (fitted.dataset, fitted.num_samples) == ("synthetic", 20000)


def test_calibrated_confidence_is_left_alone() -> None:
    random = np.random.default_rng(2)
    logits = random.normal(0.5, 1.5, (20000, 1))
    fitted = fit_temperatures(logits, (random.random(20000) < sigmoid(logits[:, 0])).astype(int).tolist(), "")
    assert fitted.temperatures[0] == pytest.approx(1.0, abs=0.12)


def test_a_temperature_keeps_the_order_of_confidences() -> None:
    logits, accepted = over_and_underconfident(500, 3)
    survival = fit_temperatures(logits, accepted, "").survival(logits)
    assert np.array_equal(np.argsort(survival[:, 0]), np.argsort(logits[:, 0]))
    assert (np.diff(survival, axis=1) <= 0).all()


def test_few_samples_keep_the_raw_confidence() -> None:
    logits, accepted = over_and_underconfident(49, 4)
    assert fit_temperatures(logits, accepted, "").temperatures == (1.0, 1.0, 1.0)


def test_one_outcome_only_has_no_curve() -> None:
    fitted = fit_temperatures(np.ones((60, 2)), [2] * 60, "")
    assert fitted.extra["auc"] == [None, None]
    assert json.loads(fitted.to_json())["draftline"]["auc"] == [None, None]


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


def test_survival_is_the_product_of_scaled_confidences() -> None:
    logits = np.array([[2.0, -1.0], [0.0, 400.0], [-400.0, 0.0]])
    survival = Calibration((2.0, 0.5)).survival(logits)
    first, second = sigmoid(np.array([1.0, 0.0])), sigmoid(np.array([-2.0, 60.0]))
    assert survival[:2, 0] == pytest.approx(first)
    assert survival[:2, 1] == pytest.approx(first * second)
    assert 0 <= survival[2, 1] < 1e-20
    assert Calibration.identity(2).survival(np.zeros((1, 2))).tolist() == [[0.5, 0.25]]


def test_json_round_trip() -> None:
    logits, accepted = over_and_underconfident(300, 5)
    fitted = fit_temperatures(logits, accepted, "support-desk calibration split")
    text = fitted.to_json()
    assert Calibration.from_json(text) == fitted
    assert Calibration.from_json(text).to_json() == text
    assert Calibration.from_json(Calibration.identity(4).to_json()) == Calibration.identity(4)


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
        ('{"temperatures": [1], "draftline": {"version": 2}}', "newer"),
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


def test_measures_are_one_value_a_position() -> None:
    logits, accepted = over_and_underconfident(300, 6)
    events = survival_events(accepted, 3)
    survival = Calibration.identity(3).survival(logits)
    found = measure_confidences(survival, events)
    for k in range(3):
        assert found.ece[k] == expected_calibration_error(survival[:, k], events[:, k])
        assert found.brier[k] == brier_score(survival[:, k], events[:, k])
        assert found.auc[k] == area_under_curve(survival[:, k], events[:, k])
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    one_outcome = measure_confidences(np.full((5, 1), 0.5), np.ones((5, 1), dtype=bool))
    assert one_outcome.to_json()["auc"] == [None]
    assert fit_temperatures(logits, accepted, "").extra["brier_before"] == list(found.brier)


def test_sweep_cuts_each_block_at_the_first_low_survival() -> None:
    survival = np.array([[0.9, 0.6, 0.5], [0.7, 0.3, 0.1], [0.2, 0.1, 0.05]])
    whole, half, high, none = sweep_thresholds(survival, [3, 2, 1], (0.0, 0.5, 0.8, 0.95))
    assert (whole.acceptance_rate, whole.verified_length, whole.accepted_length) == pytest.approx((6 / 9, 3.0, 3.0))
    # 0.5 itself is not below 0.5: lengths 3, 1, 0, of which 3, 1, 0 are accepted.
    assert (half.acceptance_rate, half.verified_length, half.accepted_length) == pytest.approx((1.0, 4 / 3, 1 + 4 / 3))
    assert (high.acceptance_rate, high.verified_length, high.accepted_length) == pytest.approx((1.0, 1 / 3, 1 + 1 / 3))
    assert np.isnan(none.acceptance_rate) and none.accepted_length == 1.0
    assert none.to_json() == {"threshold": 0.95, "acceptance_rate": None, "verified_length": 0, "accepted_length": 1}
