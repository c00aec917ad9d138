"""Errors say what, got, expected and remedy, survive pickling, and have distinct exit codes."""

from __future__ import annotations

import pickle

import pytest

from draftline import errors
from draftline.errors import DraftlineError, ObjectNotFound, StorageError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DraftlineError)]


def test_the_message_has_all_four_parts() -> None:
    error = DraftlineError("cannot read it.", got=3, expected="a word", remedy="Write a word.")
    assert str(error) == "cannot read it; got 3; expected a word. Write a word."
    assert str(DraftlineError("broken")) == "broken."


@pytest.mark.parametrize("kind", KINDS)
def test_pickling_keeps_everything(kind: type[DraftlineError]) -> None:
    error = kind("what", got={"a": 1}, expected="e", remedy="r")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind
    assert (back.what, back.got, back.expected, back.remedy) == ("what", {"a": 1}, "e", "r")
    assert str(back) == str(error)


def test_exit_codes_tell_the_branches_apart() -> None:
    branches = [kind for kind in KINDS if kind.__base__ is DraftlineError]
    codes = [kind.exit_code for kind in branches]
    assert sorted(codes) == list(range(2, 2 + len(branches)))
    assert ObjectNotFound.exit_code == StorageError.exit_code
