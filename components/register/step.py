"""The register step: a finished draft becomes a version in the MLflow registry."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from components.register.provenance import provenance_section, provenance_tags
from components.registry import (
    MAX_DESCRIPTION_CHARS,
    RUN_ID_ENV,
    connect,
    download_version,
    registry_errors,
    version_by_key,
)
from draftline.digests import require_digest
from draftline.registry_layout import (
    CALIBRATION_FILE,
    CARD_FILE,
    DRAFT_DIR,
    SPEC_FILE,
    TAG_KEY,
    digest_tag,
    file_digest,
)
from draftline.spec import RunSpec, dump_spec
from draftline.steps import StepContext, StepOutput

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_Item = TypeVar("_Item")

_BATCH = 500
_MAX_PARAM_CHARS = 500
_LAST_METRICS = ("accepted_length", "speedup_over_plain", "speedup_over_transformers", "ece")
_PAGE_FILE = "report.html"


@dataclass(frozen=True)
class _Registered:
    version: str
    run_id: str


def run(context: StepContext) -> StepOutput:
    """Register the draft, once per content key.

    The experiment and the registered model are named after the run spec. A
    version that carries this step's key is reused after its files were
    checked against their recorded digests.

    Raises:
        PlatformError: no MLflow server answers.
        RegistryError: the registry refused something.
        FormatError: an artefact differs from what its step recorded.
        StorageError: the workspace failed.
    """
    client = connect()
    name = context.spec.name
    with tempfile.TemporaryDirectory(prefix="draftline-register-") as scratch:
        existing = version_by_key(client, name, context.key)
        if existing is not None:
            download_version(existing, Path(scratch, "existing"))
            registered = _Registered(str(existing.version), existing.run_id or "")
            note = f"already version {existing.version}"
        else:
            registered = _register(client, context, Path(scratch, "model"))
            note = f"version {registered.version}"
    context.report(1, 1, "versions", note=note)
    return StepOutput(
        outputs={
            "model_name": name,
            "version": registered.version,
            "model_uri": f"models:/{name}/{registered.version}",
            "run_id": registered.run_id,
        },
        metrics=_suite_metrics(context),
    )


def describe_version(card: str, verdict: str = "") -> str:
    """Text of a version's page: the gate's verdict, then the card, cut at a line to the registry's limit."""
    text = f"```\n{verdict}\n```\n\n{card}" if verdict else card
    # Pictures lie beside the card; the registry's page cannot show them.
    lines = [line for line in text.splitlines() if not line.startswith("![")]
    end = f"\n\nThe whole card is the file {CARD_FILE} of this version."
    room = MAX_DESCRIPTION_CHARS - len(end)
    kept: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            return "\n".join(kept)[: MAX_DESCRIPTION_CHARS - len(end)] + end
        kept.append(line)
    return "\n".join(kept)


def gather_folder(context: StepContext, folder: Path) -> dict[str, str]:
    """Lay the artefact folder out on disk, each file checked against its step's record.

    Returns:
        sha256 by path in the folder.

    Raises:
        FormatError: a stored file differs from its record.
        StorageError: the workspace failed.
    """
    draft, calibration, report = (context.inputs[name] for name in ("draft", "calibration", "report"))
    digests: dict[str, str] = {}

    def fetch(key: str, path: str, expected: str | None) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        context.store.get_file(key, target)
        digests[path] = file_digest(target)
        if expected is not None:
            what = f"{key} in the workspace is not the file its step wrote"
            require_digest(digests[path], expected, what, "Delete that step's folder in the workspace and run again")

    for file, expected in sorted(draft.outputs["files"].items()):
        fetch(f"{draft.prefix}/{DRAFT_DIR}/{file}", f"{DRAFT_DIR}/{file}", expected)
    if calibration.outputs.get("file"):
        fetch(f"{calibration.prefix}/{calibration.outputs['file']}", CALIBRATION_FILE, None)
    for file, expected in sorted(report.outputs["files"].items()):
        if file != _PAGE_FILE:
            fetch(f"{report.prefix}/{file}", file, expected)
    spec = dump_spec(context.spec).encode()
    (folder / SPEC_FILE).write_bytes(spec)
    digests[SPEC_FILE] = hashlib.sha256(spec).hexdigest()
    return digests


