"""The endpoint under load: the product's HTTP surface and engine, plus two routes that a benchmark needs.

``POST /benchmark/policy`` exchanges the scheduling policy between two steps, so
that policies are compared on one process, one set of weights and one prefix
cache. ``GET /benchmark/totals`` counts what the engine did, step by step.

Run by :mod:`benchmarks.load` as ``python -m benchmarks.load_server REQUEST``.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from draftline.calibration.survival import Calibration
from draftline.draft.stored import stored_draft
from draftline.engine.build import find_costs
from draftline.engine.engine import Engine, EngineLimits
from draftline.engine.requests import TokenEvent
from draftline.scheduling.policies import policy_from_spec
from draftline.spec import RunSpec, ServingSpec, derive
from draftline.steps import StepResult
from draftline.storage import open_store
from draftline.target.load import Target, load_target
from serving.api import create_api
from serving.connections import GuardedConnection
from serving.service import CompletionService, ServiceInfo
from serving.tokenizer import TokenizerText
from serving.worker import EngineWorker


@dataclass
class Totals:
    """Sums over the steps since the start.

    Attributes:
        steps: Steps with at least one decoding request.
        request_steps: Decoding requests, summed over the steps.
        budget: Draft tokens verified.
        accepted: Of those, accepted.
        emitted: Tokens that answers grew by, first tokens included.
        forward_tokens: Tokens of the target's forwards.
        busy_ms: Time in steps.
        draft_ms: Of that, drafting.
    """

    steps: int = 0
    request_steps: int = 0
    budget: int = 0
    accepted: int = 0
    emitted: int = 0
    forward_tokens: int = 0
    busy_ms: float = 0.0
    draft_ms: float = 0.0


class CountingEngine(Engine):
    """An engine that adds up its step reports."""

    totals: Totals

    def step(self) -> list[TokenEvent]:
        """See :class:`Engine`."""
        events = super().step()
        report, totals = self.load().step, self.totals
        totals.emitted += sum(len(event.token_ids) for event in events)
        totals.busy_ms += report.measured_ms
        totals.forward_tokens += report.num_tokens
        if report.num_requests:
            totals.steps += 1
            totals.request_steps += report.num_requests
            totals.budget += report.budget
            totals.accepted += report.num_accepted
            totals.draft_ms += report.draft_ms
        return events


@dataclass(frozen=True)
class ServerRequest:
    """What to serve.

    Attributes:
        spec: The run spec, as JSON.
        workspace: Where draft and calibration are.
        draft: Result of the draft station, as JSON.
        calibration: Result of the calibration station, as JSON.
        slots: Decoding slots.
        context: Positions of each.
        threads: CPU threads of the engine.
        max_waiting: Places in the queue.
    """

    spec: dict[str, Any]
    workspace: str
    draft: str
    calibration: str
    slots: int
    context: int
    threads: int
    max_waiting: int = 128


@dataclass
class _Built:
    targets: list[Target] = field(default_factory=list)
    engines: list[CountingEngine] = field(default_factory=list)


def main() -> None:
    """Serve until the process is ended; the port is the first line of output."""
    request = ServerRequest(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    spec = RunSpec.model_validate(request.spec)
    built = _Built()
    worker = EngineWorker(
        lambda: _build(request, spec, built),
        max_running=request.slots,
        max_waiting=request.max_waiting,
        model_name=spec.serving.model_name,
    )
    worker.start().result()
    target, engine = built.targets[0], built.engines[0]
    info = ServiceInfo(
        spec.serving.model_name, request.context, num_spec_tokens=spec.draft.block_size, draft="benchmark", created=0
    )
    service = CompletionService(worker, TokenizerText(target.tokenizer, target.vocab_size), info)
    api = create_api(service, has_ui=False)
    _add_routes(api, worker, engine, spec.serving)
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(2048)
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(api, http=GuardedConnection, log_level="warning", lifespan="off", ws="none")
    uvicorn.Server(config).run([listening])


def _build(request: ServerRequest, spec: RunSpec, built: _Built) -> CountingEngine:
    torch.set_num_threads(request.threads)
    target = load_target(spec.target)
    store = open_store(request.workspace)
    stored = StepResult.from_json(request.calibration)
    calibration = Calibration.from_json(store.get(f"{stored.prefix}/{stored.outputs['file']}").decode())
    policy = policy_from_spec(spec.serving)
    limits = EngineLimits(request.slots, request.context)
    engine = CountingEngine(target, limits, policy, calibration=calibration)
    engine.totals = Totals()
    engine.swap_draft(stored_draft(store, StepResult.from_json(request.draft)))
    started_s = time.monotonic()
    find_costs(engine, calibration)
    print(f"step costs after {time.monotonic() - started_s:.1f} s", file=sys.stderr)
    built.targets.append(target)
    built.engines.append(engine)
    return engine


def _add_routes(api: FastAPI, worker: EngineWorker, engine: CountingEngine, serving: ServingSpec) -> None:
    @api.post("/benchmark/policy")
    def set_policy(fields: dict[str, Any]) -> dict[str, Any]:
        wanted = derive(RunSpec(serving=serving), {f"serving.{name}": value for name, value in fields.items()}).serving
        policy = policy_from_spec(wanted)
        worker.call(lambda _: setattr(engine, "policy", policy)).result()
        return fields

    @api.get("/benchmark/totals")
    def totals() -> dict[str, Any]:
        found: dict[str, Any] = {}
        worker.call(lambda _: found.update(asdict(engine.totals))).result()
        return found


if __name__ == "__main__":
    main()
