"""The gate step: judge the registered version and move the aliases."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.register.step import describe_version
from components.registry import connect, registry_errors, version_by_alias
from draftline.errors import FormatError
from draftline.gate import Verdict, describe_verdict, judge
from draftline.registry_layout import (
    ALIAS_CHALLENGER,
    ALIAS_CHAMPION,
    ALIAS_PREVIOUS,
    CARD_FILE,
    METRICS_FILE,
    TAG_GATE_PASSED,
    TAG_GATE_REASONS,
    digest_tag,
    verify_file,
)
from draftline.steps import StepContext, StepOutput
from draftline.steps.ledger import verify_bytes

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_MAX_TAG_CHARS = 5000
_VERDICT_FILE = "gate.json"


def run(context: StepContext) -> StepOutput:
    """Judge, record the verdict with the version, move the aliases.

    Passed: the champion becomes ``previous`` and this version ``champion``.
    Not passed: this version becomes ``challenger``, nothing else changes, and
    the step still succeeds (a verdict is a result, not a failure). Run again,
    it ends in the same state: a version is never compared with itself.

    Raises:
        PlatformError: no MLflow server answers.
        RegistryError: the registry refused something.
        FormatError: a ``metrics.json`` is damaged or was changed after its step wrote it.
        StorageError: the workspace failed.
    """
    client = connect()
    registered = context.inputs["register"].outputs
    name, version = str(registered["model_name"]), str(registered["version"])
    champion = version_by_alias(client, name, ALIAS_CHAMPION)
    is_champion = champion is not None and str(champion.version) == version
    report = context.inputs["report"]
    metrics = _parse(_reported(context, METRICS_FILE), f"{report.prefix}/{METRICS_FILE}")
    verdict = judge(
        context.spec.gate,
        metrics["suites"],
        metrics["calibration"],
        None if champion is None or is_champion else _champion_suites(champion),
        has_confidence_head=context.spec.draft.enable_confidence_head,
    )
    card = _reported(context, CARD_FILE).decode()
    with registry_errors(f"record the verdict on {name} version {version}"):
        _record(client, name, version, str(registered.get("run_id", "")), verdict, card)
        if verdict.passed:
            _promote(client, name, version, champion)
        elif not is_champion:
            client.set_registered_model_alias(name, ALIAS_CHALLENGER, version)
    # A champion that no longer meets a tightened policy stays until another takes its place: the verdict says so.
    alias = ALIAS_CHAMPION if verdict.passed or is_champion else ALIAS_CHALLENGER
    context.report(1, 1, "verdicts", note=f"{'passed' if verdict.passed else 'not passed'}: {alias}")
    return StepOutput(outputs={**verdict.to_document(), "alias": alias}, metrics={"gate_passed": float(verdict.passed)})


def _reported(context: StepContext, file: str) -> bytes:
    """A file of the report step, proved to be the one that was registered."""
    report = context.inputs["report"]
    path = f"{report.prefix}/{file}"
    data = context.store.get(path)
    verify_bytes(data, report.outputs["files"][file], origin=path)
    return data


def _record(client: MlflowClient, name: str, version: str, run_id: str, verdict: Verdict, card: str) -> None:
    document = verdict.to_document()
    failed = [f"{r.rule}: {r.got} (needs {r.needs})" for r in verdict.reasons if not r.ok]
    client.set_model_version_tag(name, version, TAG_GATE_PASSED, str(verdict.passed).lower())
    client.set_model_version_tag(name, version, TAG_GATE_REASONS, ("; ".join(failed) or "all met")[:_MAX_TAG_CHARS])
    client.update_model_version(name, version, describe_version(card, describe_verdict(verdict)))
    if run_id:
        client.log_text(run_id, json.dumps(document, indent=1, ensure_ascii=False) + "\n", _VERDICT_FILE)


def _promote(client: MlflowClient, name: str, version: str, champion: ModelVersion | None) -> None:
    # In this order a kill between the two leaves the old champion in place, and the next attempt finishes.
    if champion is not None and str(champion.version) != version:
        client.set_registered_model_alias(name, ALIAS_PREVIOUS, str(champion.version))
    client.set_registered_model_alias(name, ALIAS_CHAMPION, version)
    challenger = version_by_alias(client, name, ALIAS_CHALLENGER)
    if challenger is not None and str(challenger.version) == version:
        client.delete_registered_model_alias(name, ALIAS_CHALLENGER)


def _champion_suites(champion: ModelVersion) -> Mapping[str, Mapping[str, Any]]:
    from mlflow.artifacts import download_artifacts

    origin = f"{METRICS_FILE} of {champion.name} version {champion.version}"
    with tempfile.TemporaryDirectory(prefix="draftline-gate-") as folder:
        with registry_errors(f"read {origin}"):
            uri = f"models:/{champion.name}/{champion.version}/{METRICS_FILE}"
            path = Path(download_artifacts(uri, dst_path=folder))
        verify_file(path, champion.tags.get(digest_tag(METRICS_FILE), "none recorded"), origin=origin)
        data = path.read_bytes()
    suites: Mapping[str, Mapping[str, Any]] = _parse(data, origin)["suites"]
    return suites


def _parse(data: bytes, origin: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
        if isinstance(document["suites"], dict) and isinstance(document["calibration"], dict):
            return dict(document)
    except (ValueError, KeyError, TypeError):
        pass
    raise FormatError(f"{origin} is damaged", remedy="Run the report and register steps again")
