"""What is captured next, once for all readers, within bounds: every rule of the schedule, without Ray."""

from __future__ import annotations

import random

import pytest

from draftline.cache.schedule import CaptureSchedule

WINDOWS = [(0, 1, 2), (3, 4, 5), (6, 7, 8)]


def windows(number: int) -> tuple[int, ...]:
    """Three shards a window, the second epoch in another order."""
    epoch, inner = divmod(number, len(WINDOWS))
    return WINDOWS[inner] if epoch % 2 == 0 else WINDOWS[-1 - inner]


def schedule(*, num_readers: int = 1, max_held: int = 4) -> CaptureSchedule:
    return CaptureSchedule(windows, num_readers=num_readers, max_held=max_held)


def capture_all(state: CaptureSchedule) -> list[int]:
    """Capture until there is nothing to do."""
    done = []
    while (shard := state.next_capture()) is not None:
        state.captured(shard)
        done.append(shard)
    return done


def test_nothing_is_captured_before_somebody_asks() -> None:
    assert schedule().next_capture() is None


def test_what_is_asked_for_comes_first_then_what_follows_up_to_the_bound() -> None:
    state = schedule(max_held=5)
    assert not state.ask(0, 0, 2)
    assert capture_all(state) == [2, 0, 1, 3, 4]
    assert state.ask(0, 0, 2)
    assert state.num_in_flight == 5 and state.next_capture() is None


def test_a_demand_is_met_above_the_bound() -> None:
    state = schedule(max_held=2)
    state.ask(0, 0, 0)
    assert capture_all(state) == [0, 1]
    assert not state.ask(0, 0, 2)
    assert capture_all(state) == [2]


def test_a_shard_is_captured_once_for_all_readers() -> None:
    state = schedule(num_readers=3, max_held=0)
    for reader in range(3):
        assert not state.ask(reader, 0, 1)
    assert state.next_capture() == 1
    assert not state.ask(0, 0, 1) and state.next_capture() is None, "it is under way"
    state.captured(1)
    assert all(state.ask(reader, 0, 1) for reader in range(3))
    assert state.next_capture() is None


def test_a_window_is_dropped_when_the_slowest_reader_has_left_it() -> None:
    state = schedule(num_readers=2, max_held=3)
    state.ask(0, 0, 0)
    assert capture_all(state) == [0, 1, 2]
    assert state.drop() == [], "the second reader has not come yet"
    state.ask(1, 0, 0)
    state.ask(0, 1, 3)
    assert state.drop() == []
    state.ask(1, 1, 3)
    assert state.drop() == [0, 1, 2]
    assert state.held == frozenset() and capture_all(state) == [3, 4, 5]


def test_readers_in_different_windows_never_wait_for_each_other() -> None:
    """The fast one's demands are met although the slow one holds the bound: a step may lie across two windows."""
    state = schedule(num_readers=2, max_held=3)
    state.ask(0, 0, 0)
    state.ask(1, 0, 0)
    capture_all(state)
    for shard in windows(1):
        assert not state.ask(1, 1, shard)
        assert capture_all(state) == [shard]
    assert state.held == {0, 1, 2, 3, 4, 5}


def test_a_shard_that_the_next_window_needs_too_is_not_captured_again() -> None:
    state = CaptureSchedule(lambda number: (0, 1), num_readers=1, max_held=9)
    state.ask(0, 0, 0)
    assert capture_all(state) == [0, 1]
    assert state.ask(0, 1, 1)
    assert state.drop() == [] and capture_all(state) == []


def test_a_reader_that_left_holds_nothing() -> None:
    state = schedule(num_readers=2, max_held=3)
    state.ask(0, 0, 0)
    state.ask(1, 0, 0)
    capture_all(state)
    state.leave(0)
    assert state.drop() == []
    state.leave(1)
    assert state.drop() == [0, 1, 2]
    assert capture_all(state) == []
    assert not state.ask(0, 0, 1) and state.next_capture() == 1


def test_a_failed_shard_is_tried_again_only_when_it_is_asked_for() -> None:
    state = schedule(max_held=3)
    state.ask(0, 0, 1)
    assert state.next_capture() == 1
    state.failed(1)
    assert capture_all(state) == [0, 2, 3]
    assert not state.ask(0, 0, 1)
    assert state.next_capture() == 1


def test_a_reader_may_go_back() -> None:
    state = schedule(max_held=3)
    state.ask(0, 5, windows(5)[0])
    capture_all(state)
    state.ask(0, 1, 4)
    assert state.next_capture() == 4
    assert not set(state.drop()) & {3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("max_held", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("num_readers", [1, 2, 3])
def test_in_any_order_everything_comes_and_the_bound_holds(num_readers: int, max_held: int) -> None:
    """Readers that walk through the windows in random interleavings, at most a window apart."""
    source = random.Random(100 * num_readers + max_held)
    state = schedule(num_readers=num_readers, max_held=max_held)
    at = dict.fromkeys(range(num_readers), 0)
    todo = {reader: [(window, shard) for window in range(8) for shard in windows(window)] for reader in at}
    captures = 0
    while any(todo.values()):
        reader = source.choice([r for r, rest in todo.items() if rest])
        window, shard = todo[reader][0]
        if window > min(rest[0][0] for rest in todo.values() if rest) + 1:
            continue
        while not state.ask(reader, window, shard):
            state.drop()
            while (job := state.next_capture()) is not None:
                captures += 1
                assert job == shard or state.num_in_flight <= max_held, "captured too far ahead"
                state.captured(job)
        state.drop()
        todo[reader].pop(0)
        # Two windows of three shards on either side, and what is captured ahead.
        assert len(state.held) <= 6 + max_held
    assert captures <= 8 * 3, "captured more often than once a window"
    assert captures >= 9
