"""Which map is chosen, on requests that the fit has not seen."""

from __future__ import annotations

import json

import numpy as np
import pytest

from draftline.calibration import choice
from draftline.calibration.choice import VerifiedBlocks, fit_calibration
from draftline.calibration.fit import FITS
from draftline.calibration.maps import Curves, SlopesAndBiases
from draftline.calibration.measures import expected_calibration_error, survival_events
from draftline.errors import StepError
from tests.calibration.cases import Array, blocks, drawn, normal_logits, requests_of, sigmoid


def fresh_ece(survival: Array, right: Array, seed: int) -> float:
    events = survival_events(drawn(right, seed), right.shape[1])
    return max(expected_calibration_error(survival[:, k], events[:, k]) for k in range(right.shape[1]))


def test_an_offset_that_no_temperature_removes_is_removed() -> None:
    """Logits 1 too high are scaled about 0; at logit 0 no temperature says anything but a half, where 0.27 is right."""
    reported = normal_logits(6000, 4, 0) - 1
    found = fit_calibration(blocks(reported, reported - 1, 0), "synthetic")
    assert found.method == "bias"
    assert isinstance(found.chosen, SlopesAndBiases)
    # Position 4 is reached by a tenth of the blocks.
    assert found.chosen.biases[:2] == pytest.approx((-1, -1), abs=0.2)
    candidates = found.extra["candidates"]
    assert np.mean(candidates["bias"]["ece"]) < 0.02 < 0.04 < np.mean(candidates["sts"]["ece"])
    assert np.mean(candidates["isotonic"]["ece"]) < 0.02
    fresh = normal_logits(6000, 4, 1) - 1
    assert fresh_ece(found.survival(fresh), fresh - 1, 1) < 0.04
    assert np.mean(found.ece_before) > 0.1 and found.ece_after == tuple(candidates["bias"]["ece"])


def test_a_wrong_temperature_is_put_right() -> None:
    """By ``sts`` or by ``bias``, whose slope is one over the temperature; the likelihood finds it with less noise."""
    right = normal_logits(6000, 3, 2)
    found = fit_calibration(blocks(2.5 * right, right, 2), "synthetic")
    assert found.method in ("sts", "bias")
    assert found.temperatures == pytest.approx((2.5, 2.5, 2.5), rel=0.3)
    assert isinstance(found.chosen, SlopesAndBiases) is (found.method == "bias")
    assert max(found.ece_after) < 0.02 < min(found.ece_before)


def test_a_bend_asks_for_curves() -> None:
    reported = 2 * normal_logits(6000, 2, 3) - 2
    right = np.where(reported > 0, 3.0, -1.0)
    found = fit_calibration(blocks(reported, right, 3), "synthetic")
    assert found.method == "isotonic"
    assert isinstance(found.chosen, Curves)


@pytest.mark.parametrize("seed", range(4))
def test_right_confidences_are_left_alone(seed: int) -> None:
    """Within noise: nothing is bought with a fit that a standard error would explain."""
    right = normal_logits(2000, 4, seed)
    found = fit_calibration(blocks(right, right, seed), "synthetic")
    plain = sigmoid(right).cumprod(axis=1)
    assert found.method == "raw" or np.abs(found.survival(right) - plain).mean() < 0.02
    assert np.abs(np.array(found.temperatures) - 1).max() < 0.5
    assert max(found.ece_after) < 0.05


@pytest.mark.parametrize("method", FITS)
def test_a_method_asked_for_is_taken_and_all_are_compared(method: str) -> None:
    right = normal_logits(600, 3, 4)
    found = fit_calibration(blocks(right - 1, right, 4), "d", method)  # type: ignore[arg-type]
    assert found.method == method
    assert list(found.extra["candidates"]) == ["raw", "sts", "bias", "isotonic"]
    for figures in found.extra["candidates"].values():
        assert {name: len(values) for name, values in figures.items()} == dict.fromkeys(
            ("ece", "brier", "log_loss", "auc"), 3
        )
    assert found.extra["rule"] == f"calibration.method is {method}"
    assert found.extra["brier"] == found.extra["candidates"][method]["brier"]
    assert found.extra["brier_before"] == found.extra["candidates"]["raw"]["brier"]
    assert (found.dataset, found.num_samples) == ("d", 600)
    assert found.extra["held_out"] == {"num_requests": 30, "num_folds": 5}
    json.loads(found.to_json())


