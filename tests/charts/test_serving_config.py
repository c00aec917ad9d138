"""What the RayService hands to Serve is what Serve and our builder take, and KubeRay's own rules hold."""

from __future__ import annotations

import math
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.kubernetes import read_arguments
from tests.charts.helm import CHART, Helm, Release

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def serve_config(release: Release) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(release.one("RayService")["spec"]["serveConfigV2"])
    return document


EXAMPLES = [path.name for path in sorted((CHART / "examples").iterdir())]


@pytest.fixture(params=["everything", *EXAMPLES])
def release(request: pytest.FixtureRequest, helm: Helm, everything: Release) -> Release:
    if request.param == "everything":
        return everything
    return helm.template(CHART / "examples" / request.param / "values.yaml")


# Ray Serve 2.60 uses pydantic's old keyword arguments; it says so once a process.
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_serve_and_the_builder_take_the_config(release: Release) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(serve_config(release))
    (application,) = config.applications
    assert application.import_path == "serving.kubernetes:build"
    read = read_arguments(application.args)
    values = serve_config(release)["applications"][0]["args"]
    assert read.spec.target.source == values["target"]["source"]
    assert read.spec.serving.model_name == values["serving"]["model_name"]
    assert read.cache_dir == Path("/var/cache/draftline/draftline")


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_the_declared_deployment_is_the_one_that_is_built(everything: Release) -> None:
    from serving.app import DEPLOYMENT

    (deployment,) = serve_config(everything)["applications"][0]["deployments"]
    assert deployment["name"] == DEPLOYMENT
    # Bounds come from the spec's serving part, in one place.
    assert set(deployment) == {"name", "ray_actor_options"}


def test_ray_can_place_every_replica_that_serve_may_ask_for(release: Release) -> None:
    cluster = release.one("RayService")["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    options = serve_config(release)["applications"][0]["deployments"][0]["ray_actor_options"]
    per_pod = int(group["rayStartParams"]["num-cpus"]) // options["num_cpus"]
    spec = read_arguments(serve_config(release)["applications"][0]["args"]).spec.serving
    assert group["minReplicas"] == group["replicas"] == math.ceil(spec.min_replicas / per_pod)
    # Above the demand, so that a replica that moves finds a place.
    assert group["maxReplicas"] > math.ceil(spec.max_replicas / per_pod)
    gpus = options.get("num_gpus", 0) * per_pod
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert int(group["rayStartParams"]["num-gpus"]) == gpus
    for bound in ("requests", "limits"):
        assert resources[bound].get("nvidia.com/gpu", 0) == gpus
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_kuberay_s_rules_that_no_schema_holds(release: Release) -> None:
    service = release.one("RayService")
    name, spec = service["metadata"]["name"], service["spec"]
    assert len(name) <= 47 and DNS_1035.fullmatch(name)
    assert spec["upgradeStrategy"]["type"] in ("NewCluster", "None")
    assert spec["rayClusterDeletionDelaySeconds"] >= 0
    cluster = spec["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True and "suspend" not in cluster
    assert "enableK8sTokenAuth" not in cluster["authOptions"]
    assert "headService" not in cluster["headGroupSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert not {"labels", "resources"} & set(group["rayStartParams"])
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        # KubeRay makes the service for clients from the head's port of this name.
        assert ports["serve"] == serve_config(release)["http_options"]["port"] == 8000
    for group in cluster["workerGroupSpecs"]:
        assert {"minReplicas", "maxReplicas", "groupName"} <= set(group)


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")
def test_vllm_names_its_own_deployments_and_shares_the_draft(helm: Helm) -> None:
    from ray.serve.schema import ServeDeploySchema

    spec = {"engine": "vllm", "policy": "async", "vllm": {"tensor_parallel_size": 2}}
    release = helm.template(
        {
            "serving": {
                "spec": spec,
                "replica": {"gpus": 2},
                "draft": {"uri": "models:/d@champion"},
                "cache": {"type": "claim", "existingClaim": "shared"},
                "models": {"existingClaim": "models"},
            }
        }
    )
    (application,) = ServeDeploySchema.model_validate(serve_config(release)).applications
    assert application.deployments == []
    assert read_arguments(application.args).spec.serving.vllm.tensor_parallel_size == 2
    cluster = release.one("RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (cache,) = [volume for volume in pod["volumes"] if volume["name"] == "cache"]
        assert cache["persistentVolumeClaim"]["claimName"] == "shared"
        assert "MLFLOW_TRACKING_URI" in {variable["name"] for variable in pod["containers"][0]["env"]}
        # The head puts the application together, and looks at the target's files for it.
        assert "models" in {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert "models" in {volume["name"] for volume in pod["volumes"]}


def test_prompt_lookup_needs_no_draft(helm: Helm) -> None:
    release = helm.template({"serving": {"spec": {"policy": "fixed", "proposer": "prompt_lookup"}}})
    assert "draft_uri" not in serve_config(release)["applications"][0]["args"]


def test_ray_s_object_store_fits_into_its_memory(release: Release) -> None:
    cluster = release.one("RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (shm,) = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["medium"] == "Memory" and shm["sizeLimit"].endswith("Gi")
        # Where it does not, Ray puts it on a disk without a word to the caller.
        assert int(group["rayStartParams"]["object-store-memory"]) < int(shm["sizeLimit"][:-2]) * 1024**3


def test_ray_s_version_is_the_one_that_is_tested(everything: Release) -> None:
    assert everything.one("RayService")["spec"]["rayClusterConfig"]["rayVersion"] == version("ray")


def test_a_new_chart_version_does_not_rebuild_the_cluster(everything: Release) -> None:
    cluster = yaml.safe_dump(everything.one("RayService")["spec"]["rayClusterConfig"])
    assert "helm.sh/chart" not in cluster and "app.kubernetes.io/version" not in cluster


def test_a_new_number_of_replicas_keeps_the_pods(helm: Helm) -> None:
    one, two = (
        helm.template({"serving": {"spec": {"max_replicas": most}}}).one("RayService")["spec"] for most in (1, 4)
    )
    assert one["serveConfigV2"] != two["serveConfigV2"]
    groups = [spec["rayClusterConfig"]["workerGroupSpecs"][0] for spec in (one, two)]
    # KubeRay ignores these numbers when it asks whether the cluster is another.
    assert [group.pop("maxReplicas") for group in groups] == [2, 5]
    assert one["rayClusterConfig"] == two["rayClusterConfig"]


def test_secrets_stay_out_of_the_config(everything: Release) -> None:
    text = everything.one("RayService")["spec"]["serveConfigV2"]
    assert "/etc/draftline/api-keys/api-keys" in text
    mounts = everything.one("RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    (volume,) = [volume for volume in mounts["volumes"] if volume["name"] == "api-keys"]
    assert volume["secret"] == {"secretName": "clients", "items": [{"key": "api-keys", "path": "api-keys"}]}
