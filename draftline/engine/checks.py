"""What an engine refuses: impossible requests, and drafts that are not for its target."""

from __future__ import annotations

from draftline.draft.config import DraftConfig
from draftline.engine.requests import MAX_TOP_LOGPROBS, EngineRequest, SamplingParams
from draftline.errors import InputError, TargetError
from draftline.target.config import ModelConfig

MAX_BLOCK_SIZE = 64
"""Positions beyond the context that a block may be written to."""


def check_request(request: EngineRequest, max_context: int, vocab_size: int) -> None:
    """Refuse a request that the engine cannot answer.

    Args:
        request: The request.
        max_context: Prompt plus answer tokens of one request.
        vocab_size: Of the target.

    Raises:
        InputError: it is empty, does not fit the context, or asks for an impossible law.
    """
    prompt, sampling = request.prompt_ids, request.sampling
    if not prompt:
        raise InputError("the prompt is empty", expected="at least one token")
    if sampling.max_tokens < 1:
        raise InputError("max_tokens is too small", got=sampling.max_tokens, expected="at least 1")
    if len(prompt) + sampling.max_tokens > max_context:
        raise InputError(
            "the request does not fit the context",
            got=f"{len(prompt)} prompt + {sampling.max_tokens} new tokens",
            expected=f"at most {max_context} together",
            remedy="Shorten the prompt or lower max_tokens",
        )
    bad = [t for t in prompt if not 0 <= t < vocab_size]
    if bad:
        raise InputError("the prompt has a token outside the vocabulary", got=bad[0])
    _check_law(sampling)


def _check_law(sampling: SamplingParams) -> None:
    ranges = {
        "temperature": (0 <= sampling.temperature < float("inf"), "at least 0"),
        "top_p": (0 < sampling.top_p <= 1, "above 0, at most 1"),
        "top_k": (sampling.top_k >= 0, "at least 0"),
        "seed": (sampling.seed is None or sampling.seed >= 0, "at least 0"),
        "num_top_logprobs": (0 <= sampling.num_top_logprobs <= MAX_TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
    }
    for name, (is_possible, expected) in ranges.items():
        if not is_possible:
            raise InputError(f"{name} is out of range", got=getattr(sampling, name), expected=expected)


def check_fits(config: DraftConfig, target: ModelConfig) -> None:
    """Refuse a draft that was made for another target, or that this engine cannot run.

    Raises:
        TargetError: hidden size, depth or vocabulary differ, or a tapped layer, the mask token or the block
            is out of range.
    """
    pairs = {
        "hidden size": (config.hidden_size, target.hidden_size),
        "vocabulary": (config.vocab_size, target.vocab_size),
        "target layers": (config.num_target_layers, target.num_layers),
    }
    for what, (got, expected) in pairs.items():
        if got != expected:
            raise TargetError(
                f"the draft does not fit the target: its {what} differs",
                got=got,
                expected=str(expected),
                remedy="Deploy a draft that was trained for this target",
            )
    taps = config.target_layer_ids
    limits: dict[str, tuple[bool, object, str]] = {
        "target_layer_ids": (
            bool(taps) and list(taps) == sorted(set(taps)) and taps[0] >= -1 and taps[-1] < target.num_layers - 1,
            list(taps),
            f"ascending ids from -1 to {target.num_layers - 2}",
        ),
        "mask_token_id": (
            0 <= config.mask_token_id < target.vocab_size,
            config.mask_token_id,
            f"0 to {target.vocab_size - 1}",
        ),
        "block_size": (1 <= config.block_size <= MAX_BLOCK_SIZE, config.block_size, f"1 to {MAX_BLOCK_SIZE}"),
    }
    for name, (is_possible, found, wanted) in limits.items():
        if not is_possible:
            raise TargetError(
                f"the draft cannot be run: {name} is out of range",
                got=found,
                expected=wanted,
                remedy="Deploy a draft that was exported for this target",
            )
