"""Requests and drafts as the traffic says."""

from __future__ import annotations

import numpy as np
import pytest

from draftline.calibration.measures import area_under_curve, expected_calibration_error, survival_events
from draftline.simulation.traffic import ACCEPTED_LENGTHS, TRAFFIC, Drafts, Traffic


def whole_blocks(domain: str, count: int = 600, **errors: float) -> tuple[np.ndarray, np.ndarray]:
    """Survivals as reported and drafts accepted: ten blocks each of ``count`` requests."""
    traffic = Traffic({domain: 1.0}, **errors)  # type: ignore[arg-type]
    drafts = Drafts(traffic, count, 7)
    for row in range(count):
        drafts.reset(row, traffic.request(row).level)
    found = [drafts.draw(np.arange(count)) for _ in range(10)]
    survival = [(1 / (1 + np.exp(-logits))).cumprod(axis=1) for logits, _ in found]
    return np.concatenate(survival), np.concatenate([accepted for _, accepted in found])


@pytest.mark.parametrize("domain", ACCEPTED_LENGTHS)
def test_whole_blocks_are_accepted_as_published(domain: str) -> None:
    """A request's level has standard deviation 0.5; over 600 requests the mean length is known to about 0.05."""
    survival, accepted = whole_blocks(domain)
    assert 1 + accepted.mean() == pytest.approx(ACCEPTED_LENGTHS[domain], abs=0.2)
    events = survival_events(accepted.tolist(), 7)
    for k in range(7):
        assert expected_calibration_error(survival[:, k], events[:, k]) < 0.03
        assert 0.75 < area_under_curve(survival[:, k], events[:, k]) < 0.95


def test_reported_confidences_can_be_wrong() -> None:
    survival, accepted = whole_blocks("chat", confidence_offset=1.0, confidence_noise=0.5)
    events = survival_events(accepted.tolist(), 7)
    assert expected_calibration_error(survival[:, 0], events[:, 0]) > 0.08
    assert survival[:, 0].mean() > events[:, 0].mean() + 0.08


def test_a_request_depends_on_its_number_alone() -> None:
    traffic = TRAFFIC["mix"]
    assert traffic.request(5) == traffic.request(5) != traffic.request(6)
    many = [traffic.request(number) for number in range(2000)]
    assert np.mean([r.domain == "chat" for r in many]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([r.output_tokens for r in many]) == pytest.approx(512, rel=0.08)
    assert np.mean([r.prompt_tokens for r in many]) == pytest.approx(256, rel=0.08)


def test_easy_passages_last() -> None:
    drafts = Drafts(Traffic(), 4000, 7)
    rows = np.arange(4000)
    first, second = drafts.draw(rows)[0].mean(axis=1), drafts.draw(rows)[0].mean(axis=1)
    assert np.corrcoef(first, second)[0, 1] > 0.15
