"""One line at a time: every shape that is read, every way a line can be wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftline.prompts.records import Prompt, parse_line

LIMIT = 50


@pytest.mark.parametrize(
    ("line", "system", "turns"),
    [
        (b'{"turns": ["Hello", "And then?"]}', None, ("Hello", "And then?")),
        (b'{"prompt": "Hello"}', None, ("Hello",)),
        (b'{"prompt": "Hello", "system": "Be brief."}', "Be brief.", ("Hello",)),
        (b'\xef\xbb\xbf{"turns": ["Hello"]}\r', None, ("Hello",)),
        ('{"turns": ["Zürich\u2028straße 快"]}'.encode(), None, ("Zürich\u2028straße 快",)),
        (
            b'{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"},'
            b' {"role": "assistant", "content": "1"}, {"role": "user", "content": [{"type": "text", "text": "Two"}]}]}',
            "Be brief.",
            ("One", "Two"),
        ),
        (b'{"messages": [{"role": "assistant", "content": null}, {"role": "user", "content": "One"}]}', None, ("One",)),
    ],
)
def test_understood_shapes(line: bytes, system: str | None, turns: tuple[str, ...]) -> None:
    assert parse_line(line, LIMIT) == Prompt("", "general", system, turns)


def test_id_and_domain_are_kept_when_usable() -> None:
    parsed = parse_line(b'{"id": "t-1", "domain": "billing", "turns": ["Hi"]}', LIMIT)
    assert parsed == Prompt("t-1", "billing", None, ("Hi",))
    parsed = parse_line(b'{"id": 7, "domain": "two\\nlines", "turns": ["Hi"]}', LIMIT)
    assert parsed == Prompt("", "general", None, ("Hi",))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"turns": ["Hello"', "malformed"),
        (b"Hello", "malformed"),
        (b'["Hello"]', "malformed"),
        (b'{"turns": "Hello"}', "malformed"),
        (b'{"turns": ["Hello", 7]}', "malformed"),
        (b'{"turns": ["Hello"], "system": 7}', "malformed"),
        (b'{"prompt": null}', "malformed"),
        (b'{"messages": [{"role": "user"}]}', "malformed"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "malformed"),
        (b'{"messages": [{"role": "wizard", "content": "Hi"}]}', "malformed"),
        (b'{"messages": "Hello"}', "malformed"),
        (b'{"turns": ["\\ud800"]}', "malformed"),
        (b"[" * 200_000, "malformed"),
        (b'{"turns": [' + b"9" * 5000 + b"]}", "malformed"),
        (b'{"turns": ["caf\xe9"]}', "not_utf8"),
        ('{"turns": ["Hi"]}'.encode("utf-16"), "not_utf8"),
        (b'{"turns": []}', "empty"),
        (b'{"turns": ["Hello", " \\n "]}', "empty"),
        (b'{"messages": [{"role": "system", "content": "Hi"}]}', "empty"),
        (b'{"question": "Hi"}', "empty"),
        (b'{"turns": ["' + b"a" * (LIMIT + 1) + b'"]}', "too_long"),
    ],
)
def test_unusable_lines_name_their_reason(line: bytes, reason: str) -> None:
    assert parse_line(line, LIMIT) == reason


@pytest.mark.parametrize("line", [b"", b"  \t", b"\xef\xbb\xbf", b"\r"])
def test_blank_lines_are_no_prompts(line: bytes) -> None:
    assert parse_line(line, LIMIT) is None


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_ever_raise(line: bytes) -> None:
    assert isinstance(parse_line(line, LIMIT), Prompt | str | None)


KEYS = st.sampled_from(["turns", "prompt", "messages", "role", "content", "id", "system", "domain"])
LEAVES = st.none() | st.booleans() | st.floats() | st.text()


@settings(deadline=None)
@given(st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(KEYS, x), max_leaves=12))
def test_no_json_ever_raises(document: object) -> None:
    parsed = parse_line(json.dumps(document).encode(), LIMIT)
    if isinstance(parsed, Prompt):
        assert all(turn.strip() for turn in parsed.turns)
        assert Prompt.from_line(parsed.to_line()) == parsed