def _register(client: MlflowClient, context: StepContext, folder: Path) -> _Registered:
    from mlflow.entities import LoggedModelOutput

    folder.mkdir()
    digests = gather_folder(context, folder)
    provenance = provenance_tags(context)
    card = folder / CARD_FILE
    # The report's card is the same wherever and by whichever commit it is made; who made this one is added here.
    card.write_text(card.read_text(encoding="utf-8") + provenance_section(provenance), encoding="utf-8")
    digests[CARD_FILE] = file_digest(card)
    name = context.spec.name
    with registry_errors(f"register a version of {name}"):
        run = _open_run(client, context)
        run_id = run.info.run_id
        _log_run(client, context, run)
        model = client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=run_id,
            model_type="draft",
            tags={TAG_KEY: context.key},
            params=flatten_spec(context.spec),
        )
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        _ensure_registered_model(client, name)
        version = client.create_model_version(
            name,
            source=model.artifact_location,
            run_id=run_id,
            model_id=model.model_id,
            tags=_version_tags(context, digests) | provenance,
            description=describe_version(card.read_text(encoding="utf-8")),
        )
        # As mlflow.register_model does: the model's page then links to its version.
        link = json.dumps([{"name": name, "version": str(version.version)}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
        if run.data.tags.get(TAG_KEY) == context.key:
            # Ours; a run that an orchestrator opened is closed by the orchestrator.
            client.set_terminated(run_id)
    return _Registered(str(version.version), run_id)


def _open_run(client: MlflowClient, context: StepContext) -> Run:
    """The run to log to: the orchestrator's, else one left by a killed attempt, else a new one."""
    if given := os.environ.get(RUN_ID_ENV):
        return client.get_run(given)
    name = context.spec.name
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    earlier = client.search_runs([experiment_id], f"tags.`{TAG_KEY}` = '{context.key}'", max_results=1)
    if earlier:
        return earlier[0]
    return client.create_run(experiment_id, run_name=f"{name}-{context.key[:8]}", tags={TAG_KEY: context.key})


def _log_run(client: MlflowClient, context: StepContext, run: Run) -> None:
    from mlflow.entities import Param, RunTag

    run_id = run.info.run_id
    params = [Param(key, value) for key, value in flatten_spec(context.spec).items()]
    for batch in _batches(params, 100):
        client.log_batch(run_id, params=batch)
    # One timestamp for all: logged again after a kill, the rows are equal and stay single.
    for metrics in _batches(list(_metrics(context, run.info.start_time)), _BATCH):
        client.log_batch(run_id, metrics=metrics)
    tags = [RunTag(f"draftline.step.{station}", result.key) for station, result in sorted(context.inputs.items())]
    client.log_batch(run_id, tags=tags)
    client.log_text(run_id, dump_spec(context.spec), SPEC_FILE)
    page = context.inputs["report"]
    if _PAGE_FILE in page.outputs["files"]:
        client.log_text(run_id, context.store.get(f"{page.prefix}/{_PAGE_FILE}").decode(), _PAGE_FILE)


def _metrics(context: StepContext, time_ms: int) -> Iterator[Metric]:
    from mlflow.entities import Metric

    for key, value in _suite_metrics(context).items():
        yield Metric(key, value, time_ms, 0)
    for station in ("draft", "calibration"):
        for key, value in sorted(context.inputs[station].metrics.items()):
            if math.isfinite(value):
                yield Metric(f"{station}/{key}", float(value), time_ms, 0)
    draft = context.inputs["draft"]
    if not draft.outputs.get("history"):
        return
    for line in context.store.get(f"{draft.prefix}/{draft.outputs['history']}").split(b"\n"):
        row = json.loads(line) if line else {}
        step = int(row.pop("step", 0))
        for key, value in sorted(row.items()):
            if isinstance(value, int | float) and math.isfinite(value):
                yield Metric(f"train/{key}", float(value), time_ms, step)


def _suite_metrics(context: StepContext) -> dict[str, float]:
    """``accepted_length/held-out`` and so on, from the report's summary."""
    return {
        f"{figure}/{suite}": float(figures[figure])
        for suite, figures in context.inputs["report"].outputs["summary"].items()
        for figure in _LAST_METRICS
        if isinstance(figures.get(figure), int | float)
    }


def _version_tags(context: StepContext, digests: Mapping[str, str]) -> dict[str, str]:
    tags = {
        TAG_KEY: context.key,
        "draftline.target": context.spec.target.source,
        "draftline.target.dtype": context.spec.target.dtype,
        **{digest_tag(path): digest for path, digest in digests.items()},
    }
    for station, result in sorted(context.inputs.items()):
        tags[f"draftline.step.{station}"] = result.key
    for key, value in _suite_metrics(context).items():
        tags[f"draftline.{key}"] = f"{value:.4g}"
    for suite, figures in context.inputs["report"].outputs["summary"].items():
        tags[f"draftline.lossless/{suite}"] = str(figures.get("lossless", "not-checked"))
    return tags


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=f"Draft models for {name}, made by Draftline.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def flatten_spec(spec: RunSpec) -> dict[str, str]:
    """The spec as dotted parameters, such as ``draft.num_layers``."""
    flat: dict[str, str] = {}

    def visit(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                visit(value, f"{prefix}{key}.")
            else:
                text = value if isinstance(value, str) else json.dumps(value)
                flat[prefix + key] = text[:_MAX_PARAM_CHARS]

    visit(spec.model_dump(mode="json"), "")
    return flat


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
