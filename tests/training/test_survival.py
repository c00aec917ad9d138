"""Acceptance by position out of sums that workers add."""

from __future__ import annotations

import pytest
import torch

from draftline.training.objective import Sums
from draftline.training.survival import survival_figures, survival_sums

MATCH_KB = torch.tensor([[1.0, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 0]])


def test_a_block_survives_as_far_as_its_first_mismatch() -> None:
    figures = survival_figures(Sums(survival_sums(MATCH_KB)))
    # Three of four survive the first position, two of those three the second, none the third.
    assert figures["acceptance/position_1"] == 3 / 4
    assert figures["acceptance/position_2"] == pytest.approx(2 / 3)
    assert figures["acceptance/position_3"] == 0
    assert figures["accepted_length"] == 1 + (2 + 1 + 0 + 2) / 4


def test_sums_of_parts_give_the_figures_of_the_whole() -> None:
    parts = [Sums(survival_sums(MATCH_KB[:1])), Sums(survival_sums(MATCH_KB[1:]))]
    added = parts[0].unpack(parts[0].pack() + parts[1].pack())
    assert survival_figures(added) == pytest.approx(survival_figures(Sums(survival_sums(MATCH_KB))))


def test_a_position_that_no_block_reaches_has_no_acceptance() -> None:
    figures = survival_figures(Sums(survival_sums(torch.zeros(2, 3))))
    assert figures == {"accepted_length": 1.0, "acceptance/position_1": 0.0}
