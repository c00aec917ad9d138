"""The image ``cpu``: what is in it, and a pipeline's step run in it. ``make test-images`` runs this; see ``built``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.images.built import Image, built_image
from tests.images.dockerfile import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    with built_image("cpu", tmp_path_factory) as found:
        yield found


def test_the_user_is_not_root_and_can_write_tmp_alone(image: Image) -> None:
    done = image.run("sh", "-c", "id -u; echo x >/tmp/x && cat /tmp/x; touch /opt/draftline/x 2>&1 || echo refused")
    lines = done.stdout.split("\n")
    assert lines[:2] == ["10001", "x"]
    assert "Read-only file system" in done.stdout and "refused" in done.stdout


def test_the_command_line_answers(image: Image) -> None:
    done = image.run("draftline", "--help")
    assert done.returncode == 0, done.stderr
    assert "compile" in done.stdout


def test_what_kuberay_runs_is_there_and_no_compiler_or_pip(image: Image) -> None:
    tools = (
        "for tool in bash python wget grep ray g++ gcc pip; do command -v $tool >/dev/null && echo $tool; done; true"
    )
    assert image.run("bash", "-c", tools).stdout.split() == ["bash", "python", "wget", "grep", "ray"]


def test_the_kernels_of_this_processor_load_without_a_compiler(image: Image) -> None:
    code = "from draftline.native.library import native_kernels as n; import sys; sys.exit(n() is None)"
    done = image.run("python", "-c", code)
    assert done.returncode == 0, done.stderr


def test_every_entry_point_of_pods_imports(image: Image) -> None:
    jobs = [f"ray_jobs.{path.stem}" for path in (ROOT / "ray_jobs").glob("*.py") if path.stem != "__init__"]
    modules = [*jobs, "serving.kubernetes", "serving.app", "pipelines.cluster_checks", "components.runtime"]
    done = image.run("python", "-c", f"import importlib\nfor m in {modules!r}: importlib.import_module(m)")
    assert done.returncode == 0, done.stderr


def test_the_sbom_lists_the_locked_versions(image: Image) -> None:
    sbom = json.loads(image.run("cat", "/opt/draftline/share/draftline/sbom.cdx.json").stdout)
    versions = {part["name"].lower(): part["version"].partition("+")[0] for part in sbom["components"]}
    lock = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    assert sbom["bomFormat"] == "CycloneDX"
    for name in ("torch", "ray", "kfp", "mlflow", "transformers"):
        assert versions[name] == lock[name]


def test_a_step_runs_as_the_compiled_pipeline_runs_it(image: Image) -> None:
    (image.shared / "prompts.jsonl").write_text(
        "".join(json.dumps({"turns": [f"Why is the parcel number {n * 7919} late?"]}) + "\n" for n in range(60)),
        encoding="utf-8",
    )
    pipeline = yaml.safe_load_all((ROOT / "tests/pipelines/golden/train_draft.yaml").read_text(encoding="utf-8"))
    container: dict[str, Any] = next(pipeline)["deploymentSpec"]["executors"]["exec-prompts"]["container"]
    spec = image.run("draftline", "recipes", "smollm2-135m")
    assert spec.returncode == 0, spec.stderr
    document = yaml.safe_load(spec.stdout)
    document["prompts"] = {**document.get("prompts", {}), "source": "/mnt/prompts.jsonl"}
    (image.shared / "spec.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    artifact = {"name": "result", "type": {"schemaTitle": "system.Dataset"}, "uri": "/mnt/result", "metadata": {}}
    order = {
        "inputs": {"parameterValues": {"spec_uri": "/mnt/spec.yaml", "workspace": "/mnt/workspace"}},
        "outputs": {"artifacts": {"result": {"artifacts": [artifact]}}, "outputFile": "/mnt/executor_output.json"},
    }
    arguments = [json.dumps(order) if word == "{{$}}" else word for word in container["args"]]
    done = image.run(*container["command"], *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = (image.shared / "workspace").rglob("result.json")
    assert result.parents[1].name == "prompts"
