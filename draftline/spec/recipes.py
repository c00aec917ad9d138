"""Shipped recipes: functions that return a complete :class:`RunSpec`.

The recipes of large targets take their hyper-parameters from the public
reference (deepseek-ai/DeepSpec, ``config/dspark/*.py`` and
``scripts/data/README.md``). Where it has none, or where this product differs,
the recipe says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from draftline.errors import SpecError
from draftline.spec.load import derive, parse_overrides
from draftline.spec.models import RunSpec

_REFERENCE: Mapping[str, Any] = {
    # Any file of prompts; the reference's are mlabonne/open-perfectblend, 5 % of it held out.
    "prompts.source": "prompts.jsonl",
    "prompts.holdout_fraction": 0.03,
    "prompts.validation_fraction": 0.01,
    "prompts.calibration_fraction": 0.01,
    # It answers with at most 4,096 tokens and trains on the first 4,096 of each sample.
    "responses.max_new_tokens": 4096,
    "tokens.max_length": 4096,
    # A shard is what a killed worker does again: 2 GB in bf16 for the smallest target.
    "tokens.shard_tokens": 65536,
    "draft.num_layers": 5,
    "draft.block_size": 7,
    "draft.vocab_size": 0,
    "draft.markov_rank": 256,
    "draft.markov_head": "vanilla",
    "draft.enable_confidence_head": True,
    "draft.confidence_with_markov": True,
    # Eight GPUs, each with the whole draft and one sample at a time.
    "train.num_workers": 8,
    "train.parallel": "ddp",
    "train.micro_batch": 1,
    "train.precision": "bf16",
    "train.epochs": 10,
    "train.samples_per_step": 512,
    "train.anchors_per_sample": 512,
    "train.optimizer": "adamw",
    "train.lr": 6e-4,
    "train.warmup_fraction": 0.04,
    "train.weight_decay": 0.0,
    "train.grad_clip": 1.0,
    "train.checkpoint_every_steps": 500,
    "train.validate_every_steps": 500,
    "train.validation_samples": 256,
    "train.loss.ce": 0.1,
    # 0.9 times the L1 distance (equation 10, and its code); total variation is half of that.
    "train.loss.tv": 2 * 0.9,
    "train.loss.confidence": 1.0,
    "train.loss.position_decay": 4.0,
    "evaluation.max_new_tokens": 2048,
    "calibration.max_prompts": 256,
    "calibration.max_new_tokens": 512,
    "serving.max_context": 8192,
}


def smollm2_135m() -> RunSpec:
    """SmolLM2-135M-Instruct on the shipped support desk; the demo. Fits 2 CPU cores and 20 minutes."""
    spec = RunSpec()
    # The desk's answers use some 2,300 distinct tokens; a small head drafts and trains faster.
    # With minutes of training, cross-entropy finds the likely tokens that total variation then weighs.
    overrides = {
        "responses.max_new_tokens": 80,
        "draft.vocab_size": 4096,
        "train.steps": 180,
        "train.checkpoint_every_steps": 30,
        "train.loss.ce": 1.0,
        "train.loss.tv": 1.0,
        "calibration.max_new_tokens": 64,
        "evaluation.max_prompts": 40,
        "evaluation.sampled_prompts": 12,
        "evaluation.max_new_tokens": 80,
    }
    return derive(spec, overrides)


def qwen3_4b() -> RunSpec:
    """Qwen3-4B, non-thinking, as the reference trains it: 5 layers, block 7, 1.3 M prompts, 10 epochs."""
    return _qwen3("4b", (1, 9, 17, 25, 33))


def qwen3_8b() -> RunSpec:
    """Qwen3-8B, non-thinking, as the reference trains it."""
    return _qwen3("8b", (1, 9, 17, 25, 33))


def qwen3_14b() -> RunSpec:
    """Qwen3-14B, non-thinking, as the reference trains it."""
    return _qwen3("14b", (1, 10, 19, 28, 37))


def gemma4_12b() -> RunSpec:
    """Gemma-4-12B-it, non-thinking, text only, as the reference trains it."""
    return _reference(
        "gemma4-12b",
        "google/gemma-4-12B-it",
        (5, 17, 29, 41, 46),
        mask_token_id=4,
        # The model card's sampling.
        sampling={"temperature": 1.0, "top_p": 0.95, "top_k": 64},
    )


def llama3_1_8b() -> RunSpec:
    """Llama-3.1-8B-Instruct; the reference has no such recipe, this one carries its settings over."""
    return _reference(
        # "3.1" would be no name for an endpoint.
        "llama3-1-8b",
        "meta-llama/Llama-3.1-8B-Instruct",
        # Spread as the reference spreads them over Qwen3's 36 layers: the second, the last but two, even steps between.
        (1, 8, 15, 22, 29),
        # <|reserved_special_token_0|>, which nothing uses (<|finetune_right_pad_id|>, 128004, is padding to others).
        mask_token_id=128002,
        # The published generation_config.json.
        sampling={"temperature": 0.6, "top_p": 0.9},
    )


def _qwen3(size: str, taps: tuple[int, ...]) -> RunSpec:
    return _reference(
        f"qwen3-{size}",
        f"Qwen/Qwen3-{size.upper()}",
        taps,
        mask_token_id=151669,
        # The model card's sampling without thinking.
        sampling={"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    )


def _reference(
    name: str, source: str, taps: tuple[int, ...], *, mask_token_id: int, sampling: Mapping[str, float]
) -> RunSpec:
    return derive(
        RunSpec(),
        {
            **_REFERENCE,
            "name": name,
            "target.source": source,
            "target.dtype": "bf16",
            "draft.target_layer_ids": list(taps),
            "draft.mask_token_id": mask_token_id,
            "serving.model_name": name,
            **{f"responses.sampling.{key}": value for key, value in sampling.items()},
        },
    )


RECIPES: dict[str, Callable[[], RunSpec]] = {
    "smollm2-135m": smollm2_135m,
    "qwen3-4b": qwen3_4b,
    "qwen3-8b": qwen3_8b,
    "qwen3-14b": qwen3_14b,
    "gemma4-12b": gemma4_12b,
    "llama3.1-8b": llama3_1_8b,
}


def recipe(name: str) -> RunSpec:
    """The named recipe.

    Raises:
        SpecError: no such recipe.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise SpecError(
            f"no recipe {name!r}", expected=f"one of {sorted(RECIPES)}", remedy=f"{hint}See `draftline recipes`"
        )
    return RECIPES[name]()


def spec_for_target(source: str, assignments: list[str] | None = None) -> RunSpec:
    """The shipped recipe of a target; for any other target, the reference's settings with taps spread over its depth.

    Args:
        source: As ``target.source``, or the name of a recipe.
        assignments: ``key=value`` overrides.

    Raises:
        SpecError: an override is impossible.
    """
    overrides = parse_overrides(assignments or [])
    for name, build in RECIPES.items():
        spec = build()
        if source in (spec.target.source, name):
            return derive(spec, overrides)
    general = {"target.source": source, "draft.target_layer_ids": None, "draft.mask_token_id": None}
    return derive(RunSpec(), {**_REFERENCE, **general, **overrides})
