"""Recipes: each resolves through the parser, and has the reference's settings where it has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from draftline.planner import target_facts
from draftline.spec import RECIPES, RunSpec, derive, recipe
from draftline.spec.recipes import spec_for_target
from pipelines.cli import app

# deepseek-ai/DeepSpec, config/dspark/dspark_*.py: target, target_layer_ids, mask_token_id.
REFERENCE = {
    "qwen3-4b": ("Qwen/Qwen3-4B", (1, 9, 17, 25, 33), 151669),
    "qwen3-8b": ("Qwen/Qwen3-8B", (1, 9, 17, 25, 33), 151669),
    "qwen3-14b": ("Qwen/Qwen3-14B", (1, 10, 19, 28, 37), 151669),
    "gemma4-12b": ("google/gemma-4-12B-it", (5, 17, 29, 41, 46), 4),
}
# The models' cards, without thinking.
SAMPLING = {
    "qwen3-4b": (0.7, 0.8, 20),
    "qwen3-8b": (0.7, 0.8, 20),
    "qwen3-14b": (0.7, 0.8, 20),
    "gemma4-12b": (1.0, 0.95, 64),
    "llama3.1-8b": (0.6, 0.9, 0),
}
LARGE = [name for name in RECIPES if name != "smollm2-135m"]


def test_the_issues_recipes_are_all_there() -> None:
    assert set(RECIPES) == {"smollm2-135m", *REFERENCE, "llama3.1-8b"}


@pytest.mark.parametrize("name", REFERENCE)
def test_a_recipe_names_the_references_target_taps_and_mask(name: str) -> None:
    spec = recipe(name)
    assert (spec.target.source, spec.draft.target_layer_ids, spec.draft.mask_token_id) == REFERENCE[name]


@pytest.mark.parametrize("name", LARGE)
def test_a_recipe_has_the_references_settings(name: str) -> None:
    spec = recipe(name)
    draft, train = spec.draft, spec.train
    assert (draft.algorithm, draft.num_layers, draft.block_size, draft.vocab_size) == ("dspark", 5, 7, 0)
    assert (draft.markov_rank, draft.markov_head) == (256, "vanilla")
    assert draft.enable_confidence_head and draft.confidence_with_markov
    assert (train.optimizer, train.lr, train.warmup_fraction) == ("adamw", 6e-4, 0.04)
    assert (train.weight_decay, train.grad_clip) == (0.0, 1.0)
    assert (train.samples_per_step, train.anchors_per_sample, train.epochs) == (512, 512, 10)
    assert (train.precision, train.parallel, train.micro_batch, train.num_workers) == ("bf16", "ddp", 1, 8)
    # l1_loss_alpha=0.9 weighs the L1 distance, which is twice the total variation.
    assert (train.loss.ce, train.loss.tv / 2, train.loss.confidence) == (0.1, 0.9, 1.0)
    assert train.loss.position_decay == 4.0
    assert (spec.tokens.max_length, spec.target.dtype, spec.target.enable_thinking) == (4096, "bf16", False)
    law = spec.responses.sampling
    assert (law.temperature, law.top_p, law.top_k) == SAMPLING[name]


@pytest.mark.parametrize("name", RECIPES)
def test_taps_fit_the_target(name: str) -> None:
    spec = recipe(name)
    facts = target_facts(spec.target)
    ids = spec.draft.target_layer_ids or (0,)
    assert all(0 <= layer < facts.num_layers - 1 for layer in ids)
    assert (spec.draft.mask_token_id or 0) < facts.vocab_size


@pytest.mark.parametrize("name", RECIPES)
def test_a_printed_recipe_is_valid(name: str, tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["recipes", name])
    assert printed.exit_code == 0
    path = tmp_path / "spec.yaml"
    path.write_text(printed.stdout, encoding="utf-8")
    validated = CliRunner().invoke(app, ["validate", str(path)])
    assert validated.exit_code == 0, validated.stderr
    assert recipe(name).target.source in validated.stdout
    piped = CliRunner().invoke(app, ["validate"], input=printed.stdout)
    assert piped.exit_code == 0, piped.stderr
    assert piped.stdout.startswith("standard input is valid") and recipe(name).target.source in piped.stdout


def test_a_piped_spec_is_checked_with_overrides() -> None:
    printed = CliRunner().invoke(app, ["recipes", "qwen3-4b"]).stdout
    good = CliRunner().invoke(app, ["validate", "--set", "draft.num_layers=2"], input=printed)
    assert good.exit_code == 0
    bad = CliRunner().invoke(app, ["validate", "--set", "draft.num_layers=0"], input=printed)
    assert bad.exit_code == 2 and "draft.num_layers" in bad.stderr
    broken = CliRunner().invoke(app, ["validate"], input="drafft: {}")
    assert broken.exit_code == 2 and "standard input" in broken.stderr


def test_a_target_has_its_recipe_or_the_references_settings() -> None:
    assert spec_for_target("Qwen/Qwen3-8B") == spec_for_target("qwen3-8b") == recipe("qwen3-8b")
    other = spec_for_target("someone/model", ["draft.num_layers=2"])
    assert other.target.source == "someone/model"
    assert (other.draft.target_layer_ids, other.draft.mask_token_id, other.draft.num_taps) == (None, None, 5)
    assert (other.draft.num_layers, other.train.lr) == (2, 6e-4)
    assert derive(recipe("qwen3-4b"), {"train.lr": 1e-3}) == spec_for_target("Qwen/Qwen3-4B", ["train.lr=0.001"])
    assert spec_for_target("someone/model") != RunSpec()
