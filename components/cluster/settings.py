"""What a pipeline's parameters and config map say about its jobs, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from draftline.errors import SpecError

QUEUE_ENV = "DRAFTLINE_KUEUE_QUEUE"
PRIORITY_CLASS_ENV = "DRAFTLINE_JOB_PRIORITY_CLASS"
SERVICE_ACCOUNT_ENV = "DRAFTLINE_JOB_SERVICE_ACCOUNT"
_FROM_ENVIRONMENT = {
    "queue": QUEUE_ENV,
    "priority_class": PRIORITY_CLASS_ENV,
    "service_account": SERVICE_ACCOUNT_ENV,
}
"""Settings that the chart's config map knows; a parameter that is not empty wins."""

SPOT_TOLERATIONS: tuple[Mapping[str, str], ...] = (
    {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
    {"key": "karpenter.sh/capacity-type", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
)
"""Taints of nodes that may be taken away: GKE's and AKS' own, and the usual one of Karpenter's node pools."""


class Toleration(BaseModel):
    """As in a pod's specification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = ""
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    tolerationSeconds: int | None = None


class JobSettings(BaseModel):
    """One RayJob's size and place.

    Attributes:
        cpu: Of each worker.
        memory: Of each worker.
        gpu_type: Resource name of the accelerator.
        gpu_count: Of each worker.
        num_workers: Worker pods.
        head_cpu: Of the head, which drives and does not compute.
        head_memory: Of the head.
        shared_memory: Limit of ``/dev/shm`` in every pod; counts as memory of the pod when used.
        ray_version: Of the image.
        auth: Whether Ray asks for a token.
        queue: Kueue's LocalQueue; the job waits suspended until it is admitted. Empty: none.
        priority_class: Of all pods. Empty: none.
        service_account: Of all pods. Empty: the namespace's default.
        node_selector: Of the workers.
        tolerations: Of the workers.
        spot: Workers may run on nodes that can be taken away; the head and the submitter may not.
        retries: Fresh attempts after a job that died without saying why.
        backoff_limit: KubeRay's own attempts within one job, each with a new cluster, whatever the reason.
        deadline_s: Seconds that one job may take, the wait for nodes included.
        start_deadline_s: Seconds until the job must run; 0 waits for ever (a queue may be long).
        ttl_s: Seconds that a finished job stays to be looked at.
        unreachable_s: Seconds for which the Kubernetes API may be away before the step fails.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str = Field("8", min_length=1)
    memory: str = Field("32Gi", min_length=1)
    gpu_type: str = "nvidia.com/gpu"
    gpu_count: NonNegativeInt = 0
    num_workers: PositiveInt = 1
    head_cpu: str = Field("2", min_length=1)
    head_memory: str = Field("16Gi", min_length=1)
    shared_memory: str = Field("8Gi", min_length=1)
    ray_version: str = "2.60.0"
    auth: Literal["token", "disabled"] = "token"
    queue: str = ""
    priority_class: str = ""
    service_account: str = ""
    node_selector: Mapping[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    spot: bool = False
    retries: NonNegativeInt = 2
    backoff_limit: NonNegativeInt = 0
    deadline_s: PositiveInt = 7 * 24 * 3600
    start_deadline_s: NonNegativeInt = 0
    ttl_s: NonNegativeInt = 3600
    unreachable_s: PositiveInt = 300


def read_settings(given: Mapping[str, Any], environ: Mapping[str, str]) -> JobSettings:
    """The settings of a step.

    Args:
        given: The pipeline's parameters.
        environ: Of the step's pod; has what the config map knows.

    Raises:
        SpecError: an unknown name or an impossible value.
    """
    known = {name: environ[variable] for name, variable in _FROM_ENVIRONMENT.items() if environ.get(variable)}
    try:
        return JobSettings.model_validate({**known, **{name: value for name, value in given.items() if value != ""}})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise SpecError(
            f"the job's settings are wrong at {where!r}",
            got=f"{problem['input']!r} ({problem['msg']})",
            expected=f"some of {', '.join(JobSettings.model_fields)}",
            remedy="Correct the run's parameter ray_job",
        ) from None
