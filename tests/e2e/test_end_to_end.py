"""The whole road on the tiny target: every station, real Ray, real MLflow, real HTTP, on disk and on S3."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from mlflow import MlflowClient
from rich.console import Console

from draftline.spec import RunSpec, derive
from draftline.spec.algorithms import ALGORITHM_OVERRIDES
from draftline.steps import STATIONS, StepResult
from draftline.storage import open_store
from pipelines.embedded.platform import Platform
from pipelines.preflight import prepare
from pipelines.run_local import LocalRun, new_folder, run_local
from pipelines.session import step_environment
from pipelines.summary import render_summary
from tests.e2e.tiny_run import tiny_spec
from tests.servers.s3 import S3_SERVERS, S3Server, fresh_workspace, named_server

pytestmark = pytest.mark.slow


def make_run(spec: RunSpec, platform: Platform, home: Path) -> tuple[dict[str, StepResult], str]:
    """Run a spec to the end; returns the results and what the screen showed."""
    prepared = prepare(spec, home)
    screen = io.StringIO()
    console = Console(file=screen, width=160)
    run = LocalRun(
        spec, prepared.spec_uri, spec.workspace, new_folder(home, prepared.run_id), step_environment(platform)
    )
    results = run_local(run, console)
    console.print(render_summary(results))
    return results, screen.getvalue()


@pytest.fixture(params=["local", S3_SERVERS[-1]])
def workspace(
    request: pytest.FixtureRequest, tmp_path: Path, moto_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A directory, and the best S3 server at hand."""
    if request.param == "local":
        yield str(tmp_path / "workspace")
        return
    with fresh_workspace(named_server(request.param, moto_server), monkeypatch) as store:
        yield store.uri


@pytest.mark.timeout(600)
def test_the_whole_road(
    workspace: str, tiny_target: Path, prompts_file: Path, platform: Platform, tmp_path: Path
) -> None:
    """From a spoilt prompts file to an answer over HTTP; then again, and nothing is done twice."""
    name = f"tiny-{'s3' if workspace.startswith('s3') else 'local'}"
    spec = tiny_spec(name, tiny_target, prompts_file, workspace)
    home = tmp_path / "home"
    home.mkdir()
    results, screen = make_run(spec, platform, home)

    assert {label.partition(":")[0] for label in results} == set(STATIONS)
    report = results["prompts"].outputs["report"]
    assert (report["malformed"], report["empty"], report["not_utf8"], report["duplicate"]) == (1, 1, 1, 1)
    held_out = results["evaluation:held-out"].outputs
    assert held_out["lossless"]["verdict"] == "lossless" and held_out["lossless"]["num_prompts"] == 6
    assert held_out["accepted_length"] > 1.2
    assert results["gate"].outputs["passed"] and results["gate"].outputs["alias"] == "champion"
    assert "lossless" in screen

    check_registry(name, results, platform)
    check_endpoint(results["deploy"])
    again, screen = make_run(spec, platform, home)
    assert screen.count("already done") >= 8
    for label, result in results.items():
        assert again[label].key == result.key
    assert again["register"].outputs["version"] == results["register"].outputs["version"]
    weights = f"{results['draft'].prefix}/draft/model.safetensors"
    assert open_store(workspace).head(weights) is not None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", ["eagle3"])
def test_the_road_of_a_draft_without_a_confidence_head(
    algorithm: str, tiny_target: Path, prompts_file: Path, platform: Platform, tmp_path: Path
) -> None:
    """Trained, calibrated to the identity, evaluated, registered, judged and served like any other."""
    name = f"tiny-{algorithm}"
    spec = tiny_spec(name, tiny_target, prompts_file, str(tmp_path / "workspace"))
    home = tmp_path / "home"
    home.mkdir()
    results, _ = make_run(derive(spec, {**ALGORITHM_OVERRIDES[algorithm], "draft.ttt_length": 4}), platform, home)

    held_out = results["evaluation:held-out"].outputs
    assert held_out["lossless"]["verdict"] == "lossless"
    assert held_out["accepted_length"] > 1.2
    assert held_out["ece"] is None
    assert results["gate"].outputs["passed"]
    check_registry(name, results, platform)
    check_endpoint(results["deploy"])


def check_registry(name: str, results: dict[str, StepResult], platform: Platform) -> None:
    client = MlflowClient(platform.mlflow_uri)
    champion = client.get_model_version_by_alias(name, "champion")
    assert str(champion.version) == str(results["register"].outputs["version"])
    digest = results["draft"].outputs["files"]["model.safetensors"]
    assert champion.tags["draftline.sha256.draft/model.safetensors"] == digest


def check_endpoint(deploy: StepResult) -> None:
    """The same greedy answer whole and streamed, with speculation at work."""
    messages = [{"role": "user", "content": "where is my parcel 3?"}]
    with openai.OpenAI(base_url=deploy.outputs["endpoint"], api_key="none", timeout=60) as client:
        model = client.models.list().data[0].id
        whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16)
        chunks = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=16, stream=True
        )
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert whole.choices[0].message.content == streamed
    statistics = whole.model_extra["metrics"]["speculative_decoding"]
    assert statistics["num_spec_steps"] > 0
    assert os.environ.get("RAY_ADDRESS") is None
