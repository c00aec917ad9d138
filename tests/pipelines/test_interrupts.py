"""Signals that ask for an end, and those that were to be ignored from the start."""

from __future__ import annotations

import os
import signal

import pytest

from pipelines.interrupts import terminate_as_interrupt

ENDING = [signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_it_becomes_an_interrupt(number: signal.Signals) -> None:
    # The tests themselves may have been started to ignore it.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_what_the_parent_ignored_stays_ignored(number: signal.Signals) -> None:
    """As under ``nohup``."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with terminate_as_interrupt():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_IGN
    except KeyboardInterrupt:
        # Let through, it would end all of the tests.
        pytest.fail("the signal was not ignored")
    finally:
        signal.signal(number, before)
