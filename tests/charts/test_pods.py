"""No pod has more than it needs, and each finds what it names."""

from __future__ import annotations

import pytest

from tests.charts.conftest import EXTERNAL_CLAIMS, EXTERNAL_SECRETS
from tests.charts.helm import Helm, Release
from tests.charts.pods import PodOf, pods, references

TOKENS = {"RayService draftline-serving head", "Pod draftline-test-permissions"}
"""Who talks to Kubernetes: the autoscaler beside Ray's head, and the check of the pipeline's rights."""


@pytest.fixture(scope="module")
def all_pods(everything: Release, helm: Helm) -> list[PodOf]:
    sqlite = helm.template({"minio": {"enabled": True}})
    return [*pods(everything), *pods(sqlite)]


def test_every_pod_is_found(everything: Release) -> None:
    assert {pod.owner for pod in pods(everything)} == {
        "Deployment draftline-mlflow",
        "Job draftline-provision",
        "Pod draftline-test-mlflow",
        "Pod draftline-test-permissions",
        "Pod draftline-test-serving",
        "Pod draftline-test-storage",
        "RayService draftline-serving engine",
        "RayService draftline-serving head",
        "StatefulSet draftline-minio",
        "StatefulSet draftline-postgresql",
    }


def test_pods_meet_the_restricted_standard(all_pods: list[PodOf]) -> None:
    for pod in all_pods:
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, pod.owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        for container in pod.containers:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, pod.owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.owner
        assert not [volume for volume in pod.spec["volumes"] if "hostPath" in volume], pod.owner


def test_the_autoscaler_is_held_to_the_same(everything: Release) -> None:
    options = everything.one("RayService")["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert options["securityContext"]["readOnlyRootFilesystem"] is True
    assert options["resources"]["limits"]["memory"] == "1Gi"
    assert [mount["mountPath"] for mount in options["volumeMounts"]] == ["/tmp"]


def test_every_container_has_requests_limits_and_probes(all_pods: list[PodOf]) -> None:
    for pod in all_pods:
        for container in pod.containers:
            for bound in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][bound]), pod.owner
            assert ("livenessProbe" in container and "readinessProbe" in container) == pod.is_service, pod.owner


def test_images_are_pinned(all_pods: list[PodOf]) -> None:
    for pod in all_pods:
        for container in pod.containers:
            image, _, tag = container["image"].rpartition(":")
            assert image and tag and "/" not in tag and tag != "latest", container["image"]


def test_only_who_asks_kubernetes_has_a_token(all_pods: list[PodOf]) -> None:
    assert {pod.owner for pod in all_pods if pod.spec["automountServiceAccountToken"]} == TOKENS


def test_the_head_has_a_token_and_the_workers_the_secrets(everything: Release) -> None:
    head, worker = ({*references(pod.spec)} for pod in pods(everything) if pod.owner.startswith("RayService"))
    assert head == {("Secret", "registry")}
    assert {("Secret", "clients"), ("Secret", "hub"), ("Secret", "mlflow-login"), ("Secret", "draftline-s3")} <= worker


def test_each_check_gets_what_it_asks_with(everything: Release) -> None:
    secrets = {
        pod.owner.rpartition("-")[2]: {name for _, name in references(pod.spec)} - {"registry"}
        for pod in pods(everything)
        if not pod.is_service
    }
    assert secrets == {
        "provision": {"draftline-s3"},
        "storage": {"draftline-s3"},
        "mlflow": {"mlflow-login"},
        "serving": {"clients"},
        "permissions": set(),
    }


def test_no_service_s_address_slips_into_an_environment(all_pods: list[PodOf]) -> None:
    # Kubernetes would set MLFLOW_... and RAY_... variables for services whose names begin so.
    assert [pod.owner for pod in all_pods if pod.spec["enableServiceLinks"]] == []


def test_every_mount_has_a_volume_and_every_volume_a_mount(all_pods: list[PodOf], everything: Release) -> None:
    templates = {
        f"StatefulSet {d['metadata']['name']}": [
            claim["metadata"]["name"] for claim in d["spec"]["volumeClaimTemplates"]
        ]
        for d in everything.of_kind("StatefulSet")
    }
    for pod in all_pods:
        volumes = [volume["name"] for volume in pod.spec["volumes"]] + templates.get(pod.owner, [])
        mounts = [mount["name"] for container in pod.containers for mount in container["volumeMounts"]]
        assert sorted(volumes) == sorted(mounts), pod.owner
        paths = [mount["mountPath"] for container in pod.containers for mount in container["volumeMounts"]]
        assert len(set(paths)) == len(paths)
        assert "/tmp" in paths, pod.owner


def test_environment_names_are_unique(all_pods: list[PodOf]) -> None:
    for pod in all_pods:
        for container in pod.containers:
            names = [variable["name"] for variable in container["env"]]
            assert len(set(names)) == len(names), (pod.owner, sorted(names))


def test_what_pods_name_exists_or_is_yours(everything: Release) -> None:
    made = {(d["kind"], d["metadata"]["name"]) for d in everything.documents}
    yours = {("Secret", name) for name in EXTERNAL_SECRETS} | {
        ("PersistentVolumeClaim", name) for name in EXTERNAL_CLAIMS
    }
    named = {reference for pod in pods(everything) for reference in references(pod.spec)}
    assert named <= made | yours
    accounts = {("ServiceAccount", pod.spec["serviceAccountName"]) for pod in pods(everything)}
    assert accounts <= made
    classes = {
        ("PriorityClass", pod.spec["priorityClassName"]) for pod in pods(everything) if "priorityClassName" in pod.spec
    }
    assert classes == {("PriorityClass", "draftline-draftline-serving")}


def test_a_missing_secret_would_be_found(helm: Helm) -> None:
    release = helm.template({"s3": {"existingSecret": "keys-of-mine"}})
    named = {reference for pod in pods(release) for reference in references(pod.spec)}
    assert ("Secret", "keys-of-mine") in named
    assert not release.of_kind("Secret")


def test_no_secret_is_written_down(everything: Release) -> None:
    for pod in pods(everything):
        for container in pod.containers:
            for variable in container["env"]:
                is_secret = any(word in variable["name"] for word in ("SECRET", "PASSWORD", "TOKEN", "KEY"))
                assert not (is_secret and "value" in variable), variable["name"]


def test_the_keys_of_secrets_are_those_that_are_read(everything: Release) -> None:
    made = {d["metadata"]["name"]: set(d["data"]) for d in everything.of_kind("Secret")}
    assert made == {"draftline-s3": {"accesskey", "secretkey"}, "draftline-postgresql": {"password"}}
    for pod in pods(everything):
        for container in pod.containers:
            for variable in container["env"]:
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference and reference["name"] in made:
                    assert reference["key"] in made[reference["name"]]
