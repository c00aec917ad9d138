"""The deploy step and its child process, as far as they go without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.deploy.step import run
from draftline.errors import PlatformError, RegistryError
from draftline.progress import ListProgress
from draftline.spec import recipe
from draftline.steps import StepContext, StepResult
from draftline.storage import open_store
from serving.deploy import deploy
from serving.replica import ReplicaConfig, read_api_keys


def context(folder: Path, gate: dict[str, object]) -> StepContext:
    inputs = {
        "gate": StepResult("gate", "k", outputs=gate),
        "register": StepResult("register", "k", outputs={"model_name": "support-desk", "version": "1"}),
    }
    return StepContext("deploy", "k", recipe("smollm2-135m"), open_store(str(folder)), inputs, progress=ListProgress())


def test_a_refused_draft_is_not_deployed_and_no_error(tmp_path: Path) -> None:
    reasons = [{"rule": "lossless", "ok": True}, {"rule": "speed-up of at least 1.0", "ok": False}]
    step = context(tmp_path, {"passed": False, "reasons": reasons})
    outputs = run(step).outputs
    assert outputs == {"deployed": False, "reason": "the gate refused the draft: speed-up of at least 1.0"}
    assert isinstance(step.progress, ListProgress) and outputs["reason"] in step.progress.events[-1].note


@pytest.mark.slow
def test_the_child_reports_its_error_as_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match="needs an MLflow server"):
        run(context(tmp_path, {"passed": True, "reasons": []}))


def test_without_ray_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(PlatformError, match="draftline up"):
        deploy(ReplicaConfig(recipe("smollm2-135m")))


def test_the_step_stays_light() -> None:
    code = "import sys, json, components.deploy.step; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert not {"ray", "serving", "torch", "fastapi", "mlflow"} & set(json.loads(done.stdout))


def test_key_files_are_read_and_never_open_by_accident(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# team a\nalpha\n\n beta \n  # old key of team b\n")
    assert read_api_keys(keys) == ("alpha", "beta") and read_api_keys(None) == ()
    keys.write_text("# none yet\n\t# nor here\n")
    with pytest.raises(PlatformError, match="no API key"):
        read_api_keys(keys)
    with pytest.raises(PlatformError, match="cannot read"):
        read_api_keys(tmp_path / "absent")
