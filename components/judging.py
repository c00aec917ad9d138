"""Judge a registered version by its own files, each compared with its recorded digest first."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.register.step import describe_version
from components.registry import download_version, registry_errors
from draftline.errors import FormatError
from draftline.gate import Standing, Verdict, describe_verdict, judge
from draftline.registered_files import inspect_files
from draftline.registry_layout import (
    CARD_FILE,
    METRICS_FILE,
    SPEC_FILE,
    TAG_GATE_PASSED,
    TAG_GATE_REASONS,
    TAG_ROLLED_BACK,
    digest_tag,
    verify_file,
)
from draftline.spec import RunSpec, load_spec

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

VERDICT_FILE = "gate.json"
_MAX_TAG_CHARS = 5000


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it is about.

    Attributes:
        version: The candidate.
        verdict: The gate's.
        card: The candidate's card, Markdown.
    """

    version: ModelVersion
    verdict: Verdict
    card: str


def judge_version(version: ModelVersion, champion: ModelVersion | None, spec: RunSpec | None = None) -> Judgement:
    """Download a version, prove its files, and judge it.

    Args:
        version: The candidate.
        champion: The present champion; a version is never compared with itself.
        spec: Gives the policy; the candidate's own registered spec when absent.

    Raises:
        RegistryError: the registry failed.
        FormatError: a file is missing, is not the one that was registered, or could be unpickled.
        SpecError: the registered spec is of another version of Draftline.
    """
    if champion is not None and str(champion.version) == str(version.version):
        champion = None
    with tempfile.TemporaryDirectory(prefix="draftline-gate-") as scratch:
        folder = download_version(version, Path(scratch))
        whose = f"of {version.name} version {version.version}"
        for file in (METRICS_FILE, CARD_FILE, SPEC_FILE):
            verify_file(folder / file, version.tags.get(digest_tag(file), "none recorded"), origin=f"{file} {whose}")
        spec = spec or load_spec(folder / SPEC_FILE)
        metrics = _parse((folder / METRICS_FILE).read_bytes(), f"{METRICS_FILE} {whose}")
        verdict = judge(
            spec.gate,
            metrics["suites"],
            metrics["calibration"],
            None if champion is None else _suites(champion),
            has_confidence_head=spec.draft.enable_confidence_head,
            standing=Standing(inspect_files(folder), version.tags.get(TAG_ROLLED_BACK, "")),
        )
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
    return Judgement(version, verdict, card)


def record_judgement(client: MlflowClient, judgement: Judgement) -> None:
    """Keep the verdict with the version: two tags, its page, and a file of its run."""
    version, verdict = judgement.version, judgement.verdict
    name, number = version.name, str(version.version)
    failed = [f"{r.rule}: {r.got} (needs {r.needs})" for r in verdict.reasons if not r.ok]
    with registry_errors(f"record the verdict on {name} version {number}"):
        client.set_model_version_tag(name, number, TAG_GATE_PASSED, str(verdict.passed).lower())
        client.set_model_version_tag(name, number, TAG_GATE_REASONS, ("; ".join(failed) or "all met")[:_MAX_TAG_CHARS])
        client.update_model_version(name, number, describe_version(judgement.card, describe_verdict(verdict)))
        if version.run_id:
            document = json.dumps(verdict.to_document(), indent=1, ensure_ascii=False)
            client.log_text(version.run_id, document + "\n", VERDICT_FILE)


def _suites(champion: ModelVersion) -> Mapping[str, Mapping[str, Any]]:
    """The champion's evaluation; its weights are not needed and not downloaded."""
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
