"""The Ray Serve application: one deployment that is ingress and engine in one.

Why one: see docs/adr/0010-one-deployment-for-ingress-and-engine.md.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from draftline import __version__
from draftline.errors import PlatformError
from draftline.spec import RunSpec, ServingSpec
from serving.api import create_api
from serving.autoscaling import WorkPolicy
from serving.exposition import ReplicaPage, merge_pages, pages_for
from serving.loopback import confine_replica_port
from serving.replica import Replica, ReplicaConfig, StartReplica, read_api_keys, start_replica

DEPLOYMENT = "engine"

_REPORT_PERIOD_S = 1.0
_LEAST_LOOK_BACK_S = 2.0
_METRICS_TIMEOUT_S = 5.0

SPARE_REQUESTS = 32
"""Requests beyond slots and queue that Serve may hand to a replica.

They are health checks, scrapes and requests that get our own 429 at once;
were there none, Serve would queue the surplus itself, without an answer.
"""


DRAIN_TIMEOUT_S = 600.0
"""How long a replica that must go may take to finish what it answers."""


def fingerprint(config: ReplicaConfig, start: StartReplica) -> str:
    """Equal for deployments whose replicas would be equal; the draft is not part of it, replicas follow it."""
    keys = config.api_keys_file.read_bytes() if config.api_keys_file is not None else b""
    facts = (
        __version__,
        start.__module__,
        start.__qualname__,
        config.spec.target,
        config.spec.serving,
        replace(config, spec=RunSpec()),
        hashlib.sha256(keys).hexdigest(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@serve.ingress()
class EngineReplica:
    """One engine with its HTTP surface.

    Args:
        config: What to load and serve.
        start: Puts the replica together.
    """

    def __init__(self, config: ReplicaConfig, start: StartReplica = start_replica) -> None:
        confine_replica_port(ray.util.get_node_ip_address())
        self._keys = read_api_keys(config.api_keys_file)
        self._fingerprint = fingerprint(config, start)
        self._has_ui = config.spec.serving.ui
        self._peers: DeploymentHandle[Any] | None = None
        self._replica: Replica = start(config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return create_api(
            self._replica.service,
            self._keys,
            deployment=self._fingerprint,
            has_ui=self._has_ui,
            read_metrics=self._all_metrics,
        )

    def metrics_page(self) -> ReplicaPage:
        """Called by whichever replica was asked for ``/metrics``."""
        text = self._replica.service.worker.metrics.render().decode()
        return ReplicaPage(serve.get_replica_context().replica_tag, ray.util.get_node_ip_address(), text)

    async def _all_metrics(self, host: str) -> bytes:
        """Metrics of all replicas, or of those on the node that was asked by its address.

        One that does not answer in time is left out.
        """
        context = serve.get_replica_context()
        if self._peers is None:
            self._peers = serve.get_deployment_handle(context.deployment, context.app_name)
        answers = await self._peers.broadcast("metrics_page").results_async(
            timeout_s=_METRICS_TIMEOUT_S, return_exceptions=True
        )
        # Its own page in any case: a replica that was just started may not be known to the others yet.
        pages = [self.metrics_page(), *(answer for answer in answers if isinstance(answer, ReplicaPage))]
        return merge_pages(pages_for(host, pages, {node["NodeManagerAddress"] for node in ray.nodes()}))

    def check_health(self) -> None:
        """Called by Serve; raising makes it replace this replica.

        Raises:
            PlatformError: the engine is dead.
        """
        worker = self._replica.service.worker
        if not worker.is_healthy:
            raise PlatformError("the engine is not running", got=repr(worker.failure))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve; what :mod:`serving.autoscaling` sums up."""
        return self._replica.autoscaling_stats()

    def __del__(self) -> None:
        """Called by Serve on shutdown, and by Python when the constructor failed."""
        replica: Replica | None = getattr(self, "_replica", None)
        if replica is not None:
            replica.close()


def autoscaling_config(spec: ServingSpec) -> AutoscalingConfig:
    """Serve's autoscaler with our policy.

    Loads are averaged over the delay before replicas are added: shorter peaks are waiting places' work.
    """
    with warnings.catch_warnings():
        # Serve announces that an environment variable of the whole cluster will take this field's place. Until it does,
        # the field alone says it for one deployment, and the default of 10 s is as long as our delay.
        warnings.filterwarnings("ignore", message="The `metrics_interval_s` field", category=DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            target_ongoing_requests=spec.max_requests,
            upscale_delay_s=spec.upscale_delay_s,
            downscale_delay_s=spec.downscale_delay_s,
            metrics_interval_s=_REPORT_PERIOD_S,
            look_back_period_s=max(_LEAST_LOOK_BACK_S, spec.upscale_delay_s),
            policy=AutoscalingPolicy(
                policy_function=f"{WorkPolicy.__module__}:{WorkPolicy.__qualname__}",
                policy_kwargs={"max_requests": spec.max_requests},
            ),
        )


def build_app(config: ReplicaConfig, start: StartReplica = start_replica) -> serve.Application:
    """The application, ready for ``serve.run``.

    The replica asks Ray for one CPU and computes with ``config.num_threads``:
    on one machine it shares the cores with whatever pipeline step runs.

    Args:
        config: For every replica.
        start: Puts a replica together; another engine behind the same surface is another function here.
    """
    spec = config.spec.serving
    scaling: dict[str, Any] = {"num_replicas": spec.min_replicas}
    if spec.max_replicas > spec.min_replicas:
        scaling = {"autoscaling_config": autoscaling_config(spec)}
    decorate = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=spec.max_requests + spec.max_waiting + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=5.0,
        # A replica that is replaced or scaled in finishes its answers first; this bounds the longest of them.
        graceful_shutdown_timeout_s=DRAIN_TIMEOUT_S,
        # The next replica has loaded before the one in use stops, where there is room for both.
        max_surge_percent=100,
        # A wrong draft or target does not get better by trying; the second try is for a registry that was restarting.
        max_constructor_retry_count=2,
        **scaling,
    )
    application: serve.Application = decorate(EngineReplica).bind(config, start)
    return application
