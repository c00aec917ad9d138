"""The compiled pipeline, compared whole, and what a cluster relies on in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.cluster.api import NAMESPACE_ENV, POD_NAME_ENV
from components.cluster.settings import JobSettings, read_settings
from draftline.errors import InputError, StorageError
from draftline.steps import STATIONS
from pipelines.compile import compile_pipeline

GOLDEN = Path(__file__).parent / "golden"

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
JOB_ADDRESSES = {
    "job-service-account": "DRAFTLINE_JOB_SERVICE_ACCOUNT",
    "job-priority-class": "DRAFTLINE_JOB_PRIORITY_CLASS",
    "kueue-queue": "DRAFTLINE_KUEUE_QUEUE",
}
HEAVY = {name for name, station in STATIONS.items() if station.on_ray}
STEPS = {*STATIONS, "outcome"}


def of_parameter(name: str) -> str:
    """How an executor refers to a parameter of the pipeline."""
    return "{{$.inputs.parameters['pipelinechannel--" + name + "']}}"


def of_input(reference: dict[str, Any]) -> str:
    """The pipeline's parameter that a Kubernetes setting takes."""
    return str(reference["componentInputParameter"]).removeprefix("pipelinechannel--")


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


@pytest.fixture(scope="module")
def retraining(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    compile_pipeline(path, "retrain-on-drift")
    return path.read_text(encoding="utf-8")


def test_golden(compiled: str, retraining: str, check_golden: Callable[[str, Path], None]) -> None:
    check_golden(compiled, GOLDEN / "train_draft.yaml")
    check_golden(retraining, GOLDEN / "retrain_on_drift.yaml")


def test_golden_of_promotion(tmp_path: Path, check_golden: Callable[[str, Path], None]) -> None:
    compile_pipeline(tmp_path / "pipeline.yaml", "promote-draft")
    text = (tmp_path / "pipeline.yaml").read_text(encoding="utf-8")
    check_golden(text, GOLDEN / "promote_draft.yaml")
    pipeline, platform = yaml.safe_load_all(text)
    assert undeclared(pipeline) == []
    (executor,) = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
    assert (
        read_as_env(executor["configMapAsEnv"], "configMap")["config_map"]["serving-endpoint"] == "DRAFTLINE_ENDPOINT"
    )


def test_retraining_is_the_same_training_behind_a_question(
    retraining: str, documents: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    pipeline, platform = yaml.safe_load_all(retraining)
    executors = pipeline["deploymentSpec"]["executors"]
    assert set(executors) == {f"exec-{step}" for step in (*STEPS, "drift")}
    for name, executor in documents[0]["deploymentSpec"]["executors"].items():
        assert executors[name] == executor
        placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][name]
        assert placed == documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"][name]
    mine, theirs = (one["root"]["inputDefinitions"]["parameters"] for one in (pipeline, documents[0]))
    assert set(mine) == {*theirs, "force"}
    assert {name: one.get("defaultValue") for name, one in mine.items() if name != "force"} == {
        name: one.get("defaultValue") for name, one in theirs.items()
    }
    conditions = [
        task["triggerPolicy"]["condition"]
        for part in [pipeline["root"], *pipeline["components"].values()]
        for task in part.get("dag", {}).get("tasks", {}).values()
        if "condition" in task.get("triggerPolicy", {})
    ]
    assert any("drift-Output" in condition for condition in conditions) and len(conditions) == 2
    assert undeclared(pipeline) == []


def test_there_is_no_other_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train-draft or promote-draft or retrain-on-drift"):
        compile_pipeline(tmp_path / "pipeline.yaml", "train")


def test_every_station_is_a_task_with_image_and_no_kfp_cache(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    components = [documents[0]["root"], *documents[0]["components"].values()]
    tasks = {name: task for part in components if "dag" in part for name, task in part["dag"]["tasks"].items()}
    steps = {name: task for name, task in tasks.items() if name in STEPS}
    assert set(steps) == STEPS
    assert [name for name, task in steps.items() if task["cachingOptions"].get("enableCache")] == []
    executors = documents[0]["deploymentSpec"]["executors"].values()
    assert {executor["container"]["image"] for executor in executors} == {
        "{{$.inputs.parameters['pipelinechannel--image']}}"
    }


def undeclared(pipeline: dict[str, Any]) -> list[str]:
    """Inputs that a task refers to and its DAG does not declare: the compiler forgets some in loops and conditions."""
    found: list[str] = []
    for part in [pipeline["root"], *pipeline["components"].values()]:
        declared = set(part.get("inputDefinitions", {}).get("parameters", {}))
        for task in part.get("dag", {}).get("tasks", {}).values():
            for value in task.get("inputs", {}).get("parameters", {}).values():
                found += [name for name in [value.get("componentInputParameter")] if name and name not in declared]
    return found


def test_every_referenced_input_is_declared(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert undeclared(documents[0]) == []
    broken = copy.deepcopy(documents[0])
    del broken["root"]["inputDefinitions"]["parameters"]["workspace"]
    assert "workspace" in undeclared(broken)


def test_every_knob_is_a_parameter(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    parameters = documents[0]["root"]["inputDefinitions"]["parameters"]
    of_the_run = {"spec_uri", "workspace", "suites"}
    kinds = {"light": ("cpu", "memory"), "target": ("cpu", "memory", "workers"), "train": ("cpu", "memory", "workers")}
    resources = {f"{kind}_{what}" for kind, whats in kinds.items() for what in whats}
    others = {"image", "config_map", "gpu_type", "gpu_count", "ray_job", "node_selector", "tolerations", *SECRETS}
    assert set(parameters) == of_the_run | resources | others
    assert {name for name, parameter in parameters.items() if "defaultValue" not in parameter} == of_the_run
    # Together with what the steps give it, all that a job can be told.
    given = {"cpu", "memory", "gpu_type", "gpu_count", "num_workers"}
    assert set(parameters["ray_job"]["defaultValue"]) | given == set(JobSettings.model_fields)
    assert read_settings(parameters["ray_job"]["defaultValue"], {}) == JobSettings()


def test_every_pod_asks_for_little_and_heavy_steps_pass_sizes_on(
    documents: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    wanted = {
        f"resource{what}{bound}": of_parameter(f"light_{what.lower()}")
        for what in ("Cpu", "Memory")
        for bound in ("Request", "Limit")
    }
    executors = documents[0]["deploymentSpec"]["executors"]
    assert {name: executor["container"]["resources"] for name, executor in executors.items()} == {
        f"exec-{step}": wanted for step in STEPS
    }
    components = [documents[0]["root"], *documents[0]["components"].values()]
    tasks = {name: task for part in components if "dag" in part for name, task in part["dag"]["tasks"].items()}
    for step in HEAVY:
        given = tasks[step]["inputs"]["parameters"]
        kind = "train" if step == "draft" else "target"
        for what, parameter in {
            "cpu": f"{kind}_cpu", "memory": f"{kind}_memory", "gpu_type": "gpu_type", "gpu_count": "gpu_count",
            "ray_job": "ray_job",
        }.items():  # fmt: skip
            assert given[what]["componentInputParameter"].removeprefix("pipelinechannel--") == parameter, step


def test_every_step_reads_secrets_and_config_map_by_reference(
    documents: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) == {f"exec-{step}" for step in STEPS}
    for name, executor in executors.items():
        assert read_as_env(executor["secretAsEnv"], "secret") == SECRETS
        endpoint = {"serving-endpoint": "DRAFTLINE_ENDPOINT", "ray-address": "RAY_ADDRESS"}
        more = {"exec-deploy": endpoint, **{f"exec-{step}": JOB_ADDRESSES for step in HEAVY}}
        assert read_as_env(executor["configMapAsEnv"], "configMap") == {"config_map": ADDRESSES | more.get(name, {})}
        assert "pvcMount" not in executor


def test_every_pod_is_placed_and_heavy_ones_know_themselves(
    documents: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for step in STEPS:
        executor = executors[f"exec-{step}"]
        assert of_input(executor["nodeSelector"]["nodeSelectorJson"]) == "node_selector"
        assert [of_input(one["tolerationJson"]) for one in executor["tolerations"]] == ["tolerations"]
        fields = {one["name"]: one["fieldPath"] for one in executor.get("fieldPathAsEnv", [])}
        itself = {POD_NAME_ENV: "metadata.name", NAMESPACE_ENV: "metadata.namespace"}
        assert fields == (itself if step in {*HEAVY, "deploy"} else {})
        shared = [one for one in executor.get("emptyDirMounts", []) if one["mountPath"] == "/dev/shm"]
        assert bool(shared) == (step in HEAVY)


def test_the_exit_handler_runs_whatever_happens(documents: tuple[dict[str, Any], dict[str, Any]]) -> None:
    task = documents[0]["root"]["dag"]["tasks"]["outcome"]
    assert task["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert task["dependentTasks"] == ["whatever-happens"] or len(task["dependentTasks"]) == 1


def test_refuses_what_is_not_yaml_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pipeline\.yaml"):
        compile_pipeline(tmp_path / "pipeline.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        compile_pipeline(tmp_path / "file" / "pipeline.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
