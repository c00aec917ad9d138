"""A replica around the scripted engine, for Ray Serve without a model."""

from __future__ import annotations

from collections.abc import Sequence

from draftline.engine.requests import EngineRequest
from serving.replica import Replica, ReplicaConfig
from tests.serving.scripted_engine import ScriptedEngine, count_up
from tests.serving.servers import make_service, wait_until

CRASH = b"crash the engine"
"""A prompt that ends the engine; nothing of a real one knows such a thing."""

LOADING, LOADED = "loading", "loaded"


def _script(request: EngineRequest) -> Sequence[int]:
    if bytes(request.prompt_ids) == CRASH:
        raise RuntimeError("this prompt broke the engine")
    return count_up(request)


def start_scripted(config: ReplicaConfig) -> Replica:
    """Starts what :func:`serving.replica.start_replica` starts, with a scripted engine.

    With a cache directory it says there that it is loading, and has loaded when it is told so there.
    """
    if config.cache_dir is not None:
        (config.cache_dir / LOADING).touch()
        wait_until((config.cache_dir / LOADED).exists, 200)
    serving = config.spec.serving
    engine = ScriptedEngine(_script, max_running=serving.max_requests, max_context=serving.max_context, step_s=0.005)
    service = make_service(engine, max_waiting=serving.max_waiting, model_name=serving.model_name)
    service.set_draft(None, 0)
    return Replica(service, None)
