"""Every command line in the pages is one that the program, or the Makefile, would take."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer

from draftline.spec import parse_overrides, recipe
from pipelines.cli import app
from pipelines.preflight import resolve_spec
from tests.docs.pages import PAGES, ROOT, code_lines

ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=\S*")


def command_lines(page: str, program: str) -> list[list[str]]:
    """Arguments of every command line of a program on a page, as a shell would split it."""
    found = []
    for line in code_lines((ROOT / page).read_text(encoding="utf-8")):
        if program not in line:
            continue
        words = shlex.split(re.split(r" [>|] ", line)[0], comments=True)
        while words and ASSIGNMENT.fullmatch(words[0]):
            words = words[1:]
        if words and words[0].rpartition("/")[2] == program:
            found.append(words[1:])
    return found


def check_draftline(arguments: list[str]) -> None:
    """Parse a command line as the program does, without running the command; raises what typer raises."""
    group: Any = typer.main.get_command(app)
    with group.make_context("draftline", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, list(arguments))
        # A command's bare name in running text speaks of the command; it is no line to copy.
        if rest:
            with command.make_context(name, rest, parent=context) as inner:
                check_values(inner.params)


def check_values(parameters: dict[str, Any]) -> None:
    """Overrides and recipes must exist too; a spec file need not."""
    if parameters.get("assignments"):
        resolve_spec(None, parameters.get("recipe_name") or "smollm2-135m", parameters["assignments"])
        assert parse_overrides(parameters["assignments"])
    if parameters.get("recipe_name"):
        recipe(parameters["recipe_name"])


def make_targets() -> set[str]:
    """Targets that the Makefile defines."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = re.findall(r"^([A-Za-z0-9_. -]+):(?![=:])", text, re.MULTILINE)
    return {target for line in lines for target in line.split() if not target.startswith(".")}


@pytest.mark.parametrize("page", PAGES)
def test_draftline_commands_are_real(page: str) -> None:
    for arguments in command_lines(page, "draftline"):
        # "KEY=VALUE" and "part.field=value" stand for any assignment.
        shown = " ".join(arguments)
        if arguments and "KEY=VALUE" not in shown and "part.field=value" not in shown:
            check_draftline(arguments)


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_are_real(page: str) -> None:
    wanted = {
        word
        for words in command_lines(page, "make")
        for word in words
        if not ASSIGNMENT.fullmatch(word) and not word.startswith("-")
    }
    assert wanted <= (make_targets() if wanted else set())


def test_the_readme_names_every_command_and_the_two_targets() -> None:
    group: Any = typer.main.get_command(app)
    named = {arguments[0] for arguments in command_lines("README.md", "draftline") if arguments}
    assert named >= set(group.commands)
    assert {"demo", "test"} <= {words[0] for words in command_lines("README.md", "make") if words}


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["run", "--no-such-option"],
        ["compile", "-o"],
        ["validate", "--set"],
        ["run", "--recipe", "smollm2-136m"],
        ["run", "spec.yaml", "--set", "draft.layers=2"],
    ],
)
def test_the_check_refuses_what_the_program_refuses(arguments: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|requires an argument|no recipe|no key"):
        check_draftline(arguments)
