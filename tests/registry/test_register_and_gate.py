"""Register, resolve, gate against a real MLflow on SQLite."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from components.gate import step as gate_step
from components.register import step as register_step
from components.register.provenance import git_commit
from components.registry import connect, resolve
from draftline import __version__
from draftline.errors import FormatError, PlatformError, RegistryError
from draftline.registry_layout import TAG_GATE_PASSED, TAG_KEY
from draftline.report.card import PLOTS
from draftline.spec import RunSpec, derive, load_spec
from draftline.storage.base import ObjectStore
from tests.registry.runs import NAME, aliases, gate_context, register_and_judge, register_context
from tests.report import examples

pytestmark = pytest.mark.slow


def test_registered_folder_is_exactly_the_layout(store: ObjectStore, mlflow_uri: str, tmp_path: Path) -> None:
    context = register_context(store, "1")
    output = register_step.run(context)
    assert output.outputs["version"] == "1"
    assert output.outputs["model_uri"] == f"models:/{NAME}/1"
    assert output.metrics["accepted_length/held-out"] == 2.6

    folder = resolve(connect(), NAME, "1", tmp_path / "download")
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = {"draft/config.json", "draft/model.safetensors"}
    assert found == weights | {"calibration.json", "spec.yaml", "card.md", "metrics.json", *PLOTS}
    assert (folder / "draft/model.safetensors").read_bytes() == examples.weights_bytes("weights 1")
    assert load_spec(folder / "spec.yaml") == context.spec


def test_run_carries_params_metrics_and_the_training_curve(
    store: ObjectStore, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DRAFTLINE_COMMIT", "0" * 40)
    context = register_context(store, "1")
    store.put(f"prompts/{context.inputs['calibration'].inputs['prompts']}/train.jsonl", b"{}")
    output = register_step.run(context)
    card = (resolve(connect(), NAME, "1", tmp_path / "download") / "card.md").read_text()
    assert f"| commit | `{'0' * 40}` |" in card.partition("## Made by")[2]
    assert "drafting 2.50 ms, verifying" in card
    client = connect()
    run = client.get_run(output.outputs["run_id"])
    assert run.info.status == "FINISHED"
    assert run.outputs is not None
    (linked,) = run.outputs.model_outputs
    model = client.get_logged_model(linked.model_id)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": "1"}]
    assert run.data.params["draft.num_layers"] == "1"
    assert run.data.metrics["accepted_length/humaneval"] == 2.6
    assert run.data.metrics["calibration/ece_after"] == 0.026
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in curve] == list(range(1, 201))
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"report.html", "spec.yaml"}
    version = client.get_model_version(NAME, "1")
    assert version.tags["draftline.accepted_length/held-out"] == "2.6"
    assert version.tags[TAG_KEY] == "9" * 19 + "1"
    assert "2.60" in str(version.description)
    assert len(str(version.description)) <= 5000
    assert version.tags["draftline.version"] == __version__
    assert version.tags["draftline.commit"] == "0" * 40
    assert version.tags["draftline.prompts.sha256.train"] == hashlib.sha256(b"{}").hexdigest()


def test_registering_again_reuses_the_version(store: ObjectStore, mlflow_uri: str) -> None:
    context = register_context(store, "1")
    assert register_step.run(context).outputs == register_step.run(context).outputs
    assert len(connect().search_model_versions(f"name = '{NAME}'")) == 1


def test_attempt_killed_before_the_version_exists_is_continued(
    store: ObjectStore, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = register_context(store, "1")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(register_step, "_ensure_registered_model", killed)
        register_step.run(context)
    output = register_step.run(context)
    client = connect()
    experiment = client.get_experiment_by_name(NAME)
    assert experiment is not None
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [output.outputs["run_id"]]
    assert len(client.get_metric_history(output.outputs["run_id"], "train/loss")) == 200


def test_given_run_is_used_and_left_open(store: ObjectStore, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connect()
    run = client.create_run(client.create_experiment("orchestrator"))
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    output = register_step.run(register_context(store, "1"))
    assert output.outputs["run_id"] == run.info.run_id
    assert client.get_run(run.info.run_id).info.status == "RUNNING"


def test_stored_file_that_is_not_its_steps_is_refused(store: ObjectStore, mlflow_uri: str) -> None:
    context = register_context(store, "1")
    store.put(f"{context.inputs['draft'].prefix}/draft/model.safetensors", b"other weights")
    with pytest.raises(FormatError, match="not the file its step wrote"):
        register_step.run(context)
    assert connect().search_model_versions(f"name = '{NAME}'") == []


@pytest.mark.parametrize("again", ["resolve", "register"])
def test_file_changed_after_registration_is_refused(
    store: ObjectStore, mlflow_uri: str, tmp_path: Path, again: str
) -> None:
    context = register_context(store, "1")
    register_step.run(context)
    (weights,) = (tmp_path / "mlruns").rglob("draft/model.safetensors")
    weights.write_bytes(b"weights X")
    with pytest.raises(FormatError, match="not the file that was registered"):
        if again == "resolve":
            resolve(connect(), NAME, "1", tmp_path / "download")
        else:
            register_step.run(context)


def test_first_good_version_becomes_champion(store: ObjectStore, mlflow_uri: str, tmp_path: Path) -> None:
    registered, judged = register_and_judge(store, "1")
    assert judged.outputs["passed"] is True
    assert judged.outputs["alias"] == "champion"
    assert aliases(connect()) == {"champion": "1"}
    folder = resolve(connect(), NAME, "champion", tmp_path / "download")
    assert (folder / "draft/model.safetensors").read_bytes() == examples.weights_bytes("weights 1")
    client = connect()
    version = client.get_model_version(NAME, "1")
    assert version.tags[TAG_GATE_PASSED] == "true"
    assert "The gate passed" in str(version.description)
    stored = Path(client.download_artifacts(registered.outputs["run_id"], "gate.json")).read_text()
    assert json.loads(stored)["reasons"] == judged.outputs["reasons"]


def test_worse_version_stays_challenger(store: ObjectStore, mlflow_uri: str) -> None:
    register_and_judge(store, "1")
    _, judged = register_and_judge(store, "2", accepted_length=2.2)
    assert judged.outputs["passed"] is False
    failed = [reason["rule"] for reason in judged.outputs["reasons"] if not reason["ok"]]
    assert failed == [f"accepted length on {suite} against the champion" for suite in ("held-out", "humaneval")]
    assert aliases(connect()) == {"champion": "1", "challenger": "2"}
    assert connect().get_model_version(NAME, "2").tags[TAG_GATE_PASSED] == "false"


def test_better_version_takes_over_and_the_old_one_is_previous(store: ObjectStore, mlflow_uri: str) -> None:
    register_and_judge(store, "1")
    register_and_judge(store, "2", accepted_length=2.2)
    _, judged = register_and_judge(store, "3", accepted_length=2.9)
    assert judged.outputs["passed"] is True
    assert aliases(connect()) == {"champion": "3", "previous": "1", "challenger": "2"}


def test_judging_again_changes_nothing(store: ObjectStore, mlflow_uri: str) -> None:
    register_and_judge(store, "1")
    context = register_context(store, "2", accepted_length=2.9)
    registered = register_step.run(context)
    gate_step.run(gate_context(context, registered))
    again = gate_step.run(gate_context(context, registered))
    assert again.outputs["alias"] == "champion"
    rules = {reason["rule"]: reason["got"] for reason in again.outputs["reasons"]}
    assert rules["accepted length against the champion"] == "no champion to compare with"  # not with itself
    assert aliases(connect()) == {"champion": "2", "previous": "1"}


def test_challenger_that_passes_a_new_policy_loses_that_alias(store: ObjectStore, mlflow_uri: str) -> None:
    context = register_context(store, "1")
    registered = register_step.run(context)
    strict = derive(RunSpec(), {"gate.min_speedup": 5.0})
    assert gate_step.run(gate_context(context, registered, strict)).outputs["alias"] == "challenger"
    assert aliases(connect()) == {"challenger": "1"}
    assert gate_step.run(gate_context(context, registered)).outputs["alias"] == "champion"
    assert aliases(connect()) == {"champion": "1"}
    # A tightened policy is reported, but does not leave the endpoint without a champion.
    judged = gate_step.run(gate_context(context, registered, strict))
    assert (judged.outputs["passed"], judged.outputs["alias"]) == (False, "champion")
    assert aliases(connect()) == {"champion": "1"}


def test_champion_whose_figures_were_changed_is_refused(store: ObjectStore, mlflow_uri: str, tmp_path: Path) -> None:
    register_and_judge(store, "1")
    (metrics,) = (tmp_path / "mlruns").rglob("models/*/artifacts/metrics.json")
    metrics.write_text(metrics.read_text().replace("2.6", "1.6"))
    with pytest.raises(FormatError, match=r"metrics\.json of support-desk version 1"):
        register_and_judge(store, "2")


@pytest.mark.parametrize("wanted", ["champion", "7"])
def test_absent_version_says_so(mlflow_uri: str, tmp_path: Path, wanted: str) -> None:
    with pytest.raises(RegistryError, match="has no support-desk"):
        resolve(connect(), NAME, wanted, tmp_path / "download")


def test_without_a_server_the_error_names_the_remedy() -> None:
    with pytest.raises(PlatformError, match="draftline up"):
        connect({})
    with pytest.raises(PlatformError, match=r"no MLflow server answers at http://127\.0\.0\.1:9"):
        connect({"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})


def test_commit_is_gits_and_says_when_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=ada", "-c", "user.email=ada@example.org")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, check=True, text=True
        ).stdout

    assert git_commit({}, tmp_path) == "unknown"
    git("init", "-q")
    assert git_commit({}, tmp_path) == "unknown"
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "one")
    assert git_commit({}, tmp_path) == git("rev-parse", "HEAD").strip()
    (tmp_path / "file").write_text("b")
    assert git_commit({}, tmp_path).endswith("-dirty")
    assert git_commit({"DRAFTLINE_COMMIT": "abc"}, tmp_path) == "abc"
