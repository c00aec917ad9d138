"""A captured request as a line of a prompts file, redacted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from draftline.traffic.redaction import Redactor


@dataclass(frozen=True)
class Asked:
    """The user's side of a conversation, as it was sent.

    Attributes:
        system: System prompt, or ``None``.
        turns: What the user said, in order; at least one.
        num_bytes: UTF-8 bytes of all of it.
    """

    system: str | None
    turns: tuple[str, ...]
    num_bytes: int

    @classmethod
    def of(cls, messages: Sequence[tuple[str, str]]) -> Asked | None:
        """Out of (role, text) pairs, or ``None`` without a user's turn.

        Answers are left out: the next run's target writes its own. So are
        system messages after the first, as in any prompts file.
        """
        turns = tuple(text for role, text in messages if role == "user" and text.strip())
        if not turns:
            return None
        system = next((text for role, text in messages if role in ("system", "developer") and text.strip()), None)
        # A lone surrogate is no text; it takes three bytes here, and none later.
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in (*turns, system or ""))
        return cls(system, turns, num_bytes)


def to_line(asked: Asked, domain: str, redactor: Redactor) -> tuple[bytes, dict[str, int]]:
    """One line of a prompts file, with its line feed.

    It holds the turns, the system prompt and the domain, all redacted, and
    nothing that tells whose or when it was.

    Returns:
        The line, and how often each rule was applied.
    """
    counts: dict[str, int] = {}

    def clean(text: str) -> str:
        cleaned, found = redactor.redact(text.encode("utf-8", "replace").decode())
        for name, number in found.items():
            counts[name] = counts.get(name, 0) + number
        return cleaned

    document: dict[str, object] = {"domain": domain}
    if asked.system is not None:
        document["system"] = clean(asked.system)
    document["turns"] = [clean(turn) for turn in asked.turns]
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n", counts
