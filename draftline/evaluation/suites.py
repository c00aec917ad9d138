"""The evaluation suites: prompts only, torch-free.

A suite is the test split (``held-out``), a file of the user's, or a public
one from its installed package or the hub; in that order of preference a file
replaces what has the same name.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from io import BytesIO

from draftline.errors import FormatError, InputError
from draftline.evaluation.prompt import SuitePrompt
from draftline.evaluation.public import (
    DOMAINS,
    HUB,
    check_hub,
    hub_identity,
    humaneval_problems,
    installed_humaneval,
    load_hub,
    load_humaneval,
)
from draftline.prompts.records import GENERAL_DOMAIN, Prompt, parse_line
from draftline.prompts.source import read_location
from draftline.prompts.spread import even_spread
from draftline.spec.models import HELD_OUT, EvaluationSpec
from draftline.steps.ledger import StepResult
from draftline.storage.base import ObjectStore

_BAD_LINES_SHOWN = 5
_FILE_REMEDY = (
    'Give a .jsonl file with one {"turns": ["..."]} object a line: a path, file:///... or s3://bucket/key.jsonl'
)
_REASONS: Mapping[str, str] = {
    "malformed": 'not a JSON object with "turns", "prompt" or "messages"',
    "not_utf8": "not UTF-8",
    "empty": "no turns, or a blank turn",
    "too_long": "too long",
}


def load_suite(
    name: str, evaluation: EvaluationSpec, store: ObjectStore, prompts: StepResult, *, max_prompts: int = 0
) -> list[SuitePrompt]:
    """The prompts of one suite, in a fixed order.

    Args:
        name: A suite of the spec.
        evaluation: Where suites come from.
        store: The workspace.
        prompts: Result of the prompts station, whose test split is ``held-out`` unless a file is.
        max_prompts: Take an even spread of at most so many, 0 for all.

    Raises:
        InputError: unknown or empty suite, or it is not to be had.
        FormatError: a damaged file.
        StorageError: the workspace or an object failed.
    """
    if is_test_split(name, evaluation):
        suite = _load_held_out(store, prompts)
        if not suite:
            raise InputError(
                f"evaluation suite {name!r} has no prompts",
                remedy="Give more prompts or raise prompts.holdout_fraction",
            )
    else:
        suite = outside_suite(name, evaluation)
    return even_spread(suite, max_prompts)


def outside_suite(name: str, evaluation: EvaluationSpec) -> list[SuitePrompt]:
    """The prompts of a suite that does not come from the run's own prompts; errors as :func:`load_suite`."""
    if name in evaluation.suite_files:
        return read_suite_file(name, evaluation.suite_files[name])
    if name == "humaneval":
        return load_humaneval()
    if name in HUB:
        return load_hub(name)
    raise _unknown(name)


def is_test_split(name: str, evaluation: EvaluationSpec) -> bool:
    """Whether a suite is the test split of the run's own prompts."""
    return name == HELD_OUT and name not in evaluation.suite_files


def suite_digest(name: str, evaluation: EvaluationSpec) -> str | None:
    """What a suite's prompts follow from, as a digest; ``None`` for the test split, which the prompts' key covers.

    Of a file and of an installed package it is that of the bytes, of a hub
    suite that of the pinned revision and of how it is read.

    Raises:
        InputError: there is no such file, package or suite.
        StorageError: an object that cannot be read.
    """
    if is_test_split(name, evaluation):
        return None
    if name in evaluation.suite_files:
        return hashlib.sha256(_read_file(name, evaluation.suite_files[name])).hexdigest()
    if name == "humaneval":
        return hashlib.sha256(installed_humaneval()).hexdigest()
    if name in HUB:
        return hub_identity(name)
    raise _unknown(name)


def check_suites(evaluation: EvaluationSpec) -> None:
    """Find out before anything is computed whether every suite of the spec is to be had; errors as :func:`load_suite`.

    Hub suites are asked for, not downloaded.
    """
    for name in evaluation.suites:
        if is_test_split(name, evaluation):
            continue
        if name in HUB and name not in evaluation.suite_files:
            check_hub(name)
        else:
            outside_suite(name, evaluation)


def read_suite_file(name: str, uri: str) -> list[SuitePrompt]:
    """Read a suite from JSON lines: the shapes of a prompts file, each line usable.

    Unlike prompts to train on, no line is left out silently: a suite with
    holes would be compared with one without.

    Args:
        name: Of the suite; names the prompts that have no id.
        uri: A path, ``file:///...`` or ``s3://bucket/key.jsonl``.

    Raises:
        InputError: no such file, nothing in it, or lines that cannot be used (with number and reason).
        StorageError: an object that cannot be read.
    """
    suite: list[SuitePrompt] = []
    bad: list[str] = []
    numbers: dict[str, int] = {}
    for number, line in enumerate(BytesIO(_read_file(name, uri)), start=1):
        parsed = parse_line(line, sys.maxsize)
        if parsed is None:
            continue
        if isinstance(parsed, str):
            bad.append(f"line {number}: {_REASONS[parsed]}")
            continue
        identity = parsed.id or f"{name}/{len(suite) + len(bad)}"
        if identity in numbers:
            bad.append(f"line {number}: the id {identity!r} is that of line {numbers[identity]}")
            continue
        numbers[identity] = number
        domain = parsed.domain if parsed.domain != GENERAL_DOMAIN else DOMAINS.get(name, GENERAL_DOMAIN)
        suite.append(SuitePrompt(identity, domain, parsed.system, parsed.turns))
    if bad:
        more = f" and {len(bad) - _BAD_LINES_SHOWN} more" if len(bad) > _BAD_LINES_SHOWN else ""
        raise InputError(
            f"{uri}, the file of evaluation suite {name!r}, has {len(bad)} line(s) that cannot be used",
            got="; ".join(bad[:_BAD_LINES_SHOWN]) + more,
            remedy='Repair them; a line is such as {"turns": ["How do I return a parcel?"], "domain": "returns"}',
        )
    if not suite:
        raise InputError(f"{uri}, the file of evaluation suite {name!r}, holds no prompt", remedy=_FILE_REMEDY)
    return suite


def humaneval_texts() -> list[str]:
    """The problems of the suite that is always at hand, as published.

    Raises:
        InputError: its package is not installed.
    """
    return [problem["prompt"] for problem in humaneval_problems()]


def configured_texts(evaluation: EvaluationSpec) -> Iterator[list[str]]:
    """Every turn of each suite that the spec names, one list a suite; the test split and HumanEval's package excepted.

    Raises:
        InputError: a suite of the spec is not to be had.
        FormatError: a damaged file.
        StorageError: an object failed.
    """
    for name in dict.fromkeys([*evaluation.suites, *evaluation.suite_files]):
        is_packaged = name == "humaneval" and name not in evaluation.suite_files
        if not is_packaged and not is_test_split(name, evaluation):
            yield [turn for prompt in outside_suite(name, evaluation) for turn in prompt.turns]


def _unknown(name: str) -> InputError:
    return InputError("no such evaluation suite", got=name, expected=f"one of {[HELD_OUT, *DOMAINS]}, or a suite file")


def _read_file(name: str, uri: str) -> bytes:
    return read_location(uri, f"{name} suite", _FILE_REMEDY)


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
