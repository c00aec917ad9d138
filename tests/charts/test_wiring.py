"""Objects find each other: services their pods, monitors their services, rules their metrics, routes their backends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from serving.metric_table import all_rows
from tests.charts.conftest import EVERYTHING
from tests.charts.helm import CHART, ROOT, Document, Helm, Release
from tests.charts.pods import matches, pods

COMPILED = ROOT / "tests" / "pipelines" / "golden" / "train_draft.yaml"
CLUSTER_SCOPED = {"PriorityClass", "ClusterQueue", "ResourceFlavor"}
LONG_NAME = "a-release-name-that-is-exactly-fifty-three-letters-lo"

PROMQL_WORD = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
FROM_KUBERNETES = {
    "up",
    "kube_deployment_status_replicas_available",
    "kube_statefulset_status_replicas_ready",
    "kube_pod_container_status_restarts_total",
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
}
"""Metrics of Prometheus itself, kube-state-metrics and the kubelet."""


def served_metrics() -> set[str]:
    """Names of all samples that a replica exposes."""
    return {name for row in all_rows() for name in row.series}


def metric_names(promql: str) -> set[str]:
    """Metrics that an expression reads: words before a selector, and words with a colon."""
    bare = re.sub(r'"[^"]*"', '""', promql)
    names = set(re.findall(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*\{", bare))
    return names | {word for word in PROMQL_WORD.findall(re.sub(r"\{[^}]*\}", "", bare)) if ":" in word}


def service_selectors(release: Release) -> dict[str, dict[str, str]]:
    return {d["metadata"]["name"]: d["spec"]["selector"] for d in release.of_kind("Service")}


def test_every_service_selects_one_kind_of_pod_and_an_open_port(everything: Release) -> None:
    for service in everything.of_kind("Service"):
        chosen = [pod for pod in pods(everything) if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
        assert len(chosen) == 1, service["metadata"]["name"]
        ports = {port["name"] for container in chosen[0].containers for port in container["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_workloads_select_their_own_pods_and_no_others(everything: Release) -> None:
    for workload in everything.of_kind("Deployment", "StatefulSet"):
        chosen = [pod.owner for pod in pods(everything) if matches(workload["spec"]["selector"], pod.labels)]
        assert chosen == [f"{workload['kind']} {workload['metadata']['name']}"]


def test_budgets_select_pods(everything: Release) -> None:
    budgets = everything.of_kind("PodDisruptionBudget")
    assert len(budgets) == 2
    for budget in budgets:
        assert [pod for pod in pods(everything) if matches(budget["spec"]["selector"], pod.labels)]


def test_network_policies_cover_every_lasting_pod(everything: Release) -> None:
    policies = everything.of_kind("NetworkPolicy")
    for policy in policies:
        assert [pod for pod in pods(everything) if matches(policy["spec"]["podSelector"], pod.labels)]
    for pod in pods(everything):
        if pod.is_service:
            covering = [p for p in policies if matches(p["spec"]["podSelector"], pod.labels)]
            assert {kind for p in covering for kind in p["spec"]["policyTypes"]} == {"Ingress", "Egress"}, pod.owner


def allowed(release: Release, source: dict[str, str], destination: dict[str, str], port: int) -> bool:
    """Whether the policies let one pod of the release reach another: egress of the one, ingress of the other."""

    def permits(policy: Document, direction: str, peer_key: str, peer: dict[str, str]) -> bool:
        for rule in policy["spec"].get(direction, []):
            if "ports" in rule and not any(item["port"] == port for item in rule["ports"]):
                continue
            peers = rule.get(peer_key)
            if peers is None or any(
                "podSelector" in p and "namespaceSelector" not in p and matches(p["podSelector"], peer) for p in peers
            ):
                return True
        return False

    policies = release.of_kind("NetworkPolicy")
    out = [p for p in policies if "Egress" in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], source)]
    into = [
        p for p in policies if "Ingress" in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], destination)
    ]
    return (not out or any(permits(p, "egress", "to", destination) for p in out)) and (
        not into or any(permits(p, "ingress", "from", source) for p in into)
    )


STEP = {"pipeline/runid": "r"}
JOB = {"ray.io/is-ray-node": "yes"}
STRANGER = {"app": "stranger"}


@pytest.mark.parametrize(
    ("source", "destination", "port", "is_allowed"),
    [
        ("serving-worker", "mlflow", 5000, True),
        ("serving-worker", "minio", 9000, True),
        ("serving-worker", "serving-head", 6379, True),
        ("serving-head", "serving-worker", 10002, True),
        ("serving-worker", "postgresql", 5432, False),
        ("mlflow", "postgresql", 5432, True),
        ("mlflow", "minio", 9000, True),
        ("mlflow", "serving-head", 8265, False),
        ("tools", "minio", 9000, True),
        ("tools", "mlflow", 5000, True),
        ("tools", "serving-worker", 8000, True),
        ("tools", "serving-head", 8265, False),
        (STEP, "mlflow", 5000, True),
        (STEP, "minio", 9000, True),
        (STEP, "postgresql", 5432, False),
        (JOB, "mlflow", 5000, True),
        (JOB, "minio", 9000, True),
        (JOB, "serving-head", 6379, False),
        (STRANGER, "serving-worker", 8000, True),
        (STRANGER, "serving-head", 8265, False),
        (STRANGER, "mlflow", 5000, False),
        (STRANGER, "minio", 9000, False),
        (STRANGER, "postgresql", 5432, False),
    ],
)
def test_who_may_reach_whom(
    everything: Release, source: str | dict[str, str], destination: str, port: int, is_allowed: bool
) -> None:
    def labels(of: str | dict[str, str]) -> dict[str, str]:
        if isinstance(of, dict):
            return of
        return next(pod.labels for pod in pods(everything) if pod.labels["app.kubernetes.io/component"] == of)

    assert allowed(everything, labels(source), labels(destination), port) is is_allowed


def test_monitors_scrape_ports_of_services_that_exist(everything: Release) -> None:
    monitors = everything.of_kind("ServiceMonitor")
    assert len(monitors) == 3
    for monitor in monitors:
        for endpoint in monitor["spec"]["endpoints"]:
            chosen = [
                service["metadata"]["name"]
                for service in everything.of_kind("Service")
                if matches(monitor["spec"]["selector"], service["metadata"]["labels"])
                and endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
            ]
            # The rules go by the label job, which is the service's name.
            assert chosen == [monitor["metadata"]["name"]]
        assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_rules_read_metrics_that_exist(everything: Release) -> None:
    known = served_metrics() | FROM_KUBERNETES
    rules = [rule for group in everything.one("PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    assert len(rules) >= 10
    for rule in rules:
        names = metric_names(rule["expr"])
        assert names and names <= known, rule["alert"]
        assert f'namespace="{everything.namespace}"' in rule["expr"]
        assert set(rule["annotations"]) == {"summary", "description"} and rule["labels"]["severity"] in (
            "warning",
            "critical",
        )
        job = re.search(r'job="([^"]+)"', rule["expr"])
        assert job is None or job[1] in service_selectors(everything)
        for kind in ("deployment", "statefulset"):
            named = re.search(rf'{kind}="([^"]+)"', rule["expr"])
            assert named is None or [
                d for d in everything.of_kind(kind.capitalize(), "StatefulSet") if d["metadata"]["name"] == named[1]
            ]


def expressions(node: Any) -> Iterator[str]:
    """Every query of a Grafana dashboard, of panels and of variables."""
    if isinstance(node, list):
        for item in node:
            yield from expressions(item)
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("expr", "query") and isinstance(value, str) and value != "prometheus":
                yield value
            else:
                yield from expressions(value)


def test_a_metric_that_does_not_exist_is_found() -> None:
    assert metric_names('rate(vllm:nothing_total{a="b"}[5m]) / on (x) sum(draftline:other)') == {
        "vllm:nothing_total",
        "draftline:other",
    }
    assert not metric_names('up{job="x"}') - FROM_KUBERNETES


def test_the_dashboard_reads_metrics_that_exist(everything: Release) -> None:
    (text,) = everything.one("ConfigMap", "-dashboard")["data"].values()
    board = json.loads(text)
    assert board["title"] and board["uid"]
    for expression in expressions(board):
        unknown = metric_names(expression) - served_metrics() - FROM_KUBERNETES
        assert not [name for name in unknown if not name.startswith("ray_")], expression
    assert text.strip() == (CHART / "dashboards" / "draftline.json").read_text(encoding="utf-8").strip()


def test_routes_lead_to_the_service_that_kuberay_makes(everything: Release) -> None:
    service = f"{everything.one('RayService')['metadata']['name']}-serve-svc"
    ingress = everything.one("Ingress", "-serving")["spec"]["rules"][0]["http"]["paths"]
    assert [(path["path"], path["backend"]["service"]["name"]) for path in ingress] == [("/v1", service)]
    (rule,) = everything.one("HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": service, "port": 8000}]
    assert [match["path"]["value"] for match in rule["matches"]] == ["/v1"]
    mlflow = everything.one("Ingress", "-mlflow")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["name"]
    assert mlflow in service_selectors(everything)


def test_mlflow_accepts_the_names_it_is_called_by(everything: Release) -> None:
    container = everything.one("Deployment")["spec"]["template"]["spec"]["containers"][0]
    (hosts,) = [argument for argument in container["args"] if argument.startswith("--allowed-hosts=")]
    uri = everything.one("ConfigMap", "draftline")["data"]["mlflow-tracking-uri"]
    assert uri.removeprefix("http://") in hosts.removeprefix("--allowed-hosts=").split(",")
    assert "mlflow.example.com" in hosts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred:UserWarning")
def test_mlflow_s_arguments_are_options_of_the_pinned_server(everything: Release) -> None:
    from mlflow.cli import server

    known = {name for parameter in server.params for name in (*parameter.opts, *parameter.secondary_opts)}
    container = everything.one("Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["mlflow", "server"]
    assert {argument.partition("=")[0] for argument in container["args"]} <= known


def test_the_tools_commands_are_real(everything: Release) -> None:
    import typer

    from pipelines.cluster_checks import app

    group: Any = typer.main.get_command(app)
    containers = [pod.containers[0] for pod in pods(everything) if not pod.is_service]
    assert len(containers) == 5
    for container in containers:
        assert container["command"] == ["python", "-m", "pipelines.cluster_checks"]
        with group.make_context("checks", list(container["args"])) as context:
            name, command, rest = group.resolve_command(context, list(container["args"]))
            with command.make_context(name, rest, parent=context):
                pass


def test_the_pipeline_finds_its_config_map_and_secrets(helm: Helm) -> None:
    release = helm.template({"minio": {"enabled": True}})
    compiled, platform = yaml.load_all(COMPILED.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    defaults = {
        name: given.get("defaultValue") for name, given in compiled["root"]["inputDefinitions"]["parameters"].items()
    }
    read: dict[str, set[str]] = {"configMapKey": set(), "secretKey": set()}
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        for source in executor.get("configMapAsEnv", []):
            read["configMapKey"] |= {pair["configMapKey"] for pair in source["keyToEnv"]}
        for source in executor.get("secretAsEnv", []):
            read["secretKey"] |= {pair["secretKey"] for pair in source["keyToEnv"]}
    config = set(release.one("ConfigMap", defaults["config_map"])["data"])
    assert {"mlflow-tracking-uri", "s3-endpoint-url", "s3-region"} <= config & read["configMapKey"]
    assert {"accesskey", "secretkey"} == set(release.one("Secret", defaults["s3_secret"])["data"]) & read["secretKey"]


def test_the_pipeline_s_role_is_what_the_check_asks_for(everything: Release) -> None:
    from pipelines.cluster_checks import RAYJOB_RIGHTS

    rules = everything.one("Role")["rules"]
    for group, resource, verb in RAYJOB_RIGHTS:
        assert any(group in r["apiGroups"] and resource in r["resources"] and verb in r["verbs"] for r in rules)
    assert not [rule for rule in rules if "*" in rule["verbs"] + rule["resources"] + rule["apiGroups"]]
    assert not [rule for rule in rules if "secrets" in rule["resources"]]
    (binding,) = everything.of_kind("RoleBinding")
    assert binding["roleRef"]["name"] == everything.one("Role")["metadata"]["name"]
    assert [(s["name"], s["namespace"]) for s in binding["subjects"]] == [
        ("draftline-pipeline", "draftline"),
        ("default-editor", "draftline"),
        ("pipeline-runner", "kubeflow"),
    ]


def test_jobs_are_told_their_class_and_account(everything: Release) -> None:
    data = everything.one("ConfigMap", "draftline")["data"]
    assert data["job-priority-class"] in {d["metadata"]["name"] for d in everything.of_kind("PriorityClass")}
    assert data["job-service-account"] in {d["metadata"]["name"] for d in everything.of_kind("ServiceAccount")}


def test_kueue_s_queues_refer_to_each_other(everything: Release) -> None:
    queue = everything.one("LocalQueue")
    assert queue["spec"]["clusterQueue"] == everything.one("ClusterQueue")["metadata"]["name"]
    (group,) = everything.one("ClusterQueue")["spec"]["resourceGroups"]
    assert [flavor["name"] for flavor in group["flavors"]] == [everything.one("ResourceFlavor")["metadata"]["name"]]
    assert [resource["name"] for resource in group["flavors"][0]["resources"]] == group["coveredResources"]
    assert everything.one("ConfigMap", "draftline")["data"]["kueue-queue"] == queue["metadata"]["name"]


def names(release: Release) -> list[tuple[str, str, str]]:
    return [(d["apiVersion"], d["kind"], d["metadata"]["name"]) for d in release.documents]


def test_no_two_objects_have_one_name(everything: Release) -> None:
    assert len(set(names(everything))) == len(names(everything))


def test_two_releases_do_not_meet(helm: Helm, everything: Release) -> None:
    other = helm.template(EVERYTHING, name="second")
    assert not set(names(everything)) & set(names(other))
    for service in everything.of_kind("Service"):
        assert not [pod for pod in pods(other) if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)]
    elsewhere = helm.template(EVERYTHING, namespace="other")
    shared = {name for name in set(names(everything)) & set(names(elsewhere)) if name[1] in CLUSTER_SCOPED}
    assert shared == set()


@pytest.mark.parametrize("name", [LONG_NAME, LONG_NAME[:-1] + "x", "d"])
def test_names_fit_whatever_the_release_is_called(helm: Helm, name: str) -> None:
    release = helm.template(EVERYTHING, name=name, namespace="n" * 63)
    for document in release.documents:
        assert len(document["metadata"]["name"]) <= 63
        for value in document["metadata"]["labels"].values():
            assert len(value) <= 63
        assert ("namespace" not in document["metadata"]) == (document["kind"] in CLUSTER_SCOPED)
    # Ray's head service adds to the names that KubeRay makes of it.
    assert len(release.one("RayService")["metadata"]["name"]) <= 47
    assert len(set(names(release))) == len(names(release))


def test_long_names_that_differ_at_the_end_stay_different(helm: Helm) -> None:
    one, other = (helm.template(EVERYTHING, name=name) for name in (LONG_NAME, LONG_NAME[:-1] + "x"))
    assert not set(names(one)) & set(names(other))


def test_every_object_says_whose_it_is(everything: Release) -> None:
    for document in everything.documents:
        labels = document["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == "draftline" and labels["team"] == "inference"
        assert document["metadata"]["annotations"]["contact"] == "inference@example.com"


def test_nothing_speaks_of_a_value_that_is_missing(everything: Release) -> None:
    assert "<no value>" not in everything.text and "%!" not in everything.text
    assert not [line for line in everything.text.splitlines() if line != line.rstrip()]
    assert yaml.safe_load(everything.one("RayService")["spec"]["serveConfigV2"])
