"""The step-cost table: exact where costs add up, monotone whatever was measured, careful beyond, and a document."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftline.errors import FormatError
from draftline.scheduling.costs import CostTable
from tests.scheduling.cases import linear_costs


@pytest.mark.parametrize(("tokens", "requests"), [(1, 1), (3, 3), (7, 5), (40, 6), (100, 33), (500, 64)])
def test_costs_that_add_up_are_found_everywhere(tokens: int, requests: int) -> None:
    assert linear_costs().verify_cost(tokens, requests) == pytest.approx(20 + 0.36 * tokens + 0.7 * requests)


@given(
    st.lists(st.floats(0.1, 100), min_size=12, max_size=12),
    st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
)
def test_it_never_falls_whatever_was_measured(measured: list[float], drafts: list[float]) -> None:
    points = {(r, r * q): measured.pop() for r in (1, 3, 6) for q in (1, 2, 4, 8)}
    table = CostTable.from_points(points, dict(zip((1, 3, 6), drafts, strict=True)))
    grid = np.array([[table.verify_cost(t, r) for t in range(r, 80)] + [np.inf] * (r - 1) for r in range(1, 12)])
    assert (np.diff(grid[:, :60], axis=1) >= -1e-9).all()
    for r in range(1, 11):
        same_tokens = [(table.verify_cost(t, r), table.verify_cost(t, r + 1)) for t in range(r + 1, 80)]
        assert all(more >= fewer - 1e-9 for fewer, more in same_tokens)
    draft = [table.draft_cost(r) for r in range(13)]
    assert draft[0] == 0 and (np.diff(draft) >= -1e-9).all()


def test_beyond_the_table_no_cost_is_left_out() -> None:
    """A curve that gets flat at its end is continued by its mean slope."""
    table = CostTable.from_points({(1, 1): 10.0, (1, 8): 24.0, (1, 16): 24.0}, {1: 1.0, 2: 3.0})
    assert table.verify_cost(32, 1) > 24 + 10
    assert table.verify_cost(16, 4) >= table.verify_cost(16, 1)
    assert table.draft_cost(10) == pytest.approx(3 + 8 * 2)
    assert CostTable.from_points({(4, 4): 10.0}).verify_cost(8, 4) == pytest.approx(20)
    assert table.covers(1, 16) and not table.covers(2, 16) and not table.covers(1, 17)


def test_context_adds_for_each_request() -> None:
    table = CostTable((1, 2), (1, 2), ((10.0, 11.0), (10.5, 11.5)), context_tokens=200, context_ms=0.01)
    assert table.verify_cost(2, 2, 200) == 11.5
    assert table.verify_cost(2, 2, 300) == pytest.approx(11.5 + 2)
    assert table.verify_cost(1, 1, 100) == pytest.approx(10 - 1)
    assert table.verify_cost(2, 2) == 11.5
    assert CostTable((1,), (1,), ((10.0,),), context_tokens=9000, context_ms=1.0).verify_cost(1, 1, 0) == 5


def test_a_lone_outlier_does_not_carry_all_that_follows() -> None:
    table = CostTable.from_points({(1, 1): 10.0, (1, 2): 50.0, (1, 4): 12.0, (1, 8): 14.0})
    assert table.verify_cost(8, 1) < 35


def test_it_reloads_equal() -> None:
    table = CostTable.from_points(
        {(1, 1): 10.0, (1, 4): 12.5, (2, 2): 12.0, (2, 8): 16.0},
        {1: 1.0, 2: 1.5},
        context_tokens=128,
        context_ms=0.001,
        overhead_ms=0.3,
        facts={"machine": "a", "dtype": "float32"},
    )
    assert CostTable.from_json(json.loads(table.dumps())) == table
    assert table.mismatches({"machine": "a", "dtype": "float32"}) == []
    assert table.mismatches({"machine": "b", "dtype": "float32", "target": "x"}) == [
        "machine: a there, b here",
        "target: unknown there, x here",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "no step-cost table"),
        ({"version": 2}, "of another version; got 2; expected 1"),
        ({"verify_ms": [[1.0]]}, "must be 2 by 4"),
        ({"verify_ms": [[1, 2, 3, 2], [1, 2, 3, 4]]}, "must not fall"),
        ({"verify_ms": [[2, 2, 3, 4], [1, 2, 3, 4]]}, "must not fall"),
        ({"verify_ms": [[0, 2, 3, 4], [1, 2, 3, 4]]}, "above 0"),
        ({"verify_ms": [[1, 2, 3, None], [1, 2, 3, 4]]}, "damaged"),
        ({"requests": [2, 1]}, "must ascend"),
        ({"draft_ms": [1.0]}, "draft_requests must ascend"),
        ({"draft_ms": [2.0, 1.0]}, "not fall"),
        ({"context_ms": -1.0}, "0 or more"),
        ({"facts": None}, "damaged"),
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, object], message: str) -> None:
    document = CostTable.from_points({(1, 1): 10.0, (1, 4): 12.5, (2, 2): 12.0, (2, 8): 16.0}, {1: 1.0, 2: 1.5})
    with pytest.raises(FormatError, match=message):
        CostTable.from_json({**document.to_json(), **change})


def test_with_draft_keeps_the_targets_part() -> None:
    table = linear_costs().with_draft({1: 5.0, 4: 4.0}, {"draft": "new"})
    assert table.verify_ms == linear_costs().verify_ms
    assert table.draft_ms == (4.5, 4.5) and table.facts == {"draft": "new"}


def test_sglangs_table_takes_the_fewest_requests() -> None:
    table = CostTable.from_points({(1, 1): 10.0, (1, 2): 12.5, (2, 2): 20.0, (2, 4): 25.0}, {1: 1.0})
    assert table.sps_table() == {
        "sample_batch_tokens": [1, 2, 4],
        "sample_steps_per_sec": [100.0, 80.0, 40.0],
        "max_batch_tokens": 4,
    }


def test_sglangs_additive_form_adds_up_to_the_same_costs() -> None:
    found = linear_costs().additive_table()
    at = dict(zip(found["bs_probes"], found["alpha_seconds"], strict=True))
    by_tokens = dict(zip(found["m_probes"], found["theta_seconds"], strict=True))
    # Verify and draft of 8 requests and 32 tokens: 20 + 0.36 * 32 + 0.7 * 8 and 2 + 0.4 * 8.
    assert 1000 * (found["bias_seconds"] + at[8] + by_tokens[32]) == pytest.approx(37.12 + 5.2)
