"""The image ``cpu``, built by a real builder: what is in it, and a pipeline's step run in it.

``make test-images`` runs this. ``BASE`` and the other settings of `make images` are taken from the environment;
``DRAFTLINE_TEST_IMAGE`` names an image that is there already. Needs buildah and root, and chroot from coreutils: the
user of the image gets a root file system that is mounted read-only, and a /tmp.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.images.dockerfile import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

_SHELL = """
set -eu
mount --rbind "$1" "$2"; mount -o remount,bind,ro "$2"
mount -t tmpfs -o mode=1777,size=1g tmp "$2/tmp"
mount --bind "$3" "$2/mnt"
mount -t proc proc "$2/proc"; mount --rbind /dev "$2/dev"
shift 3
exec chroot --userspec=10001:10001 "$ROOTFS" env -i $IMAGE_ENV "$@"
"""


class Image:
    """An image's file system and its variables."""

    def __init__(self, folder: Path, variables: list[str], mount_point: Path, shared: Path) -> None:
        self._folder, self._variables, self._mount_point, self.shared = folder, variables, mount_point, shared

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command as the image's user, on a read-only root with a fresh /tmp, and ``shared`` at /mnt."""
        arguments = ["unshare", "--mount", "--pid", "--fork", "bash", "-c", _SHELL, "image"]
        return subprocess.run(
            [*arguments, str(self._folder), str(self._mount_point), str(self.shared), *command],
            env={**os.environ, "ROOTFS": str(self._mount_point), "IMAGE_ENV": " ".join(self._variables)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    name = os.environ.get("DRAFTLINE_TEST_IMAGE", "")
    if not name:
        environment = {**os.environ, "BUILDER": "buildah", "REGISTRY": "localhost"}
        subprocess.run([ROOT / ".ci" / "images.sh", "cpu"], check=True, env=environment)
        name = "localhost/draftline-python:0.1.0"
    config = json.loads(_output("buildah", "inspect", "--type", "image", name))["OCIv1"]["config"]
    assert config["User"] == "10001:10001"
    container = _output("buildah", "from", "--pull-never", name)
    try:
        shared = tmp_path_factory.mktemp("shared")
        # pytest's folders are closed to other users.
        for folder in (shared, *shared.parents):
            if folder.owner() == shared.owner() and folder != Path("/"):
                folder.chmod(folder.stat().st_mode | 0o055)
        shared.chmod(0o777)
        yield Image(
            Path(_output("buildah", "mount", container)), config["Env"], tmp_path_factory.mktemp("root"), shared
        )
    finally:
        subprocess.run(["buildah", "rm", container], check=True, capture_output=True)


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
