"""Shipped recipes: functions that return a complete :class:`RunSpec`."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from draftline.errors import SpecError
from draftline.spec.load import derive
from draftline.spec.models import RunSpec


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
        "evaluation.max_new_tokens": 80,
    }
    return derive(spec, overrides)


RECIPES: dict[str, Callable[[], RunSpec]] = {
    "smollm2-135m": smollm2_135m,
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
