"""Put one replica together: target, draft, engine thread, HTTP service, alias follower. No Ray in here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from draftline.errors import PlatformError
from draftline.spec import RunSpec
from serving import autoscaling
from serving.capacity import LatencyTarget, plain_step_cost
from serving.capture.capture import start_capture
from serving.registry import DraftFiles, DraftFollower, DraftSource, open_source
from serving.service import CompletionService, ServiceInfo
from serving.tokenizer import TokenizerText
from serving.watch import DraftWatch
from serving.worker import EngineWorker, ServingEngine

if TYPE_CHECKING:
    from draftline.engine.engine import Engine
    from draftline.target.load import Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReplicaConfig:
    """What a replica is told.

    Attributes:
        spec: The run spec; ``target`` and ``serving`` are read.
        draft_uri: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, a folder,
            or ``None`` to decode plainly.
        tracking_uri: MLflow server of a ``models:`` URI.
        cache_dir: Where drafts and converted targets are kept.
        num_threads: CPU threads of the engine.
        poll_s: Seconds between looks at the alias.
        api_keys_file: File with one accepted key per line; ``None`` asks for none.
    """

    spec: RunSpec
    draft_uri: str | None = None
    tracking_uri: str | None = None
    cache_dir: Path | None = None
    num_threads: int = 2
    poll_s: float = 20.0
    api_keys_file: Path | None = None

    @property
    def has_draft(self) -> bool:
        """Whether a trained draft is fetched and followed; other proposers need none."""
        return self.draft_uri is not None and self.spec.serving.proposer == "draft"


@dataclass(frozen=True)
class Replica:
    """A running replica."""

    service: CompletionService
    follower: DraftFollower | None
    latency: LatencyTarget = field(default_factory=LatencyTarget)

    def autoscaling_stats(self) -> dict[str, float]:
        """What :mod:`serving.autoscaling` sums up, under its names."""
        worker = self.service.worker
        load = worker.load()
        return {
            autoscaling.RUNNING: float(load.num_running),
            autoscaling.WAITING: float(load.num_waiting),
            autoscaling.KV_USAGE: load.kv_cache_usage,
            autoscaling.SLO_REQUESTS: float(self.latency.slo_requests or worker.max_running),
            autoscaling.SLO_RATIO: self.latency.ratio(worker.metrics.tpot_s),
        }

    def close(self) -> None:
        """Stop following and stop the engine."""
        if self.follower is not None:
            self.follower.stop()
        self.service.close()


StartReplica = Callable[[ReplicaConfig], Replica]


def start_replica(config: ReplicaConfig, source: DraftSource | None = None) -> Replica:
    """Load everything and start the engine thread; blocks until requests can be answered.

    Args:
        config: What to load.
        source: Where the draft comes from, instead of ``config.draft_uri``.

    Raises:
        DraftlineError: the target or the draft cannot be had, or they do not fit.
    """
    serving = config.spec.serving
    if source is None and config.has_draft:
        source = open_draft_source(config)
    draft = source.fetch(source.current()) if source is not None else None
    targets: list[Target] = []

    def build() -> Engine:
        import torch

        from draftline.engine.build import build_engine
        from draftline.target.load import load_target

        # Counted per thread by OpenMP, so it belongs into the thread that steps.
        torch.set_num_threads(config.num_threads)
        target = load_target(
            config.spec.target, cache_dir=config.cache_dir, forward=serving.target_forward, device="auto"
        )
        targets.append(target)
        return build_engine(
            targets[0],
            serving,
            draft_dir=draft.draft_dir if draft else None,
            calibration_file=draft.calibration_file if draft else None,
        )

    worker = EngineWorker(
        build, max_running=serving.max_requests, max_waiting=serving.max_waiting, model_name=serving.model_name
    )
    worker.start().result()
    target = targets[0]
    latency = LatencyTarget(serving.target_tpot_ms, serving.max_requests)
    watch = DraftWatch(worker.metrics, serving.drift)
    worker.call(lambda engine: _begin(engine, watch, latency, draft)).result()
    worker.on_blocks = watch.record
    worker.metrics.show("draftline:slo_requests", lambda: latency.slo_requests)
    worker.metrics.show("draftline:slo_ratio", lambda: latency.ratio(worker.metrics.tpot_s))
    info = ServiceInfo(
        model_name=serving.model_name,
        max_context=min(serving.max_context, target.max_context),
        num_spec_tokens=draft.block_size if draft else 0,
        draft=draft.name if draft else None,
        created=int(time.time()),
        policy=serving.policy,
    )
    text = TokenizerText(target.tokenizer, target.vocab_size, enable_thinking=target.enable_thinking)
    capture = start_capture(serving.capture, worker.metrics)
    service = CompletionService(worker, text, info, capture)
    if source is None or draft is None:
        return Replica(service, None, latency)
    follower = DraftFollower(source, draft.name, EngineSeat(service, target, watch, latency), poll_s=config.poll_s)
    follower.start()
    return Replica(service, follower, latency)


def _begin(engine: ServingEngine, watch: DraftWatch, latency: LatencyTarget, draft: DraftFiles | None) -> None:
    """What has to be known of the draft from its first step on; runs between two steps."""
    watch.use(draft)
    latency.use(plain_step_cost(engine.costs))


def open_draft_source(config: ReplicaConfig) -> DraftSource:
    """Where the configured draft comes from.

    Raises:
        RegistryError: no draft is configured, or its URI is unusable.
    """
    from draftline.cache_dir import default_cache_dir

    return open_source(
        config.draft_uri or "", tracking_uri=config.tracking_uri, cache_dir=config.cache_dir or default_cache_dir()
    )


@dataclass(frozen=True)
class EngineSeat:
    """The place of the draft in a running replica; see :class:`serving.registry.Seat`.

    Attributes:
        service: Says which draft is in use.
        target: What the draft must fit.
        watch: Compares it with its evaluation.
        latency: Takes over what steps cost with it.
    """

    service: CompletionService
    target: Target
    watch: DraftWatch
    latency: LatencyTarget

    def swap(self, files: DraftFiles) -> None:
        """Put another draft into the running engine; requests in flight go on.

        Loading happens in the calling thread, only the exchange between two
        steps: draft, calibration, costs and reference change together.

        Raises:
            DraftlineError: the draft is damaged, not for this target, or not the one its calibration was fitted
                for; the old one stays.
        """
        from draftline.calibration.survival import Calibration
        from draftline.engine.build import check_calibration, load_draft
        from draftline.scheduling.costs import CostTable

        draft = load_draft(files.draft_dir, self.target)
        calibration = Calibration.from_json(files.calibration_file.read_text()) if files.calibration_file else None
        if calibration is not None:
            check_calibration(calibration, draft)
        stored = calibration.extra.get("cost_table") if calibration is not None else None
        costs = CostTable.from_json(stored) if stored else None

        def exchange(engine: ServingEngine) -> None:
            engine.swap_draft(draft)
            engine.calibration = calibration
            if costs is not None and (differing := engine.use_costs(costs)):
                logger.info("the step costs of %s are not used: %s", files.name, "; ".join(differing))
            _begin(engine, self.watch, self.latency, files)

        self.service.worker.call(exchange).result()
        self.service.set_draft(files.name, files.block_size)
        self.service.worker.metrics.record_swap()

    def note_refusal(self, name: str) -> None:
        """Count it."""
        self.service.worker.metrics.record_swap_refused()

    def take_drift_events(self) -> list[str]:
        """Of the watch."""
        return [event.to_json() for event in self.watch.take_events()]


def read_api_keys(path: Path | None) -> tuple[str, ...]:
    """Keys of a file, one a line; blank lines and ``#`` comments are skipped.

    Raises:
        PlatformError: the file cannot be read or holds no key.
    """
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlatformError(f"cannot read the API keys in {path}", got=type(error).__name__) from None
    stripped = [line.strip() for line in lines]
    keys = tuple(line for line in stripped if line and not line.startswith("#"))
    if not keys:
        # An empty file must not silently open the server to everyone.
        raise PlatformError(f"{path} holds no API key", expected="one key per line")
    return keys
