"""What a refused client is told to wait: tokens of an answer over tokens per second, once per client in line."""

from __future__ import annotations

import pytest

from serving.errors import Overloaded, to_http
from serving.turnover import MAX_RETRY_AFTER_S, Turnover


def steady(tokens_per_step: int, step_s: float, answer_tokens: int) -> Turnover:
    turnover = Turnover()
    for _ in range(100):
        turnover.record_step(tokens_per_step, step_s)
        turnover.record_finished(answer_tokens)
    return turnover


@pytest.mark.parametrize(
    ("tokens_per_step", "step_s", "answer_tokens", "expected"),
    [(8, 0.04, 400, 2.0), (16, 0.04, 400, 1.0), (8, 0.08, 400, 4.0), (8, 0.04, 100, 0.5)],
)
def test_a_place_frees_as_often_as_answers_end(
    tokens_per_step: int, step_s: float, answer_tokens: int, expected: float
) -> None:
    found = steady(tokens_per_step, step_s, answer_tokens).seconds_per_place(running_limits=9999)
    assert found == pytest.approx(expected)


def test_each_refused_client_is_sent_behind_the_one_before() -> None:
    turnover = steady(8, 0.04, 500)  # a place every 2.5 s
    assert [turnover.retry_after_s(0.0, 0) for _ in range(4)] == [3, 5, 8, 10]
    # Two of them have come back by now.
    assert turnover.retry_after_s(6.0, 0) == 8


def test_a_wait_is_never_longer_than_a_minute_and_the_line_stays_short() -> None:
    turnover = steady(8, 0.04, 500)
    waits = [turnover.retry_after_s(0.0, 0) for _ in range(10_000)]
    assert max(waits) == MAX_RETRY_AFTER_S and waits[-1] == MAX_RETRY_AFTER_S
    assert len(turnover._returning_s) < 30
    assert turnover.retry_after_s(61.0, 0) == 3


def test_before_any_answer_has_ended_the_limits_stand_in() -> None:
    turnover = Turnover()
    assert turnover.retry_after_s(0.0, 1000) == 1, "nothing is known yet"
    turnover.record_step(10, 0.1)
    assert turnover.seconds_per_place(running_limits=1000) == pytest.approx(5.0)


def test_the_wait_is_in_the_header() -> None:
    assert to_http(Overloaded("full", retry_after_s=17)).headers["Retry-After"] == "17"