def test_no_request_is_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of a request carries the request's number as its logit; a fit sees all numbers but its fold's."""
    numbers = np.repeat(np.arange(12.0), 10)[np.random.default_rng(0).permutation(120)]
    seen: list[set[float]] = []
    asked: list[set[float]] = []

    def spy(logits: Array, events: object) -> object:
        seen.append(set(logits[:, 0]))

        class Asked:
            def survival(self, logits: Array) -> Array:
                asked.append(set(logits[:, 0]))
                return np.full(logits.shape, 0.5)

        return Asked()

    monkeypatch.setattr(choice, "FITS", {**FITS, "bias": spy})
    fit_calibration(VerifiedBlocks(numbers[:, None], [1] * 120, [str(n) for n in numbers]), "d")
    assert len(asked) == 5 and set().union(*asked) == set(range(12))
    for fitted_on, predicted in zip(seen, asked, strict=False):
        assert fitted_on.isdisjoint(predicted) and fitted_on | predicted == set(range(12))


def test_leakage_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike blocks of a request: held out by block, a curve looks far better than it is."""
    random = np.random.default_rng(1)
    logits = np.repeat(random.normal(0, 3, 40), 50)[:, None]
    accepted = np.repeat(random.random(40) < 0.5, 50).astype(int).tolist()

    def brier(requests: list[str]) -> float:
        found = fit_calibration(VerifiedBlocks(logits, accepted, requests), "d", "isotonic")
        return float(found.extra["brier"][0])

    assert brier(requests_of(2000, 50)) > brier(requests_of(2000, 1)) + 0.02


def test_few_blocks_keep_the_raw_confidences() -> None:
    right = normal_logits(49, 3, 4)
    for method in ("auto", "isotonic"):
        found = fit_calibration(blocks(right - 2, right, 4), "d", method)  # type: ignore[arg-type]
        assert (found.method, found.temperatures, found.num_samples) == ("raw", (1.0, 1.0, 1.0), 49)
        assert found.ece_before == found.ece_after != ()
        assert found.extra["held_out"]["too_few_to_fit"] is True
    assert fit_calibration(VerifiedBlocks(np.zeros((0, 3)), [], []), "d") == choice.Calibration.identity(3)


def test_one_request_cannot_be_compared_with_another() -> None:
    right = normal_logits(200, 2, 5)
    found = fit_calibration(VerifiedBlocks(right - 1, drawn(right, 5), ["a"] * 200), "d")
    assert found.method == "sts"
    assert found.extra["held_out"] == {"num_requests": 1, "num_folds": 1}


@pytest.mark.parametrize("accepted", [0, 3])
def test_one_outcome_only(accepted: int) -> None:
    logits = normal_logits(500, 3, 6)
    found = fit_calibration(VerifiedBlocks(logits, [accepted] * 500, requests_of(500)), "d")
    assert found.method in ("bias", "isotonic")
    assert found.extra["auc"] == [None] * 3
    assert max(found.ece_after) < 0.02
    assert "NaN" not in found.to_json()


def test_confidences_that_are_no_numbers_are_refused() -> None:
    logits = normal_logits(100, 3, 7)
    logits[[3, 5], 1] = np.nan
    with pytest.raises(StepError, match="NaN in 2 of 100 blocks, at position 2; expected numbers"):
        fit_calibration(VerifiedBlocks(logits, [1] * 100, requests_of(100)), "d")


def test_the_standard_error_knows_of_requests() -> None:
    """Ten equal blocks a request say as much as one."""
    values = np.random.default_rng(8).normal(size=60)
    plain = values.std(ddof=1) / np.sqrt(60)
    assert choice._standard_error(values, np.arange(60)) == pytest.approx(plain)
    assert choice._standard_error(np.repeat(values, 10), np.repeat(np.arange(60), 10)) == pytest.approx(plain)
