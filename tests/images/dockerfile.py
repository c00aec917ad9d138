"""The Dockerfile, read into stages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = ("cpu", "gpu", "serve")


@dataclass(frozen=True)
class Stage:
    """One ``FROM``.

    Attributes:
        name: After ``AS``.
        parent: The image or stage it starts from.
        instructions: Keyword and the rest, lines joined.
    """

    name: str
    parent: str
    instructions: tuple[tuple[str, str], ...]

    def all(self, keyword: str) -> list[str]:
        """The arguments of every such instruction."""
        return [rest for word, rest in self.instructions if word == keyword]

    @property
    def labels(self) -> dict[str, str]:
        """Its OCI labels, by the part of the name after ``org.opencontainers.image``."""
        return dict(re.findall(r'org\.opencontainers\.image\.(\S+?)="([^"]*)"', " ".join(self.all("LABEL"))))


def read_dockerfile() -> tuple[dict[str, str], dict[str, Stage]]:
    """The arguments before the first stage, and the stages by name."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in text.replace("\\\n", " ").splitlines():
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "FROM":
            parent, _, name = rest.partition(" AS ")
            stages[name] = Stage(name, parent, ())
        elif keyword and not stages:
            assert keyword == "ARG", line
            key, _, value = rest.partition("=")
            arguments[key] = value
        elif keyword:
            last = list(stages.values())[-1]
            stages[last.name] = Stage(last.name, last.parent, (*last.instructions, (keyword, rest.strip())))
    return arguments, stages


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """A stage and those that it starts from, the last one first."""
    chain = [stages[name]]
    while (parent := chain[-1].parent) in stages:
        chain.append(stages[parent])
    return chain
