"""SIGKILL of a whole run in mid-training, and the same command again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from draftline.jobs import run_job
from draftline.progress import NullProgress
from draftline.spec import derive, dump_spec
from draftline.steps import STATIONS, StepContext, StepResult
from draftline.storage import open_store
from pipelines.embedded.platform import Platform
from tests.e2e.tiny_run import tiny_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def relatives(home: Path) -> list[str]:
    """Processes that carry the run's home in their command line, this one left out."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(home) in line and process.pid != os.getpid():
            found.append(f"{process.pid} {line[:200]}")
    return found


def test_a_killed_run_continues_to_the_same_weights(
    tiny_target: Path, prompts_file: Path, platform: Platform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, workspace = tmp_path / "home", tmp_path / "workspace"
    spec = derive(tiny_spec("killed", tiny_target, prompts_file, str(workspace)), {"train.steps": 400})
    spec_file = tmp_path / "spec.yaml"
    spec_file.write_text(dump_spec(spec), encoding="utf-8")
    command = [sys.executable, "-m", "pipelines.cli", "run", str(spec_file), "--home", str(home), "--exit"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}

    with open(tmp_path / "first.log", "wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, env=clean)
    try:
        while not list(workspace.glob("draft/*/scratch/step-*.safetensors")):
            assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
            time.sleep(0.01)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait(30)
    assert not list(workspace.glob("draft/*/result.json")), "the kill came too late to test anything"

    # At once: whatever the killed run left has to get out of the way of the new one.
    again = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=400, check=False)
    assert again.returncode == 0, (again.stdout + again.stderr)[-5000:]
    for station in ("prompts", "responses", "tokens", "hidden-states"):
        assert re.search(rf"\[{station}\] already done", again.stdout), again.stdout[:3000]
    newest = max(home.glob("runs/*/*/events.jsonl"), key=lambda path: path.stat().st_mtime)
    events = [json.loads(line) for line in newest.read_text().splitlines()]
    trained = [event["done"] for event in events if (event["step"], event["state"]) == ("draft", "running")]
    assert min(trained) > spec.train.checkpoint_every_steps, "the training began anew"
    assert relatives(home) == []
    store = open_store(str(workspace))
    (result,) = (StepResult.from_json(path.read_bytes()) for path in workspace.glob("draft/*/result.json"))
    assert list(store.list(f"{result.prefix}/scratch/")) == []

    for name, value in platform.ray_client_env.items():
        monkeypatch.setenv(name, value)
    (hidden,) = (StepResult.from_json(path.read_bytes()) for path in workspace.glob("hidden-states/*/result.json"))
    undisturbed = StepContext("draft", "undisturbed", spec, store, {"hidden-states": hidden}, progress=NullProgress())
    whole = run_job(STATIONS["draft"], undisturbed)
    assert whole.outputs["files"] == result.outputs["files"]
    weights = "draft/model.safetensors"
    assert store.get(f"{result.prefix}/{weights}") == store.get(f"{undisturbed.prefix}/{weights}")
