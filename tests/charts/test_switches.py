"""Each template switched on, off and wrongly; what is wrong fails with a message that says what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.charts.conftest import EVERYTHING
from tests.charts.helm import CHART, CRD_APIS, Helm, Release
from tests.charts.schemas import problems


def merged(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of values with one dotted path set."""
    values = copy.deepcopy(base)
    *parents, leaf = path.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
    node[leaf] = value
    return values


def objects(release: Release) -> set[str]:
    return {f"{d['kind']}/{d['metadata']['name']}" for d in release.documents}


OFF = {
    "serving.enabled": {
        "RayService/draftline-serving",
        "ServiceAccount/draftline-serving",
        "Service/draftline-serving-workers",
        "Service/draftline-serving-head",
        "ServiceMonitor/draftline-serving-workers",
        "ServiceMonitor/draftline-serving-head",
        "NetworkPolicy/draftline-serving",
        "NetworkPolicy/draftline-serving-head",
        "PodDisruptionBudget/draftline-serving",
        "Ingress/draftline-serving",
        "HTTPRoute/draftline-serving",
        "Pod/draftline-test-serving",
    },
    "serving.ingress.enabled": {"Ingress/draftline-serving"},
    "serving.gateway.enabled": {"HTTPRoute/draftline-serving"},
    "serving.podDisruptionBudget.enabled": {"PodDisruptionBudget/draftline-serving"},
    "serving.serviceAccount.create": {"ServiceAccount/draftline-serving"},
    "mlflow.serviceAccount.create": {"ServiceAccount/draftline-mlflow"},
    "mlflow.ingress.enabled": {"Ingress/draftline-mlflow"},
    "minio.enabled": {
        "StatefulSet/draftline-minio",
        "Service/draftline-minio",
        "Service/draftline-minio-pods",
        "Secret/draftline-s3",
        "Job/draftline-provision",
        "ServiceMonitor/draftline-minio",
        "NetworkPolicy/draftline-minio",
    },
    "minio.createBucket": {"Job/draftline-provision"},
    "pipeline.enabled": {
        "ServiceAccount/draftline-pipeline",
        "ServiceAccount/draftline-job",
        "Role/draftline-pipeline",
        "RoleBinding/draftline-pipeline",
        "ConfigMap/draftline",
        "Pod/draftline-test-permissions",
    },
    "pipeline.serviceAccount.create": {"ServiceAccount/draftline-pipeline"},
    "kueue.createQueues": {
        "LocalQueue/draftline",
        "ClusterQueue/draftline-draftline-jobs",
        "ResourceFlavor/draftline-draftline-gpu",
    },
    "priorityClasses.create": {
        "PriorityClass/draftline-draftline-serving",
        "PriorityClass/draftline-draftline-jobs",
    },
    "networkPolicy.enabled": {
        f"NetworkPolicy/draftline-{name}" for name in ("serving", "serving-head", "mlflow", "minio", "postgresql")
    },
    "monitoring.serviceMonitor.enabled": {
        f"ServiceMonitor/draftline-{name}" for name in ("serving-workers", "serving-head", "minio")
    },
    "monitoring.rules.enabled": {"PrometheusRule/draftline"},
    "monitoring.dashboard.enabled": {"ConfigMap/draftline-dashboard"},
    "tests.enabled": {f"Pod/draftline-test-{name}" for name in ("storage", "mlflow", "serving", "permissions")},
}
"""A switch and exactly the objects that go with it."""


@pytest.mark.parametrize("switch", OFF)
def test_a_switch_takes_away_its_objects_and_no_others(helm: Helm, everything: Release, switch: str) -> None:
    without = helm.template(merged(EVERYTHING, switch, False))
    assert objects(everything) - objects(without) == OFF[switch]
    assert objects(without) <= objects(everything)
    assert [problem for document in without.documents for problem in problems(document)] == []


