"""The stations of the training DAG: what each reads, and how its content key comes about.

A station's key is a hash of the spec fields it reads, the keys of its inputs,
facts about the outside world that the spec only names (a file's digest, the
target's fingerprint), and a version that is raised when its code changes what
it writes. Equal key, equal bytes: so a finished station is never run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftline.errors import StepError
from draftline.spec import RunSpec, derive

KEY_LENGTH = 20


@dataclass(frozen=True)
class Station:
    """One row of the DAG.

    Attributes:
        name: Folder in the workspace and name of the KFP component.
        fields: Dotted spec fields whose values enter the key.
        inputs: Stations whose results it reads.
        run: ``module:function`` that does the work, given a
            :class:`draftline.steps.StepContext`; for a Ray job, its entry point.
        neutral: Fields that say how a result is kept, not what it gives, each with one value. Steps that read the
            result know it by the key that it would have with these values: their own keys, and bytes, do not depend
            on the fields.
        version: Raised when the code changes what is written.
        on_ray: The work runs as a Ray job.
        is_effect: Changes a service (registry, endpoint) instead of the
            workspace: always run again, and idempotent.
    """

    name: str
    fields: tuple[str, ...]
    inputs: tuple[str, ...]
    run: str
    neutral: tuple[tuple[str, Any], ...] = ()
    version: int = 1
    on_ray: bool = False
    is_effect: bool = False


_STATIONS = (
    Station(
        "prompts",
        # Not prompts.source: its digest is a fact of the step, so an equal file elsewhere is the same work.
        (
            "prompts.system_prompt",
            "prompts.limit",
            "prompts.max_turn_chars",
            "prompts.near_duplicate_threshold",
            "prompts.holdout_fraction",
            "prompts.validation_fraction",
            "prompts.calibration_fraction",
            "seed",
        ),
        (),
        "draftline.prompts.station:run",
    ),
    Station(
        "responses",
        (
            "target",
            "responses.max_new_tokens",
            "responses.samples_per_prompt",
            "responses.greedy_first",
            "responses.sampling",
            "responses.shard_prompts",
            "responses.threads_per_worker",
            "tokens.max_length",
            "seed",
        ),
        ("prompts",),
        "ray_jobs.regenerate:run",
        on_ray=True,
    ),
    Station("tokens", ("tokens", "target"), ("responses",), "draftline.tokens.station:run", version=2),
    Station(
        "hidden-states",
        (
            "target",
            "cache.mode",
            "cache.codec",
            "cache.dedupe",
            "cache.threads_per_worker",
            "draft.target_layer_ids",
            "draft.num_taps",
        ),
        ("tokens",),
        "ray_jobs.capture:run",
        neutral=(("cache.mode", "store"),),
        version=2,
        on_ray=True,
    ),
    Station(
        "draft",
        # Not the workers, their threads, ddp or fsdp, the size of a pass: they change the last bits of a draft, and
        # a killed run must be able to go on with others (docs/adr/0018). Nor how often progress is saved.
        (
            "target",
            "draft",
            "train.precision",
            "train.steps",
            "train.epochs",
            "train.samples_per_step",
            "train.anchors_per_sample",
            "train.optimizer",
            "train.lr",
            "train.muon_lr",
            "train.warmup_fraction",
            "train.weight_decay",
            "train.grad_clip",
            "train.validate_every_steps",
            "train.validation_samples",
            "train.early_stop_patience",
            "train.loss",
            "seed",
        ),
        ("hidden-states",),
        "ray_jobs.train:run",
        version=4,
        on_ray=True,
    ),
    Station(
        "calibration",
        ("name", "target", "calibration", "responses.sampling", "serving.max_context", "seed"),
        ("prompts", "draft"),
        "ray_jobs.calibrate:run",
        version=4,
        on_ray=True,
    ),
    Station(
        "evaluation",
        (
            "target",
            "evaluation.max_prompts",
            "evaluation.max_new_tokens",
            "evaluation.sampled_prompts",
            "evaluation.temperatures",
            "evaluation.timing_temperature",
            "evaluation.timing_prompts",
            "evaluation.hf_prompts",
            "evaluation.lossless_prompts",
            "evaluation.lossless_tokens",
            "serving.max_context",
            "serving.policy",
            "serving.threshold",
            "serving.fixed_length",
            "seed",
        ),
        ("prompts", "draft", "calibration"),
        "ray_jobs.evaluate:run",
        version=3,
        on_ray=True,
    ),
    Station("report", ("name",), ("draft", "calibration", "evaluation"), "draftline.report.station:run", version=2),
    Station("register", ("name",), ("draft", "calibration", "report"), "components.register.step:run", is_effect=True),
    Station("gate", ("name", "gate"), ("report", "register"), "components.gate.step:run", is_effect=True),
    Station("deploy", ("name", "serving"), ("register", "gate"), "components.deploy.step:run", is_effect=True),
)

STATIONS: Mapping[str, Station] = {station.name: station for station in _STATIONS}


def content_key(
    station: Station,
    spec: RunSpec,
    input_keys: Mapping[str, str],
    facts: Mapping[str, str] | None = None,
) -> str:
    """The content key of one station (or one branch of its fan-out).

    Args:
        station: The row of the DAG.
        spec: The run spec.
        input_keys: Key of every input; a fan-out input contributes one entry
            per branch, named ``station:item``.
        facts: Digests of what the spec only names, and the fan-out item.

    Returns:
        ``KEY_LENGTH`` lower-case hexadecimal digits.

    Raises:
        StepError: an input's key is missing.
    """
    present = {name.partition(":")[0] for name in input_keys}
    missing = set(station.inputs) - present
    if missing:
        raise StepError(
            f"station {station.name!r} lacks inputs", got=sorted(present), expected=", ".join(station.inputs)
        )
    document = spec.model_dump(mode="json")
    identity = {
        "station": station.name,
        "version": station.version,
        "fields": {field: _lookup(document, field) for field in station.fields},
        "inputs": dict(sorted(input_keys.items())),
        "facts": dict(sorted((facts or {}).items())),
    }
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_LENGTH]


def neutral_key(
    station: Station, spec: RunSpec, input_keys: Mapping[str, str], facts: Mapping[str, str] | None = None
) -> str:
    """The key by which later steps know a station's result, see :attr:`Station.neutral`; arguments as there."""
    changed = {
        field: value for field, value in station.neutral if _lookup(spec.model_dump(mode="json"), field) != value
    }
    return content_key(station, derive(spec, changed) if changed else spec, input_keys, facts)


def _lookup(document: Mapping[str, Any], dotted: str) -> Any:
    node: Any = document
    for part in dotted.split("."):
        node = node[part]
    return node
