"""One line of a prompts file: bytes in, a :class:`Prompt` or the reason why not out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

Rejection = Literal["malformed", "not_utf8", "empty", "too_long"]

GENERAL_DOMAIN = "general"
MAX_ID_CHARS = 128

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Prompt:
    """One conversation's user side.

    Attributes:
        id: Unique within a run; empty while none is assigned.
        domain: Label that is carried to the report, ``"general"`` when unknown.
        system: System prompt, or ``None``.
        turns: User turns, at least one, none blank.
    """

    id: str
    domain: str
    system: str | None
    turns: tuple[str, ...]

    def to_line(self) -> str:
        """One JSON line, without the newline."""
        document = {"id": self.id, "domain": self.domain, "system": self.system, "turns": list(self.turns)}
        return json.dumps(document, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Prompt:
        """Parse :meth:`to_line`; for files that Draftline wrote itself.

        Raises:
            KeyError, ValueError, TypeError: not such a line.
        """
        document = json.loads(line)
        return cls(document["id"], document["domain"], document["system"], tuple(document["turns"]))


def parse_line(line: bytes, max_turn_chars: int) -> Prompt | Rejection | None:
    """Read one line of a user's file.

    Understood shapes: ``{"turns": ["...", ...]}``, ``{"prompt": "..."}`` and
    ``{"messages": [{"role": ..., "content": ...}]}`` (assistant messages are
    left out: the target writes its own). ``id``, ``domain`` and ``system``
    are optional beside each.

    Args:
        line: Raw bytes, with or without a line end.
        max_turn_chars: A longer user turn rejects the prompt.

    Returns:
        The prompt, why it was rejected, or ``None`` for a blank line.
    """
    stripped = line.removeprefix(_BOM).strip()
    if not stripped:
        return None
    try:
        text = stripped.decode("utf-8")
    except UnicodeDecodeError:
        return "not_utf8"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return "malformed"
    extracted = _extract(document)
    if extracted is None or not _encodable(extracted):
        return "malformed"
    system, turns = extracted
    turns = [turn.strip() for turn in turns]
    if not turns or not all(turns):
        return "empty"
    if any(len(turn) > max_turn_chars for turn in turns):
        return "too_long"
    return Prompt(_label(document.get("id"), ""), _label(document.get("domain"), GENERAL_DOMAIN), system, tuple(turns))


def _extract(document: Any) -> tuple[str | None, list[str]] | None:
    """System prompt and user turns of any understood shape, or ``None``."""
    if not isinstance(document, dict):
        return None
    system = document.get("system")
    if system is not None and not isinstance(system, str):
        return None
    if "turns" in document:
        turns = document["turns"]
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            return None
        return system or None, turns
    if "messages" in document:
        return _extract_messages(document["messages"], system or None)
    if "prompt" in document:
        prompt = document["prompt"]
        return (system or None, [prompt]) if isinstance(prompt, str) else None
    # A record without any of the keys holds no turns: count it as empty, not as broken JSON.
    return system or None, []


def _extract_messages(messages: Any, system: str | None) -> tuple[str | None, list[str]] | None:
    if not isinstance(messages, list):
        return None
    turns: list[str] = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role"), _content_text(message.get("content"))
        if role in ("system", "developer", "user") and content is None:
            return None
        if role == "user" and content is not None:
            turns.append(content)
        elif role in ("system", "developer") and system is None:
            system = content or None
        elif role not in ("system", "developer", "assistant", "tool"):
            return None
    return system, turns


def _content_text(content: Any) -> str | None:
    """Text of a chat message: a string, or a list of ``{"type": "text"}`` parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part for part in parts if isinstance(part, str)]
    return "\n".join(texts) if texts and len(texts) == len(content) else None


def _encodable(extracted: tuple[str | None, list[str]]) -> bool:
    # JSON can spell lone surrogates ("\ud800"), which no UTF-8 file and no tokenizer can hold.
    try:
        "".join([extracted[0] or "", *extracted[1]]).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _label(value: Any, default: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_ID_CHARS or not value.isprintable():
        return default
    return value.strip()
