"""What every map from confidences to survival promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from draftline.calibration.maps import Curves, SlopesAndBiases, SurvivalMap, Temperatures, map_from_json
from tests.calibration.cases import Array, sigmoid

BLOCK = 4
POSITIVE = st.floats(0.05, 20)


@st.composite
def curves(draw: st.DrawFn) -> Curves:
    xs, ys = [], []
    for _ in range(BLOCK):
        count = draw(st.integers(1, 6))
        grid = draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count, unique=True))
        xs.append(tuple(sorted(x / 1000 for x in grid)))
        ys.append(tuple(sorted(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))))
    return Curves(tuple(xs), tuple(ys))


def tuples(values: st.SearchStrategy[float]) -> st.SearchStrategy[tuple[float, ...]]:
    return st.lists(values, min_size=BLOCK, max_size=BLOCK).map(tuple)


MAPS: st.SearchStrategy[SurvivalMap] = st.one_of(
    tuples(POSITIVE).map(Temperatures),
    st.builds(SlopesAndBiases, tuples(POSITIVE), tuples(st.floats(-5, 5))),
    curves(),
)
LOGITS = arrays(np.float64, (3, BLOCK), elements=st.floats(-80, 80))


@given(MAPS, LOGITS)
def test_survival_is_a_probability_that_never_rises_over_positions(found: SurvivalMap, logits: Array) -> None:
    survival = found.survival(logits)
    assert survival.shape == logits.shape and found.num_positions == BLOCK
    assert ((survival >= 0) & (survival <= 1)).all()
    assert (np.diff(survival, axis=1) <= 0).all()


@given(MAPS, LOGITS, st.integers(0, BLOCK - 1), st.floats(0, 50))
def test_it_rises_with_every_logit(found: SurvivalMap, logits: Array, k: int, step: float) -> None:
    higher = logits.copy()
    higher[:, k] += step
    # Products and interpolations round, in both directions.
    assert (found.survival(higher) >= found.survival(logits) - 1e-12).all()


@given(MAPS, LOGITS, LOGITS, st.integers(1, BLOCK))
def test_a_position_reads_nothing_behind_it(found: SurvivalMap, logits: Array, other: Array, k: int) -> None:
    """Bit for bit: else a scheduler could tell apart what it must not know (paper, appendix A)."""
    changed = np.concatenate([logits[:, :k], other[:, k:]], axis=1)
    assert np.array_equal(found.survival(changed)[:, :k], found.survival(logits)[:, :k])
    assert np.array_equal(found.survival(logits[:, :k]), found.survival(logits)[:, :k])


@given(MAPS, LOGITS, st.integers(0, BLOCK - 1))
def test_requests_do_not_touch_each_other_and_nan_is_rejection(found: SurvivalMap, logits: Array, k: int) -> None:
    broken = logits.copy()
    broken[1, k] = np.nan
    survival = found.survival(broken)
    assert np.array_equal(survival[[0, 2]], found.survival(logits)[[0, 2]])
    assert np.array_equal(survival[1, :k], found.survival(logits)[1, :k])
    assert (survival[1, k:] < 1e-20).all()


def test_by_hand() -> None:
    logits = np.array([[2.0, -1.0], [0.0, 400.0], [-400.0, 0.0]])
    scaled = Temperatures((2.0, 0.5)).survival(logits)
    first, second = sigmoid(np.array([1.0, 0.0])), sigmoid(np.array([-2.0, 60.0]))
    assert scaled[:2, 0] == pytest.approx(first)
    assert scaled[:2, 1] == pytest.approx(first * second)
    assert 0 <= scaled[2, 1] < 1e-20
    shifted = SlopesAndBiases((0.5, 2.0), (1.0, -3.0)).survival(logits)
    assert shifted[0] == pytest.approx(sigmoid(np.array([2.0, -5.0])).cumprod())
    curved = Curves(((0.2, 0.8), (0.25,)), ((0.1, 0.5), (0.4,))).survival(np.array([[0.0, 9.0], [-9.0, 9.0]]))
    # 0.5 lies half-way from 0.2 to 0.8; below 0.2 the curve is level, and position 2 cannot be above position 1.
    assert curved == pytest.approx(np.array([[0.3, 0.3], [0.1, 0.1]]))


@given(MAPS)
def test_parameters_round_trip(found: SurvivalMap) -> None:
    method = {Temperatures: "sts", SlopesAndBiases: "bias", Curves: "isotonic"}[type(found)]  # type: ignore[index]
    assert map_from_json(method, found.to_json()) == found


def test_sizes_without_rows() -> None:
    for found in (Temperatures((1.0, 1.0)), SlopesAndBiases((1.0,), (0.0,)), Curves(((0.5,),), ((0.5,),))):
        assert found.survival(np.zeros((0, 1))).shape == (0, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Temperatures(()), "impossible temperatures"),
        (lambda: Temperatures((1.0, 0.0)), "impossible temperatures"),
        (lambda: Temperatures((float("inf"),)), "impossible temperatures"),
        (lambda: SlopesAndBiases((-1.0,), (0.0,)), "impossible slopes"),
        (lambda: SlopesAndBiases((1.0,), (float("nan"),)), "impossible biases"),
        (lambda: SlopesAndBiases((1.0,), (0.0, 1.0)), "1 slopes but 2 biases"),
        (lambda: Curves((), ()), "0 positions"),
        (lambda: Curves(((0.1,),), ((0.1,), (0.1,))), "1 positions predicted but 2"),
        (lambda: Curves(((),), ((),)), "impossible predicted"),
        (lambda: Curves(((0.1, 0.1),), ((0.1, 0.2),)), "do not rise"),
        (lambda: Curves(((0.1,),), ((0.1, 0.2),)), "do not rise"),
        (lambda: Curves(((0.1, 0.2),), ((0.3, 0.2),)), "falls or leaves"),
        (lambda: Curves(((0.1, 0.2),), ((0.3, 1.2),)), "falls or leaves"),
        (lambda: map_from_json("beta", {}), "unknown method 'beta'"),
    ],
)
def test_impossible_parameters_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
