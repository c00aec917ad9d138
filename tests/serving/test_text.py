"""Detokenising and cutting: the concatenation of the pieces is the whole, however tokens and chunks fall."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from serving.text import MAX_HELD_CHARS, REPLACEMENT, Detokenizer, StopCutter
from tests.serving.scripted_engine import ByteText


def _pieces(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


class FastTokenizer:
    """A Rust tokenizer as a decoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def decode(self, ids: Sequence[int], /) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.fixture(scope="module")
def byte_level() -> FastTokenizer:
    """A small byte-level BPE, the kind that SmolLM, Llama 3 and Qwen use: merges cut through characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["naïve café 😀😃😄 日本語のテキスト", "the ticket says 😀 ünïcode"] * 20, trainer)
    return FastTokenizer(tokenizer)


@given(st.text())
def test_valid_text_comes_out_whole_when_every_byte_is_a_token(text: str) -> None:
    pieces = _pieces(Detokenizer(ByteText()), list(text.encode()))
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


@given(st.lists(st.integers(0, 256), max_size=60))
def test_any_bytes_come_out_as_the_whole_decodes(ids: list[int]) -> None:
    text = ByteText()
    assert "".join(_pieces(Detokenizer(text), ids)) == text.decode(ids)


@given(data=st.data())
def test_any_ids_of_a_byte_level_bpe_come_out_as_the_whole_decodes(
    byte_level: FastTokenizer, data: st.DataObject
) -> None:
    size = byte_level.tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=60))
    assert "".join(_pieces(Detokenizer(byte_level), ids)) == byte_level.decode(ids)


@given(text=st.text(alphabet="aé日😀 n"))
def test_a_byte_level_bpe_never_shows_half_a_character(byte_level: FastTokenizer, text: str) -> None:
    pieces = _pieces(Detokenizer(byte_level), byte_level.tokenizer.encode(text).ids)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_byte_fallback_decoder_keeps_its_spaces_and_characters() -> None:
    vocabulary = {"<unk>": 0, "▁hi": 1, "▁": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = [1, 1, 2, *(3 + b for b in "😀".encode()), 1]
    pieces = _pieces(Detokenizer(FastTokenizer(tokenizer)), ids)
    assert "".join(pieces) == FastTokenizer(tokenizer).decode(ids) == "hi hi 😀 hi"
    assert pieces == ["hi", " hi", " ", "", "", "", "😀", " hi", ""]


def test_text_waits_for_at_most_the_bytes_of_one_character() -> None:
    detokenizer = Detokenizer(ByteText())
    shown = "".join(detokenizer.push(0xFF) for _ in range(50))
    assert len(shown) == 50 - MAX_HELD_CHARS


def test_ignored_end_tokens_do_not_grow_the_window() -> None:
    detokenizer = Detokenizer(ByteText())
    for token in [ord("a"), *[256] * 500, ord("b")]:
        detokenizer.push(token)
    assert len(detokenizer._ids) <= 4


def _cut_by_definition(text: str, stops: Sequence[str]) -> str:
    """Reads character by character, as the documentation of StopCutter says."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - len(max(complete, key=len))]
    return text


_SHORT = st.text(alphabet="ab\n", min_size=1, max_size=4)


@given(st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12), st.lists(_SHORT, max_size=4))
def test_the_cut_does_not_depend_on_the_chunks(chunks: list[str], stops: list[str]) -> None:
    cutter = StopCutter(stops)
    shown = "".join(cutter.push(chunk) for chunk in chunks) + cutter.flush()
    whole = "".join(chunks)
    assert shown == _cut_by_definition(whole, stops)
    assert cutter.is_hit == any(stop in whole for stop in stops)


@given(st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12), st.lists(_SHORT, min_size=1, max_size=4))
def test_nothing_shown_is_taken_back_whatever_follows(chunks: list[str], stops: list[str]) -> None:
    cutter, fed, shown = StopCutter(stops), "", ""
    for chunk in chunks:
        fed, shown = fed + chunk, shown + cutter.push(chunk)
        for rest in ["", *(stop[n:] for stop in stops for n in range(len(stop)))]:
            assert _cut_by_definition(fed + rest, stops).startswith(shown)


def test_text_that_cannot_be_a_stop_string_is_shown_at_once() -> None:
    cutter = StopCutter(["###"])
    assert [cutter.push(t) for t in ("ab", "c#", "#d", "##")] == ["ab", "c", "##d", ""]
    assert cutter.push("#tail") == "" and cutter.is_hit
    assert cutter.push("more") == "" == cutter.flush()
