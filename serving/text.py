"""From tokens to text a client may see: incremental detokenisation and stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

MAX_HELD_CHARS = 3
"""UTF-8 needs at most three bytes before the one that completes a character.

A byte-level decoder shows an incomplete character as one replacement
character, a byte-fallback decoder as one per byte; longer runs are final.
"""


class Decoder(Protocol):
    """The part of a tokenizer that turns ids into text; adding an id never changes settled text."""

    def decode(self, ids: Sequence[int], /) -> str:
        """Text of the ids, special tokens left out, spaces as they are."""
        ...


class Detokenizer:
    """Turns a growing id sequence into text pieces whose concatenation is the whole text.

    A character whose bytes are spread over tokens appears once complete;
    replacement characters appear only where the bytes are truly invalid. Each
    push decodes a short window: the tokens since the last-but-one settled
    boundary, so that decoders which treat a first token differently (a
    stripped leading space) still see a neighbour.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._ids: list[int] = []
        self._settled = 0
        self._shown_chars = 0

    def push(self, token_id: int) -> str:
        """Add one token; returns the text that became certain."""
        self._ids.append(token_id)
        text = self._decoder.decode(self._ids)
        held = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_HELD_CHARS)
        if len(text) == self._shown_chars and held == 0:
            # A token without text (an end token that was ignored): keeping it would let the window grow without end.
            self._ids.pop()
            return ""
        piece = text[self._shown_chars : len(text) - held]
        self._shown_chars = max(self._shown_chars, len(text) - held)
        if held == 0:
            self._advance()
        return piece

    def flush(self) -> str:
        """The text still held back; call once, after the last token."""
        text = self._decoder.decode(self._ids)
        piece = text[self._shown_chars :]
        self._shown_chars = len(text)
        return piece

    def _advance(self) -> None:
        del self._ids[: self._settled]
        self._settled = len(self._ids)
        self._shown_chars = len(self._decoder.decode(self._ids))


class StopCutter:
    """Cuts text at the first stop string and never lets a part of one out.

    The stop string that is complete first counts; of several complete at the
    same character, the longest. What comes out does not depend on how the
    text was split into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._tail = ""
        self.is_hit = False

    def push(self, piece: str) -> str:
        """Add text; returns what may be shown. After a hit nothing more comes."""
        if self.is_hit:
            return ""
        text = self._tail + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.is_hit, self._tail = True, ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._tail = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """The text still held back; call once, after the last piece."""
        tail, self._tail = self._tail, ""
        return tail


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of ``stop`` that ends ``text``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