def test_mlflow_elsewhere(helm: Helm) -> None:
    values = {
        "mlflow": {"enabled": False, "externalUri": "https://mlflow.example.com", "client": {"existingSecret": "login"}}
    }
    release = helm.template(merged(values, "serving.draft.uri", "models:/d@champion"))
    assert not [name for name in objects(release) if "mlflow" in name and "test" not in name]
    assert release.one("ConfigMap")["data"]["mlflow-tracking-uri"] == "https://mlflow.example.com"
    environment = release.one("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    names = {variable["name"] for variable in environment["containers"][0]["env"]}
    assert {
        "MLFLOW_TRACKING_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
    } <= names


@pytest.mark.parametrize(
    ("database", "kinds"),
    [
        ({"type": "sqlite"}, {"PersistentVolumeClaim"}),
        ({"type": "bundled"}, {"StatefulSet", "Secret"}),
        ({"type": "external", "existingSecret": "db"}, set()),
    ],
)
def test_each_database_brings_its_own(helm: Helm, database: dict[str, str], kinds: set[str]) -> None:
    release = helm.template({"mlflow": {"database": database}})
    assert {d["kind"] for d in release.of_kind("PersistentVolumeClaim", "StatefulSet", "Secret")} == kinds
    deployment = release.one("Deployment")["spec"]
    # A file that two servers open is a broken file.
    assert deployment["strategy"]["type"] == ("Recreate" if database["type"] == "sqlite" else "RollingUpdate")
    (uri,) = [
        e for e in deployment["template"]["spec"]["containers"][0]["env"] if e["name"] == "MLFLOW_BACKEND_STORE_URI"
    ]
    assert ("valueFrom" in uri) == (database["type"] == "external")


def test_volumes_that_hold_something_outlive_the_release(helm: Helm) -> None:
    release = helm.template({"minio": {"enabled": True}, "mlflow": {"database": {"type": "bundled"}}})
    for secret in release.of_kind("Secret"):
        assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    claim = helm.template().one("PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


@pytest.mark.parametrize("cache", ["emptyDir", "ephemeral", "claim"])
def test_each_kind_of_cache(helm: Helm, cache: str) -> None:
    release = helm.template({"serving": {"cache": {"type": cache, "existingClaim": "weights"}}})
    cluster = release.one("RayService")["spec"]["rayClusterConfig"]
    volumes = {v["name"]: v for v in cluster["workerGroupSpecs"][0]["template"]["spec"]["volumes"]}
    kind = {"claim": "persistentVolumeClaim"}.get(cache, cache)
    assert kind in volumes["cache"]
    head = {v["name"]: v for v in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert "emptyDir" in head["cache"]


def test_one_registry_replaces_all(helm: Helm) -> None:
    values = merged(EVERYTHING, "global.imageRegistry", "registry.internal:5000")
    release = helm.template(values)
    images = {line.split("image:")[1].strip() for line in release.text.splitlines() if " image: " in line}
    assert len(images) == 5
    assert all(image.startswith("registry.internal:5000/") for image in images)


def test_a_digest_replaces_the_tag(helm: Helm) -> None:
    digest = "sha256:" + "a" * 64
    release = helm.template({"serving": {"image": {"digest": digest}}})
    head = release.one("RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert head["template"]["spec"]["containers"][0]["image"] == f"ghcr.io/draftline/draftline-serve@{digest}"


def test_the_cluster_may_choose_the_ids(helm: Helm) -> None:
    release = helm.template({"mlflow": {"security": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}}})
    security = release.one("Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert security == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("serving.enabledd", True, "additional properties 'enabledd' not allowed"),
        ("servng", {}, "additional properties 'servng' not allowed"),
        ("serving.spec.max_replica", 2, "additional properties 'max_replica' not allowed"),
        ("serving.target.sorce", "x", "additional properties 'sorce' not allowed"),
        ("serving.spec.policy", "always", "value must be one of"),
        ("serving.spec.max_requests", 0, "exclusiveMinimum"),
        ("serving.replica.gpus", "1", "got string, want integer"),
        ("serving.replica.cpus", 0, "minimum: got 0, want 1"),
        ("serving.worker.sparePods", 0, "minimum: got 0, want 1"),
        ("serving.draft.uri", "support-desk", "does not match pattern"),
        ("serving.security.runAsUser", 0, "minimum: got 0, want 1"),
        ("serving.upgradeStrategy", "Rolling", "value must be one of"),
        ("serving.worker.resources", {"limits": {"cpu": 1, "memory": "1Gi"}}, None),
        ("serving.worker.resources.limits.memory", "32 GB", "does not match pattern"),
        ("serving.worker.tolerations", [{"key": "a", "operators": "Exists"}], "additional properties 'operators'"),
        ("mlflow.replicas", 0, "minimum: got 0, want 1"),
        ("mlflow.database.type", "mysql", "value must be one of"),
        ("mlflow.image.digest", "sha256:12", "does not match pattern"),
        ("minio.persistence.size", "lots", "does not match pattern"),
        ("s3.bucket", "My_Bucket", "does not match pattern"),
        ("s3.endpoint", "minio:9000", "does not match pattern"),
        ("networkPolicy.clients", [{"podSelectors": {}}], "additional properties 'podSelectors'"),
        ("monitoring.rules.thresholds.volumeFree", 5, "maximum: got 5, want 1"),
        ("kueue.quota", {}, None),
        ("global.imagePullSecrets", ["registry"], "got string, want object"),
        ("pipeline.subjects", [{"namespace": "x"}], "missing property 'name'"),
    ],
)
def test_wrong_values_are_refused_by_the_schema(helm: Helm, path: str, value: Any, message: str | None) -> None:
    if message is None:
        # Helm merges maps into the defaults, so these only add.
        assert helm.try_template(merged({}, path, value)).returncode == 0
        return
    error = helm.error(merged({}, path, value))
    assert message in error
    assert "values don't meet the specifications of the schema" in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": {"tag": "latest"}}, "has the tag latest"),
        ({"minio": {"enabled": True}, "s3": {"endpoint": "https://s3.example.com"}}, "clear s3.endpoint, or set minio"),
        ({"mlflow": {"replicas": 2}}, "one file takes one server"),
        ({"mlflow": {"database": {"type": "external"}}}, "needs mlflow.database.existingSecret"),
        ({"mlflow": {"externalUri": "https://x"}}, "name two MLflow servers"),
        ({"mlflow": {"enabled": False}, "serving": {"draft": {"uri": "models:/d@champion"}}}, "there is no MLflow"),
        ({"serving": {"spec": {"min_replicas": 3}}}, "serving.spec.max_replicas=1 is below"),
        ({"serving": {"spec": {"policy": "fixed"}}}, "set serving.spec.policy to off, or name a draft"),
        ({"serving": {"spec": {"engine": "vllm"}, "replica": {"gpus": 2}}}, "tensor_parallel_size=1: make them equal"),
        (
            {"serving": {"spec": {"engine": "vllm", "policy": "async"}, "draft": {"uri": "models:/d@champion"}}},
            "set serving.cache.type=claim",
        ),
        (
            {"serving": {"spec": {"engine": "vllm"}, "apiKeys": {"existingSecret": "k"}}},
            "nobody asks for serving.apiKeys",
        ),
        ({"serving": {"cache": {"type": "claim"}}}, "needs serving.cache.existingClaim"),
        ({"serving": {"ingress": {"enabled": True}}}, "needs serving.ingress.host"),
        ({"mlflow": {"ingress": {"enabled": True}}}, "needs mlflow.ingress.host"),
        ({"serving": {"gateway": {"enabled": True}}}, "needs serving.gateway.parentRefs"),
        ({"kueue": {"createQueues": True}}, "needs kueue.enabled=true"),
        ({"fullnameOverride": "0draft"}, "set fullnameOverride"),
    ],
)
def test_contradictions_say_what_to_do(helm: Helm, values: dict[str, Any], message: str) -> None:
    assert message in helm.error(values)


