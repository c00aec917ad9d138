"""Decode the calibration prompts with whole blocks and fit the confidences."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from draftline.calibration.choice import MIN_SAMPLES, VerifiedBlocks, fit_calibration
from draftline.calibration.measures import survival_events
from draftline.calibration.profile import EngineSize, profile_costs
from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import DraftModel
from draftline.engine.build import run_to_completion
from draftline.engine.engine import Engine, EngineLimits, StepTrace
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.prompts.spread import even_spread
from draftline.responses.generate import prompt_ids
from draftline.scheduling.policies import FixedPolicy
from draftline.spec import RunSpec
from draftline.target.load import Target

_SLOTS = 8


def calibrate(
    spec: RunSpec,
    target: Target,
    draft: DraftModel,
    prompts: list[dict[str, object]],
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> Calibration:
    """Fit confidences on the calibration split, half of it decoded greedily.

    Serving sees both laws, and survival differs between them; the fit covers
    the mixture. A draft without a confidence head keeps the identity.

    Args:
        spec: The run spec.
        target: The target.
        draft: The draft.
        prompts: Records of the prompts station.
        on_progress: Called with finished and all requests.

    A set too small to have a calibration split keeps the identity as well.
    """
    requests = _requests(spec, target, prompts)
    block = draft.config.block_size
    traces = [t for t in _decode(target, draft, requests, on_progress) if t.num_verified == block]
    accepted = [t.num_accepted for t in traces]
    if draft.config.enable_confidence_head and traces:
        logits = np.array([t.confidence_B for t in traces], dtype=np.float64)
        blocks = VerifiedBlocks(logits, accepted, [t.request_id for t in traces])
        fitted = fit_calibration(blocks, f"{spec.name} calibration split", spec.calibration.method)
    else:
        fitted = Calibration.identity(block)
    if len(traces) >= MIN_SAMPLES:
        # What serving expects of a block before it has seen any: all there is for a draft without a confidence head.
        survival = survival_events(accepted, block).mean(axis=0).tolist()
        fitted = replace(fitted, extra={**fitted.extra, "survival": survival})
    if not spec.calibration.profile_cost:
        return fitted
    table = profile_costs(target, draft, EngineSize(_SLOTS, min(spec.serving.max_context, target.max_context), block))
    return replace(fitted, extra={**fitted.extra, "cost_table": table.to_json(), "sps_table": table.sps_table()})


def _decode(
    target: Target, draft: DraftModel, requests: list[EngineRequest], on_progress: Callable[[float, float], None]
) -> list[StepTrace]:
    if not requests:
        return []
    limit = max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)
    engine = Engine(target, EngineLimits(_SLOTS, limit), FixedPolicy(), keep_traces=True)
    engine.swap_draft(draft)
    finished = 0
    for event in run_to_completion(engine, requests):
        if event.finish_reason is not None:
            finished += 1
            on_progress(finished, len(requests))
    return engine.traces or []


def _requests(spec: RunSpec, target: Target, prompts: list[dict[str, object]]) -> list[EngineRequest]:
    law, limit = spec.responses.sampling, spec.calibration.max_new_tokens
    requests = []
    for number, prompt in enumerate(prompts):
        turns = prompt["turns"]
        assert isinstance(turns, list)
        system = prompt.get("system")
        messages = [{"role": "system", "content": str(system)}] if system else []
        ids = prompt_ids(target, [*messages, {"role": "user", "content": turns[0]}])
        if len(ids) + limit > min(spec.serving.max_context, target.max_context):
            continue
        temperature = 0.0 if number % 2 == 0 else law.temperature
        sampling = SamplingParams(limit, temperature, law.top_p, law.top_k, seed=spec.seed + number)
        requests.append(EngineRequest(f"calibration-{number}", ids, sampling))
    return requests


def read_prompts(data: bytes, limit: int) -> list[dict[str, object]]:
    """Prompt records of a JSON-lines object, an even spread of at most ``limit`` (0 for all)."""
    records: list[dict[str, object]] = [json.loads(line) for line in data.split(b"\n") if line]
    # The file may be sorted by topic.
    return even_spread(records, limit)
