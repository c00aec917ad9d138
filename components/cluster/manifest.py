"""A step's RayJob as an object: pure functions from settings to what Kubernetes is given.

Beyond its CRD KubeRay 1.7 asks (``ray-operator/controllers/ray/utils/validation.go``):
a RayJob's name has at most 47 characters; ``suspend`` and a TTL need
``shutdownAfterJobFinishes``; every worker group states its least and greatest size.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from components.cluster.settings import SPOT_TOLERATIONS, JobSettings
from draftline.jobs import EVENTS_ENV, EVENTS_TO_LOG

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
MAX_NAME = 47
_NAME_DIGITS = 16
_SUBMITTER_RESOURCES = {"requests": {"cpu": "200m", "memory": "256Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
_USER = 1000
_HOME = "/home/draftline"
_PLAIN_ENV = {
    "HOME": _HOME,
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    EVENTS_ENV: EVENTS_TO_LOG,
}


@dataclass(frozen=True)
class PodFacts:
    """What a job takes over from the pod of its step.

    Attributes:
        image: Draftline's image.
        pull_policy: Of the image.
        pull_secrets: Names of secrets for its registry.
        env_from: Environment entries that refer to secrets and config maps; the values never pass through here.
    """

    image: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: Sequence[str] = ()
    env_from: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class JobPlan:
    """One RayJob.

    Attributes:
        name: See :func:`job_name`.
        namespace: Of the step's pod.
        command: The entry point and its arguments.
        settings: Size and place.
        pod: What it takes over.
        labels: Beside those that say what it is.
        annotations: Facts for whoever looks at it.
    """

    name: str
    namespace: str
    command: Sequence[str]
    settings: JobSettings
    pod: PodFacts
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


def job_name(station: str, workspace: str, key: str) -> str:
    """The same name for the same work, so that a step which is started again finds its job.

    Args:
        station: Name of the station.
        workspace: URI of the workspace: another one is other work.
        key: Content key of the step.
    """
    digest = hashlib.sha256(f"{workspace}\n{key}".encode()).hexdigest()[:_NAME_DIGITS]
    return f"draftline-{station}-{digest}"[:MAX_NAME].strip("-")


def build_ray_job(plan: JobPlan) -> dict[str, Any]:
    """The RayJob (``ray.io/v1``)."""
    settings = plan.settings
    labels = {**_labels(), **plan.labels}
    spec: dict[str, Any] = {
        "entrypoint": shlex.join(plan.command),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.ttl_s,
        "backoffLimit": settings.backoff_limit,
        "activeDeadlineSeconds": settings.deadline_s,
        "submitterPodTemplate": _template(plan, "submitter", _SUBMITTER_RESOURCES),
        "rayClusterSpec": _cluster(plan),
    }
    if settings.start_deadline_s:
        spec["preRunningDeadlineSeconds"] = settings.start_deadline_s
    if settings.queue:
        labels[QUEUE_LABEL] = settings.queue
        # Kueue admits the job by taking this away.
        spec["suspend"] = True
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "RayJob",
        "metadata": {
            "name": plan.name,
            "namespace": plan.namespace,
            "labels": labels,
            "annotations": dict(plan.annotations),
        },
        "spec": spec,
    }


def _cluster(plan: JobPlan) -> dict[str, Any]:
    settings = plan.settings
    head = {"requests": {"cpu": settings.head_cpu, "memory": settings.head_memory}}
    head["limits"] = dict(head["requests"])
    worker = {"requests": {"cpu": settings.cpu, "memory": settings.memory}}
    if settings.gpu_count:
        worker["requests"][settings.gpu_type] = str(settings.gpu_count)
    worker["limits"] = dict(worker["requests"])
    return {
        "rayVersion": settings.ray_version,
        "authOptions": {"mode": settings.auth},
        "headGroupSpec": {
            # The head drives; a task on it would compete with the driver for its memory.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": _template(plan, "head", head),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": settings.num_workers,
                "minReplicas": settings.num_workers,
                "maxReplicas": settings.num_workers,
                "rayStartParams": {},
                "template": _template(plan, "worker", worker),
            }
        ],
    }


def _template(plan: JobPlan, role: str, resources: Mapping[str, Any]) -> dict[str, Any]:
    settings = plan.settings
    container = {
        "name": f"ray-{role}",
        "image": plan.pod.image,
        "imagePullPolicy": plan.pod.pull_policy,
        "env": [{"name": name, "value": value} for name, value in _PLAIN_ENV.items()] + list(plan.pod.env_from),
        "resources": dict(resources),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "home", "mountPath": _HOME},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "home", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
        ],
    }
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if plan.pod.pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in plan.pod.pull_secrets]
    if role == "submitter":
        spec["restartPolicy"] = "Never"
    if role == "worker":
        spec["nodeSelector"] = dict(settings.node_selector)
        spec["tolerations"] = _tolerations(settings)
    return {"metadata": {"labels": {**_labels(), "app.kubernetes.io/component": f"job-{role}"}}, "spec": spec}


def _tolerations(settings: JobSettings) -> list[dict[str, Any]]:
    own = [toleration.model_dump(exclude_defaults=True) for toleration in settings.tolerations]
    # The default of an omitted operator is Kubernetes' own, Equal.
    gpu = [{"key": settings.gpu_type, "operator": "Exists", "effect": "NoSchedule"}] if settings.gpu_count else []
    spot = [dict(toleration) for toleration in SPOT_TOLERATIONS] if settings.spot else []
    return gpu + spot + own


def _labels() -> dict[str, str]:
    return {"app.kubernetes.io/name": "draftline", "app.kubernetes.io/managed-by": "draftline-pipeline"}
