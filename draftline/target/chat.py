"""Messages to token ids: the one way in which training, evaluation and serving write a conversation.

A draft learns what the target says after *these* ids. A server that wrote
conversations differently (with thinking switched on, say) would ask the draft
about contexts that it has never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from draftline.errors import TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, enable_thinking: bool
) -> tuple[int, ...]:
    """Messages through the target's own chat template, ready for its answer.

    Args:
        tokenizer: The target's.
        messages: ``role`` and ``content`` each.
        enable_thinking: Given to the template under the name that Qwen3's and
            Gemma 4's know; templates without thinking do not read it.

    Raises:
        TargetError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise TargetError(
            "this target has no chat template",
            expected="a tokenizer with chat_template",
            remedy="Take an instruction-tuned target; a server still completes plain text at /v1/completions",
        )
    ids: Any = tokenizer.apply_chat_template(
        list(messages),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
        enable_thinking=enable_thinking,
    )
    return tuple(int(i) for i in ids)
