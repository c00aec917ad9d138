"""Assemble an engine from a target, a draft folder and a calibration file."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import DraftModel, load_folder
from draftline.draft.dialects.model import EMBEDDING, LM_HEAD, draft_columns
from draftline.draft.prompt_lookup import PromptLookup
from draftline.engine.checks import check_fits
from draftline.engine.engine import Engine, EngineLimits
from draftline.engine.requests import EngineRequest, TokenEvent
from draftline.errors import FormatError, TargetError
from draftline.scheduling.costs import CostTable
from draftline.scheduling.policies import OffPolicy, policy_from_spec
from draftline.spec import ServingSpec
from draftline.target.load import Target

logger = logging.getLogger(__name__)


def load_draft(draft_dir: Path, target: Target) -> DraftModel:
    """Read a draft and check that it fits; copies of the target's tensors are compared and dropped.

    Raises:
        FormatError: damaged or foreign.
        TargetError: made for another target.
    """
    draft = load_folder(draft_dir)
    check_fits(draft.config, target.config)
    _check_frozen(draft, target)
    return replace(draft, frozen={})


def _check_frozen(draft: DraftModel, target: Target) -> None:
    columns = draft_columns(draft.config, draft.weights)
    head = target.lm_head_VD if columns is None else target.lm_head_VD[columns.to(target.lm_head_VD.device)]
    for name, theirs in ((EMBEDDING, target.embedding_VD), (LM_HEAD, head)):
        ours = draft.frozen.get(name)
        # Compared in the target's type: a checkpoint may hold the same numbers in a wider one.
        if ours is not None and not torch.equal(ours.to(theirs.device, theirs.dtype), theirs):
            raise TargetError(
                f"the draft carries another {name} than the target has",
                remedy="Serve the target that the draft was trained for; a draft with a head of its own cannot be run",
            )


def build_engine(
    target: Target,
    serving: ServingSpec,
    *,
    draft_dir: Path | None,
    calibration_file: Path | None,
) -> Engine:
    """The engine that a serving spec describes; plain decoding where nothing drafts.

    Args:
        target: The model.
        serving: What is wanted.
        draft_dir: A trained draft; read only where the spec's proposer is ``draft``.
        calibration_file: Of that draft.

    Raises:
        FormatError: the draft or the calibration is damaged, or they do not belong together.
        TargetError: the draft was made for another target.
    """
    if serving.proposer != "draft":
        draft_dir = calibration_file = None
    calibration = Calibration.from_json(calibration_file.read_text()) if calibration_file is not None else None
    has_proposer = draft_dir is not None or serving.proposer == "prompt_lookup"
    policy = policy_from_spec(serving) if has_proposer else OffPolicy()
    limits = EngineLimits(serving.max_requests, min(serving.max_context, target.max_context))
    engine = Engine(target, limits, policy, calibration=calibration)
    if draft_dir is not None:
        draft = load_draft(draft_dir, target)
        if calibration is not None:
            check_calibration(calibration, draft)
        engine.swap_draft(draft)
    elif serving.proposer == "prompt_lookup":
        engine.swap_proposer(PromptLookup)
    # The autoscaler reads off them how many requests a replica holds within the latency target.
    is_scaled = serving.max_replicas > serving.min_replicas
    if policy.is_adaptive or is_scaled:
        find_costs(engine, calibration)
    return engine


def find_costs(engine: Engine, calibration: Calibration | None) -> None:
    """Take the cost table of the calibration where it was measured on this machine and covers the engine; else measure.

    Raises:
        FormatError: the stored table is damaged or newer.
    """
    stored = calibration.extra.get("cost_table") if calibration is not None else None
    if stored:
        differing = engine.use_costs(CostTable.from_json(stored))
        if not differing:
            return
        logger.info("the stored step costs are not used (%s); profiling this machine", "; ".join(differing))
    started_s = time.monotonic()
    engine.profile()
    logger.info("profiled the costs of steps in %.1f s", time.monotonic() - started_s)


def check_calibration(calibration: Calibration, draft: DraftModel) -> None:
    """Refuse a calibration that has no temperature for some position of the draft's block.

    Raises:
        FormatError: it was fitted for another draft.
    """
    if len(calibration.temperatures) < draft.config.block_size:
        raise FormatError(
            "the calibration does not fit the draft's block",
            got=f"{len(calibration.temperatures)} temperatures",
            expected=str(draft.config.block_size),
            remedy="Take the calibration that belongs to this draft",
        )


def run_to_completion(engine: Engine, requests: Iterable[EngineRequest]) -> Iterator[TokenEvent]:
    """Submit requests and step until all are done, yielding every event."""
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        yield from engine.step()
