"""The target's tokenizer, as the HTTP side needs it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from draftline.errors import TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenizerText:
    """A transformers tokenizer behind :class:`serving.service.TextModel`.

    Args:
        tokenizer: The target's.
        vocab_size: Rows of the target's embedding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

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
        if not self._tokenizer.chat_template:
            raise TargetError("this target has no chat template", remedy="Use /v1/completions")
        rendered = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        # The template writes the leading tokens itself.
        ids: list[int] = self._tokenizer.encode(str(rendered), add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int], /) -> str:
        """See :class:`serving.service.TextModel`."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def token_text(self, token_id: int) -> str:
        """See :class:`serving.service.TextModel`."""
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)
