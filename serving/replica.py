"""Put one replica together: target, draft, engine thread, HTTP service, alias follower. No Ray in here."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from draftline.errors import PlatformError
from draftline.spec import RunSpec
from serving.registry import DraftFiles, DraftFollower, DraftSource, open_source
from serving.service import CompletionService, ServiceInfo
from serving.tokenizer import TokenizerText
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
    info = ServiceInfo(
        model_name=serving.model_name,
        max_context=min(serving.max_context, target.max_context),
        num_spec_tokens=block_size(draft),
        draft=draft.name if draft else None,
        created=int(time.time()),
        policy=serving.policy,
    )
    text = TokenizerText(target.tokenizer, target.vocab_size, enable_thinking=target.enable_thinking)
    service = CompletionService(worker, text, info)
    if source is None or draft is None:
        return Replica(service, None)
    follower = DraftFollower(source, draft.name, lambda files: swap_draft(service, target, files), poll_s=config.poll_s)
    follower.start()
    return Replica(service, follower)


def open_draft_source(config: ReplicaConfig) -> DraftSource:
    """Where the configured draft comes from.

    Raises:
        RegistryError: no draft is configured, or its URI is unusable.
    """
    from draftline.cache_dir import default_cache_dir

    return open_source(
        config.draft_uri or "", tracking_uri=config.tracking_uri, cache_dir=config.cache_dir or default_cache_dir()
    )


def swap_draft(service: CompletionService, target: Target, files: DraftFiles) -> None:
    """Put another draft into the running engine; requests in flight go on.

    Loading happens in the calling thread, only the exchange between two steps.

    Raises:
        DraftlineError: the draft is damaged, not for this target, or not the one its calibration was fitted for;
            the old one stays.
    """
    from draftline.calibration.survival import Calibration
    from draftline.engine.build import check_calibration, load_draft

    draft = load_draft(files.draft_dir, target)
    calibration = Calibration.from_json(files.calibration_file.read_text()) if files.calibration_file else None
    if calibration is not None:
        check_calibration(calibration, draft)

    def exchange(engine: ServingEngine) -> None:
        engine.swap_draft(draft)
        engine.calibration = calibration

    service.worker.call(exchange).result()
    service.set_draft(files.name, block_size(files))
    service.worker.metrics.record_swap()


def block_size(draft: DraftFiles | None) -> int:
    """Most tokens that a draft proposes per step; 0 without one."""
    if draft is None:
        return 0
    return int(json.loads((draft.draft_dir / "config.json").read_text()).get("block_size", 0))


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
