"""Looking for drift, at a real registry: MLflow's own client on SQLite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.drift.step import look_for_drift
from draftline.errors import FormatError
from draftline.registry_layout import ALIAS_CHAMPION, TAG_DRIFT
from draftline.spec import RunSpec, derive, dump_spec
from tests.components.test_runtime import FakeArtifact

pytestmark = pytest.mark.slow


def test_trains_only_where_a_server_reported_drift_of_the_champion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    spec = tmp_path / "spec.yaml"
    capture = {"serving.capture.enabled": True, "serving.capture.uri": "s3://live/tickets"}
    spec.write_text(dump_spec(derive(RunSpec(name="tickets"), {**capture, "prompts.source": "s3://live/tickets/"})))
    summary = FakeArtifact(str(tmp_path / "summary"))

    def look(*, force: bool = False) -> tuple[bool, str]:
        return look_for_drift(str(spec), force, summary), Path(summary.path).read_text()

    is_due, page = look()
    assert not is_due and "has no champion" in page and "captured traffic, `s3://live/tickets/`" in page

    from components.registry import connect

    client = connect()
    client.create_registered_model("tickets")
    client.create_model_version("tickets", str(tmp_path))
    client.set_registered_model_alias("tickets", ALIAS_CHAMPION, "1")
    assert look()[0] is False
    assert look(force=True)[0] is True

    client.set_model_version_tag("tickets", "1", TAG_DRIFT, json.dumps({"message": "accepted length 2.1, not 3.0"}))
    is_due, page = look()
    assert is_due and page.startswith("# Training anew") and "accepted length 2.1, not 3.0" in page
    assert summary.metadata == {"drifted": True, "trains": True}

    client.set_model_version_tag("tickets", "1", TAG_DRIFT, "{")
    with pytest.raises(FormatError, match="damaged"):
        look()

    # Another draft took its place: the old one's alarm is over.
    client.create_model_version("tickets", str(tmp_path))
    client.set_registered_model_alias("tickets", ALIAS_CHAMPION, "2")
    assert look()[0] is False
