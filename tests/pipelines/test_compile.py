"""The compiled pipeline, compared whole, and what a cluster relies on in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftline.errors import InputError, StorageError
from draftline.steps import STATIONS
from pipelines.compile import compile_pipeline

GOLDEN = Path(__file__).parent / "golden" / "train_draft.yaml"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_pipeline(path)
    assert [child.name for child in path.parent.iterdir()] == ["pipeline.yaml"]
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def documents(compiled: str) -> tuple[dict[str, Any], dict[str, Any]]:
    pipeline, platform = yaml.safe_load_all(compiled)
    return pipeline, platform


def test_golden(compiled: str, check_golden: Callable[[str, Path], None]) -> None:
    check_golden(compiled, GOLDEN)


def test_every_station_is_a_task_with_image_and_no_kfp_cache(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    components = [documents[0]["root"], *documents[0]["components"].values()]
    tasks = {name: task for part in components if "dag" in part for name, task in part["dag"]["tasks"].items()}
    steps = {name: task for name, task in tasks.items() if name in STATIONS}
    assert set(steps) == set(STATIONS)
    assert [name for name, task in steps.items() if task["cachingOptions"].get("enableCache")] == []
    executors = documents[0]["deploymentSpec"]["executors"].values()
    assert {executor["container"]["image"] for executor in executors} == {
        "{{$.inputs.parameters['pipelinechannel--image']}}"
    }


def test_every_referenced_input_is_declared(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Holds off the compiler's bug with resources given as parameters inside a ParallelFor."""
    checked = 0
    for part in [documents[0]["root"], *documents[0]["components"].values()]:
        declared = set(part.get("inputDefinitions", {}).get("parameters", {}))
        for task in part.get("dag", {}).get("tasks", {}).values():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                if "componentInputParameter" in value:
                    assert value["componentInputParameter"] in declared
                    checked += 1
    assert checked > 50


def test_every_step_reads_secret_and_config_map_by_reference(
    documents: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == len(STATIONS)
    for executor in executors.values():
        (secret,), (config_map,) = executor["secretAsEnv"], executor["configMapAsEnv"]
        assert secret["secretNameParameter"]["componentInputParameter"].endswith("s3_secret")
        assert config_map["configMapNameParameter"]["componentInputParameter"].endswith("config_map")


def test_refuses_what_is_not_yaml_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pipeline\.yaml"):
        compile_pipeline(tmp_path / "pipeline.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        compile_pipeline(tmp_path / "file" / "pipeline.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
