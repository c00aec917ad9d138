"""A replica around the scripted engine, for Ray Serve without a model."""

from __future__ import annotations

from serving.replica import Replica, ReplicaConfig
from tests.serving.scripted_engine import ScriptedEngine
from tests.serving.servers import make_service


def start_scripted(config: ReplicaConfig) -> Replica:
    """Starts what :func:`serving.replica.start_replica` starts, with a scripted engine."""
    serving = config.spec.serving
    engine = ScriptedEngine(max_running=serving.max_requests, max_context=serving.max_context, step_s=0.005)
    service = make_service(engine, max_waiting=serving.max_waiting, model_name=serving.model_name)
    return Replica(service, None)
