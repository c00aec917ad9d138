"""Training, evaluation and serving write a conversation with the same ids, thinking or not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from draftline.errors import TargetError
from draftline.responses.generate import prompt_ids
from draftline.spec import TargetSpec
from draftline.target.chat import chat_ids
from draftline.target.load import Target, load_target
from serving.tokenizer import TokenizerText
from tests.servers.tiny_target import CHAT_TEMPLATE, make_tokenizer

# What Qwen3's template does: without thinking, the answer begins with an empty thought.
THINKING = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "where is my parcel 3?"}]


def test_thinking_is_as_the_spec_says() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    on, off = (chat_ids(tokenizer, MESSAGES, enable_thinking=flag) for flag in (True, False))
    assert tokenizer.decode(off[len(on) :]) == "<think>\n\n</think>\n\n"
    assert off[: len(on)] == on
    assert tokenizer.decode(on).endswith("<|im_start|>assistant\n")


def test_a_template_without_thinking_does_not_read_it() -> None:
    tokenizer = make_tokenizer()
    on, off = (chat_ids(tokenizer, MESSAGES, enable_thinking=flag) for flag in (True, False))
    assert on == off


@pytest.mark.parametrize("enable_thinking", [True, False])
def test_the_server_writes_what_training_wrote(loaded_target: Target, enable_thinking: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINKING
    target = replace(loaded_target, tokenizer=tokenizer, enable_thinking=enable_thinking)
    served = TokenizerText(tokenizer, target.vocab_size, enable_thinking=target.enable_thinking)
    assert served.encode_chat(MESSAGES) == list(prompt_ids(target, MESSAGES))
    other = TokenizerText(tokenizer, target.vocab_size, enable_thinking=not enable_thinking)
    assert other.encode_chat(MESSAGES) != served.encode_chat(MESSAGES)


def test_the_spec_reaches_the_target(loaded_target: Target) -> None:
    assert not loaded_target.enable_thinking
    spec = TargetSpec(source=str(loaded_target.folder), enable_thinking=True)
    assert load_target(spec, dtype="fp32").enable_thinking


def test_without_a_template_it_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TargetError, match="no chat template"):
        chat_ids(tokenizer, MESSAGES, enable_thinking=False)
