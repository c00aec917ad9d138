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

SECRETS = {
    "s3_secret": {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"},
    "mlflow_secret": {
        "username": "MLFLOW_TRACKING_USERNAME",
        "password": "MLFLOW_TRACKING_PASSWORD",
        "token": "MLFLOW_TRACKING_TOKEN",
    },
    "hf_secret": {"token": "HF_TOKEN"},
}
ADDRESSES = {
    "mlflow-tracking-uri": "MLFLOW_TRACKING_URI",
    "s3-endpoint-url": "AWS_ENDPOINT_URL_S3",
    "s3-region": "AWS_DEFAULT_REGION",
}
ON_TARGET = {"responses", "hidden-states", "calibration", "evaluation"}


def of_parameter(name: str) -> str:
    """How an executor refers to a parameter of the pipeline."""
    return "{{$.inputs.parameters['pipelinechannel--" + name + "']}}"


def read_as_env(references: list[dict[str, Any]], kind: str) -> dict[str, dict[str, str]]:
    """Variables by key by the parameter that names the secret or config map; none of them has to exist."""
    assert all(reference["optional"] for reference in references)
    found: dict[str, dict[str, str]] = {}
    for reference in references:
        # A literal name would stand beside the parameter, or instead of it.
        assert set(reference) == {f"{kind}NameParameter", "keyToEnv", "optional"}
        parameter = reference[f"{kind}NameParameter"]["componentInputParameter"].removeprefix("pipelinechannel--")
        keys = {entry[f"{kind}Key"]: entry["envVar"] for entry in reference["keyToEnv"]}
        found[parameter] = found.get(parameter, {}) | keys
    return found


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
    """Holds off the compiler's bug with resources given as parameters inside a ParallelFor or a condition."""
    checked = 0
    for part in [documents[0]["root"], *documents[0]["components"].values()]:
        declared = set(part.get("inputDefinitions", {}).get("parameters", {}))
        for task in part.get("dag", {}).get("tasks", {}).values():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                if "componentInputParameter" in value:
                    assert value["componentInputParameter"] in declared
                    checked += 1
    assert checked > 50


def test_images_resources_and_secrets_are_parameters(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    of_the_run = {"spec_uri", "workspace", "suites"}
    resources = {f"{kind}_{what}" for kind in ("light", "target", "train") for what in ("cpu", "memory")}
    assert set(parameters) == of_the_run | resources | {"image", "config_map", "gpu_type", "gpu_count", *SECRETS}
    assert {name for name, parameter in parameters.items() if "defaultValue" not in parameter} == of_the_run


def test_every_step_asks_for_what_parameters_say(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    accelerator = {"resourceCount": of_parameter("gpu_count"), "resourceType": of_parameter("gpu_type")}
    for step in STATIONS:
        kind = "target" if step in ON_TARGET else "train" if step == "draft" else "light"
        wanted: dict[str, Any] = {
            f"resource{what}{bound}": of_parameter(f"{kind}_{what.lower()}")
            for what in ("Cpu", "Memory")
            for bound in ("Request", "Limit")
        }
        if kind != "light":
            wanted["accelerator"] = accelerator
        assert documents[0]["deploymentSpec"]["executors"][f"exec-{step}"]["container"]["resources"] == wanted, step


def test_every_step_reads_secrets_and_config_map_by_reference(
    documents: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == {f"exec-{step}" for step in STATIONS}
    for name, executor in executors.items():
        assert read_as_env(executor["secretAsEnv"], "secret") == SECRETS
        # Only deploy joins a Ray: the others would leave what they asked for idle and compute elsewhere.
        addresses = ADDRESSES | ({"ray-address": "RAY_ADDRESS"} if name == "exec-deploy" else {})
        assert read_as_env(executor["configMapAsEnv"], "configMap") == {"config_map": addresses}


def test_refuses_what_is_not_yaml_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pipeline\.yaml"):
        compile_pipeline(tmp_path / "pipeline.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        compile_pipeline(tmp_path / "file" / "pipeline.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
