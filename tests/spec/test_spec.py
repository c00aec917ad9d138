"""Run specs: exact round trips, strictness with suggestions, impossible combinations, overrides, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from draftline.errors import SpecError
from draftline.spec import (
    RECIPES,
    RunSpec,
    build_spec,
    derive,
    dump_spec,
    load_spec,
    parse_overrides,
    parse_spec,
    recipe,
)
from draftline.spec.algorithms import ALGORITHM_OVERRIDES

ODD = {
    "name": "a-1",
    "seed": 7,
    "workspace": "s3://bucket/prefix",
    "target.source": "./models/größe",
    "prompts.system_prompt": "Line one\nline two: 'quoted' \u2013 é",
    "responses.sampling.temperature": 0.3,
    "draft.target_layer_ids": [-1, 2, 5],
    "draft.mask_token_id": 3,
    "train.loss.ce": 0.25,
    "evaluation.suites": ["humaneval", "held-out"],
    "serving.policy": "off",
}


@pytest.mark.parametrize("spec", [RunSpec(), derive(RunSpec(), ODD), *(make() for make in RECIPES.values())])
def test_a_spec_reloads_equal(spec: RunSpec, tmp_path: Path) -> None:
    text = dump_spec(spec)
    assert parse_spec(text) == spec
    assert dump_spec(parse_spec(text)) == text
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_spec(path) == spec


def test_a_spec_is_frozen() -> None:
    with pytest.raises(ValidationError):
        RunSpec().draft.num_layers = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drafft: {}", "Did you mean 'draft'"),
        ("draft: {num_layer: 2}", r"draft\.num_layer.*Did you mean 'draft\.num_layers'"),
        ("train: {loss: {tvv: 1}}", r"Did you mean 'train\.loss\.tv'"),
        ("zzqq: 1", "See `draftline recipes"),
        ("draft: {num_layers: 0}", r"draft\.num_layers.*got 0"),
        ("draft: {num_layers: two}", r"draft\.num_layers.*got 'two'"),
        ("train: {lr: .inf}", r"train\.lr"),
        ("train: {lr: .nan}", r"train\.lr"),
        ("version: 2", "version"),
        ("seed: -1", "seed"),
        ("draft: 3", "draft"),
        ("[1, 2]", "wrong shape; got list"),
        ("just words", "wrong shape; got str"),
        ("a: [1", "not YAML"),
        ("target: {dtype: fp16}", r"target\.dtype"),
    ],
)
def test_malformed_specs_are_refused_helpfully(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse_spec(text, origin="my.yaml")
    assert "my.yaml" in str(caught.value)
    assert caught.value.exit_code == 2


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec("draft: {num_layer: 2}\nseed: x\n")
    assert "draft.num_layer" in str(caught.value) and "seed" in str(caught.value)


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"name": "Big"}, "lower-case"),
    ({"name": ""}, "lower-case"),
    ({"name": "a" * 53}, "lower-case"),
    ({"workspace": "ftp://x/y"}, "not usable"),
    ({"workspace": "s3://"}, "not usable"),
    ({"workspace": ""}, "not usable"),
    ({"draft.markov_rank": 0}, "confidence_with_markov"),
    ({"draft.markov_rank": 0, "draft.confidence_with_markov": False, "draft.markov_head": "rnn"}, "markov_head='rnn'"),
    ({"draft.algorithm": "dflash"}, r"set draft.markov_rank=0, draft.enable_confidence_head=false"),
    ({"draft.algorithm": "eagle3", "draft.num_layers": 3, "draft.markov_rank": 0}, "set .*num_layers=1"),
    ({"draft.algorithm": "eagle", "draft.markov_rank": 0}, "algorithm"),
    ({"draft.ttt_length": 0}, "ttt_length"),
    ({"draft.ttt_decay": 1.5}, "ttt_decay"),
    ({"serving.policy": "sometimes"}, "'off', 'fixed', 'threshold', 'sync' or 'async'"),
    ({"serving.fixed_length": 0}, "greater than 0"),
    ({"serving.threshold": 1.0}, "less than 1"),
    ({"draft.target_layer_ids": []}, "target_layer_ids"),
    ({"draft.target_layer_ids": [3, 1]}, "ascending"),
    ({"draft.target_layer_ids": [1, 1]}, "distinct"),
    ({"draft.target_layer_ids": [-2]}, "at least -1"),
    ({"train.loss.ce": 0, "train.loss.tv": 0, "train.loss.kl": 0}, "learn nothing"),
    ({"train.loss.dpace_alpha": 0}, "greater than 0"),
    ({"train.loss.position_weights": "d-pace"}, "'decay' or 'dpace'"),
    ({"train.samples_per_step": 3, "train.num_workers": 4}, "at least one sample"),
    ({"evaluation.suites": []}, "at least one"),
    ({"evaluation.suites": ["humaneval", "humaneval"]}, "each once"),
    ({"evaluation.suites": ["held-out", "gsm8"]}, "did you mean 'gsm8k'"),
    ({"evaluation.suites": ["held-out", "my-own"]}, "evaluation.suite_files"),
    ({"evaluation.suite_files": {"My Desk": "x.jsonl"}}, "suite name 'My Desk'"),
    ({"evaluation.suite_files": {"desk": " "}}, "has no file"),
    ({"evaluation.temperatures": []}, "at least one temperature"),
    ({"evaluation.temperatures": [1.0, 1.0]}, "each once"),
    ({"serving.min_replicas": 3}, "below min_replicas"),
    ({"tokens.max_length": 8}, "no room for a block"),
    ({"prompts.holdout_fraction": 0}, "held-out"),
    ({"evaluation.suites": ["humaneval"]}, "lacks 'held-out'"),
    ({"evaluation.lossless_prompts": 0}, "require_lossless"),
    ({"gate.concurrency": 8}, "evaluation.concurrencies"),
    ({"prompts.calibration_fraction": 0}, "calibration_fraction"),
    ({"prompts.holdout_fraction": 0.8, "prompts.validation_fraction": 0.2}, "below 0.9"),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE)
def test_impossible_combinations_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        derive(RunSpec(), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        {"draft.markov_rank": 0, "draft.confidence_with_markov": False},
        {"draft.enable_confidence_head": False},
        ALGORITHM_OVERRIDES["dflash"],
        ALGORITHM_OVERRIDES["eagle3"],
        {**ALGORITHM_OVERRIDES["eagle3"], "draft.family": "llama", "draft.ttt_length": 3},
        {"evaluation.suites": ["held-out"]},
        {"evaluation.suites": ["held-out", "mt-bench", "arena-hard"]},
        {"evaluation.suites": ["desk", "held-out"], "evaluation.suite_files": {"desk": "s3://b/desk.jsonl"}},
        {"prompts.holdout_fraction": 0, "evaluation.suite_files": {"held-out": "mine.jsonl"}},
        {"evaluation.lossless_prompts": 0, "gate.require_lossless": False},
        {"gate.concurrency": 8, "evaluation.concurrencies": [1, 8]},
        {"prompts.calibration_fraction": 0, "draft.enable_confidence_head": False},
        {"tokens.max_length": 9},
        {"name": "a"},
        {"workspace": "file:///data"},
    ],
)
def test_their_possible_neighbours_are_not(overrides: dict[str, Any]) -> None:
    assert derive(RunSpec(), overrides) != RunSpec()


def test_overrides_are_yaml_values() -> None:
    assert parse_overrides(["a.b=2", "c=[1, 2]", "d=true", "e=text=more", "f=", " g =1e-3", "h='3'"]) == {
        "a.b": 2,
        "c": [1, 2],
        "d": True,
        "e": "text=more",
        "f": None,
        "g": "1e-3",
        "h": "3",
    }
    assert derive(RunSpec(), parse_overrides(["train.lr=1e-3"])).train.lr == 1e-3
    for bad, message in (("no sign", "KEY=VALUE"), ("=3", "KEY=VALUE"), ("a=[1", "not YAML")):
        with pytest.raises(SpecError, match=message):
            parse_overrides([bad])


@pytest.mark.parametrize("key", ["draft.num_layer", "draft.loss.ce", "nothing", "draft.num_layers.deeper", "draft."])
def test_unknown_overrides_are_refused(key: str) -> None:
    with pytest.raises(SpecError, match="has no key"):
        derive(RunSpec(), {key: 1})


def test_derive_validates_anew_and_leaves_the_base_alone() -> None:
    base = RunSpec()
    derived = derive(base, {"draft.num_layers": "2"})
    assert derived.draft.num_layers == 2 and base.draft.num_layers == RunSpec().draft.num_layers
    with pytest.raises(SpecError):
        derive(base, {"draft.num_layers": -1})


def test_an_empty_document_is_the_default() -> None:
    assert parse_spec("") == build_spec({}) == RunSpec()


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no spec at"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\xfe")
    for path in (tmp_path / "latin.yaml", tmp_path):
        with pytest.raises(SpecError, match="cannot read"):
            load_spec(path)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_resolve(name: str) -> None:
    assert isinstance(recipe(name), RunSpec)


def test_an_unknown_recipe_is_suggested() -> None:
    with pytest.raises(SpecError, match="Did you mean 'smollm2-135m'"):
        recipe("smollm2-135")
