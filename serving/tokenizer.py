"""The target's tokenizer, as the HTTP side needs it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from draftline.target.chat import chat_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerText:
    """A transformers tokenizer behind :class:`serving.service.TextModel`.

    Args:
        tokenizer: The target's.
        vocab_size: Rows of the target's embedding.
        enable_thinking: Of the spec, so that conversations are written as in training.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, enable_thinking: bool = False) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._enable_thinking = enable_thinking

    @property
    def vocab_size(self) -> int:
        """See :class:`serving.service.TextModel`."""
        return self._vocab_size

    @cached_property
    def max_token_chars(self) -> int:
        """See :class:`serving.service.TextModel`."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str) -> list[int]:
        """See :class:`serving.service.TextModel`."""
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """See :class:`serving.service.TextModel`.

        Raises:
            TargetError: the tokenizer has no chat template.
        """
        return list(chat_ids(self._tokenizer, messages, enable_thinking=self._enable_thinking))

    def decode(self, ids: Sequence[int], /) -> str:
        """See :class:`serving.service.TextModel`."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def token_text(self, token_id: int) -> str:
        """See :class:`serving.service.TextModel`."""
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)
