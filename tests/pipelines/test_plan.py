"""``draftline plan``: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from draftline.spec import dump_spec, recipe
from pipelines.plan import format_bytes
from tests.pipelines.test_cli import invoke, refused

ISSUE = ("plan", "--target", "Qwen/Qwen3-4B", "--samples", "1300000", "--tokens-per-sample", "950")


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


def test_the_references_layout_comes_out_at_38_tb() -> None:
    code, out, err = invoke(*ISSUE)
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if "DeepSpec" in line)
    assert "30,726" in row and "38 TB" in row
    for word in ("hidden-states", "responses", "draft", "GPU-hours", "paid back after", "Assumed", "--utilisation"):
        assert word in out
    assert "…" not in out


def test_json_holds_the_same_plan() -> None:
    made = json.loads(invoke(*ISSUE, "--json")[1])
    assert made["target"] == "Qwen/Qwen3-4B"
    assert [line["codec"] for line in made["cache"]] == ["bf16", "fp8", "int4", "reference"]
    assert made["total_cost"] == pytest.approx(sum(line["cost"] for line in made["work"]) + made["cache_cost"])
    assert made["assumptions"]["corpus"]["num_samples"] == 1_300_000


def test_prices_hardware_and_measurements_are_taken() -> None:
    base = json.loads(invoke(*ISSUE, "--json")[1])
    dear = json.loads(invoke(*ISSUE, "--json", "--gpu-hour-price", "5", "--storage-price", "0.046")[1])
    assert dear["total_cost"] == pytest.approx(2 * base["total_cost"])
    assert dear["payback_days"] == pytest.approx(base["payback_days"])
    own = json.loads(invoke(*ISSUE, "--json", "--gpu", "mine", "--peak-tflops", "494.5")[1])
    assert own["gpu_hours"] == pytest.approx(2 * base["gpu_hours"])
    assert own["assumptions"]["hardware"]["name"] == "mine"
    asked = json.loads(invoke(*ISSUE, "--json", "--answer-share", "0.5")[1])
    assert asked["work"][0]["gpu_hours"] == pytest.approx(base["work"][0]["gpu_hours"] / 2)
    busy = json.loads(invoke(*ISSUE, "--json", "--utilisation", "0.16,0.8,0.6", "--measured", "0,1000,0")[1])
    assert busy["work"][0]["gpu_hours"] == pytest.approx(base["work"][0]["gpu_hours"] / 2)
    assert busy["work"][1]["gpu_hours"] == pytest.approx(1_300_000 * 950 / 1000 / 3600)


def test_a_spec_and_a_recipe_are_planned_too(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(dump_spec(recipe("smollm2-135m")), encoding="utf-8")
    from_file = json.loads(invoke("plan", "spec.yaml", "--json")[1])
    from_name = json.loads(invoke("plan", "--recipe", "smollm2-135m", "--json")[1])
    assert from_file == from_name
    # The shipped prompts are counted; a recipe whose prompts are not here takes the reference's number.
    assert 100 < from_file["assumptions"]["corpus"]["num_samples"] < 1000
    large = json.loads(invoke("plan", "--recipe", "qwen3-8b", "--json", "--set", "draft.num_layers=1")[1])
    assert large["assumptions"]["corpus"]["num_samples"] == 1_300_000


def test_a_streamed_run_has_no_cache_to_pay_for() -> None:
    code, out, _ = invoke("plan", "--recipe", "qwen3-4b", "--set", "cache.mode=stream")
    assert code == 0
    assert "work and no cache" in out and "this spec" not in out


def test_samples_are_cut_at_the_specs_length() -> None:
    made = json.loads(invoke("plan", "--recipe", "smollm2-135m", "--tokens-per-sample", "5000", "--json")[1])
    assert made["assumptions"]["corpus"]["tokens_per_sample"] == recipe("smollm2-135m").tokens.max_length


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "cannot tell which run"),
        (("--target", "Qwen/Qwen3-4B", "--recipe", "qwen3-4b"), "cannot tell which run"),
        (("--recipe", "qwen3-5b"), "Did you mean 'qwen3-"),
        (("--target", "./nothing-here"), "nothing is known about target"),
        (("--recipe", "qwen3-4b", "--gpu", "h10"), "no hardware profile"),
        (("--recipe", "qwen3-4b", "--utilisation", "1"), "three numbers"),
        (("--recipe", "qwen3-4b", "--utilisation", "1,2,3"), "impossible"),
        (("--recipe", "qwen3-4b", "--speedup", "0"), "speedup"),
        (("--recipe", "qwen3-4b", "--set", "draft.layers=2"), "has no key"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    code, line = refused("plan", *arguments)
    assert code != 0 and message in line


def test_bytes_are_shown_in_decimal_units() -> None:
    assert [format_bytes(n) for n in (38.1e12, 9.6e12, 1e9, 512)] == ["38 TB", "9.6 TB", "1.0 GB", "512 B"]


def test_helm_values_are_sizes_that_hold_the_plan() -> None:
    text = invoke(*ISSUE, "--helm-values")[1]
    values = yaml.safe_load(text)
    made = json.loads(invoke(*ISSUE, "--json")[1])
    stored = next(line["total_bytes"] for line in made["cache"] if line["codec"] == made["codec"])
    size = values["minio"]["persistence"]["size"]
    assert stored * 1.3 <= int(size.removesuffix("Gi")) * 1024**3 <= stored * 1.31
    # Twice 4.02 B parameters at two bytes, and the drafts.
    assert values["serving"]["cache"]["size"] == "20Gi"
    assert values["serving"]["target"]["source"] == "Qwen/Qwen3-4B"
    assert "GB in bf16" in text.splitlines()[0]


def test_helm_values_of_a_stream_need_no_store() -> None:
    text = invoke(*ISSUE, "--set", "cache.mode=stream", "--helm-values")[1]
    assert yaml.safe_load(text)["minio"]["persistence"]["size"] == "20Gi"
    assert "no hidden states are stored" in text