@pytest.mark.parametrize(
    ("api", "values", "advice"),
    [
        ("ray.io/v1/RayService", {}, "install KubeRay v1.7 first, or switch serving.enabled off"),
        ("monitoring.coreos.com/v1/ServiceMonitor", EVERYTHING, "install the Prometheus operator first"),
        ("monitoring.coreos.com/v1/PrometheusRule", EVERYTHING, "monitoring.rules.enabled off"),
        ("gateway.networking.k8s.io/v1/HTTPRoute", EVERYTHING, "install the Gateway API's CRDs"),
        ("kueue.x-k8s.io/v1beta2/ClusterQueue", EVERYTHING, "install Kueue first"),
    ],
)
def test_a_missing_prerequisite_is_named(helm: Helm, api: str, values: dict[str, Any], advice: str) -> None:
    error = helm.error(values, apis=[other for other in CRD_APIS if other != api])
    assert f"needs {api}" in error and advice in error
    unchecked = merged(values, "global.checkPrerequisites", False)
    assert helm.try_template(unchecked, apis=()).returncode == 0


def test_an_old_cluster_is_refused(helm: Helm) -> None:
    done = helm.run("template", "d", str(CHART), "--kube-version", "1.28.0")
    assert done.returncode != 0 and "requires kubeVersion: >=1.29.0" in done.stderr


def notes(helm: Helm, values: dict[str, Any]) -> str:
    """What an installation prints; a client-side dry run asks no cluster."""
    file = helm.home / "notes.yaml"
    file.write_text(yaml.safe_dump(merged(values, "global.checkPrerequisites", False)), encoding="utf-8")
    done = helm.run("install", "desk", str(CHART), "--namespace", "ml", "--dry-run=client", "--values", str(file))
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:\n")[2].rstrip()


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["default", "everything"])
def test_the_notes_end_with_the_command_that_proves_it(helm: Helm, values: dict[str, Any]) -> None:
    lines = notes(helm, values).splitlines()
    assert lines[-1].strip() == "helm test desk --namespace ml --logs"
    assert not [line for line in lines if "no value" in line or "%!" in line]
    named = "\n".join(lines)
    assert "http://desk-draftline-serving-serve-svc.ml.svc.cluster.local:8000/v1" in named
    assert "rayservice/desk-draftline-serving" in named and "config_map=desk-draftline" in named
    assert ("Draft: none yet" in named) == (values == {})
