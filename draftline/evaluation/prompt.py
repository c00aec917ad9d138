"""One prompt of an evaluation suite."""

from __future__ import annotations

from dataclasses import dataclass


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
