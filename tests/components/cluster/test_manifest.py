"""The RayJob that is submitted: valid for KubeRay's CRD and its further rules, and what settings say."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest

from components.cluster.api import pod_facts
from components.cluster.manifest import MAX_NAME, QUEUE_LABEL, JobPlan, PodFacts, build_ray_job, job_name
from components.cluster.settings import PRIORITY_CLASS_ENV, QUEUE_ENV, SPOT_TOLERATIONS, JobSettings, read_settings
from draftline.errors import SpecError
from draftline.steps import STATIONS
from tests.charts.schemas import problems

POD = PodFacts("registry/draftline:1", "Always", ("pull",), (
    {"name": "AWS_ACCESS_KEY_ID", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "accesskey", "optional": True}}},
))  # fmt: skip
EVERYTHING = {
    "cpu": "16", "memory": "64Gi", "gpu_type": "nvidia.com/gpu", "gpu_count": "2", "num_workers": 3.0,
    "queue": "team", "priority_class": "jobs", "service_account": "job", "spot": True, "start_deadline_s": 600,
    "node_selector": {"gpu": "h100"}, "tolerations": [{"key": "team", "operator": "Exists"}], "retries": 0,
}  # fmt: skip


def build(**given: Any) -> dict[str, Any]:
    command = ("python", "-m", "ray_jobs.train", "s3://b/a b/request.json", "s3://b/a b/result.json")
    plan = JobPlan("draftline-draft-0123456789abcdef", "ml", command, read_settings(given, {}), POD)
    return build_ray_job(plan)


@pytest.mark.parametrize("given", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_valid_for_the_crd(given: dict[str, Any]) -> None:
    assert problems(build(**given)) == []


def test_the_schema_sees_what_is_wrong() -> None:
    job = build()
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplica"] = 1
    assert len(problems(job)) == 1


def test_kuberay_s_further_rules() -> None:
    spec = build(**EVERYTHING)["spec"]
    assert spec["suspend"] and spec["shutdownAfterJobFinishes"]
    assert "clusterSelector" not in spec and spec["submissionMode"] == "K8sJobMode"
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    for station in STATIONS:
        name = job_name(station, "s3://bucket/prefix", "k" * 20)
        assert len(name) <= MAX_NAME and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name), name


def test_names_follow_workspace_and_key_alone() -> None:
    name = job_name("draft", "s3://a", "k")
    assert name == job_name("draft", "s3://a", "k")
    assert len({name, job_name("draft", "s3://b", "k"), job_name("draft", "s3://a", "l")}) == 3


def test_settings_reach_their_places() -> None:
    job = build(**EVERYTHING)
    spec = job["spec"]
    assert job["metadata"]["labels"][QUEUE_LABEL] == "team"
    assert spec["preRunningDeadlineSeconds"] == 600
    assert shlex.split(spec["entrypoint"])[-1] == "s3://b/a b/result.json"
    worker = spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    resources = worker["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "2"}
    assert worker["nodeSelector"] == {"gpu": "h100"}
    keys = [toleration["key"] for toleration in worker["tolerations"]]
    assert keys == ["nvidia.com/gpu", *(toleration["key"] for toleration in SPOT_TOLERATIONS), "team"]
    # A head on a node that goes takes the whole job with it.
    assert "tolerations" not in head and "nodeSelector" not in head
    for pod in (worker, head, spec["submitterPodTemplate"]["spec"]):
        assert pod["priorityClassName"] == "jobs" and pod["serviceAccountName"] == "job"
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
        assert pod["containers"][0]["image"] == "registry/draftline:1"
        assert POD.env_from[0] in pod["containers"][0]["env"]
        assert not pod["automountServiceAccountToken"] and pod["securityContext"]["runAsNonRoot"]


def test_without_kueue_or_deadline_nothing_is_said() -> None:
    job = build()
    assert "suspend" not in job["spec"] and "preRunningDeadlineSeconds" not in job["spec"]
    assert QUEUE_LABEL not in job["metadata"]["labels"]


def test_the_config_map_s_settings_yield_to_the_run_s() -> None:
    environ = {QUEUE_ENV: "of-the-chart", PRIORITY_CLASS_ENV: "jobs"}
    settings = read_settings({"queue": "mine", "priority_class": ""}, environ)
    assert (settings.queue, settings.priority_class) == ("mine", "jobs")


@pytest.mark.parametrize(
    ("given", "message"),
    [({"gpus": 1}, "gpus"), ({"num_workers": 0}, "num_workers"), ({"tolerations": [{"kee": ""}]}, "kee")],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_settings(given, {})


def test_only_references_are_taken_over_from_the_pod() -> None:
    reference = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
    own = {"name": "main", "image": "draftline:1", "imagePullPolicy": "Always", "env": [
        {"name": "SECRET", "value": "in the clear"}, reference,
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]}  # fmt: skip
    pod = {"spec": {"imagePullSecrets": [{"name": "pull"}], "containers": [{"name": "wait", "image": "argo"}, own]}}
    assert pod_facts(pod) == PodFacts("draftline:1", "Always", ("pull",), (reference,))


def test_defaults_are_complete() -> None:
    assert read_settings({}, {}) == JobSettings()
