"""Each example renders to the manifests in git, and every object of them is valid to the last field."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.charts.helm import CHART, Helm, Release
from tests.charts.schemas import NEWEST, OLDEST, problems

EXAMPLES = sorted(path.name for path in (CHART / "examples").iterdir())

_GENERATED = re.compile(r"(draftline\.io/generated: .*?\ndata:\n)((?:  \S+: \S+\n)+)", re.DOTALL)


def rendered_files(release: Release) -> dict[str, str]:
    """Manifests by the template that wrote them; secrets that are made at random are masked."""
    files: dict[str, str] = {}
    for part in re.split(r"^---\n", release.text, flags=re.MULTILINE):
        source = re.match(r"# Source: draftline/templates/(\S+)\n", part)
        if source:
            masked = _GENERATED.sub(lambda m: m[1] + re.sub(r": \S+\n", ": R0VORVJBVEVE\n", m[2]), part)
            files[source[1]] = files.get(source[1], "") + "---\n" + masked.rstrip("\n") + "\n"
    return files


def test_the_four_cases_are_there() -> None:
    assert EXAMPLES == ["airgapped", "external-s3-rds", "gpu-8xh100", "minimal"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_renders_to_what_is_in_git(
    helm: Helm, example: str, check_golden: Callable[[str, Path], None], pytestconfig: pytest.Config
) -> None:
    folder = CHART / "examples" / example
    now = rendered_files(helm.template(folder / "values.yaml"))
    for name, text in now.items():
        check_golden(text, folder / "rendered" / name)
    kept = {path.relative_to(folder / "rendered").as_posix() for path in (folder / "rendered").rglob("*.yaml")}
    if pytestconfig.getoption("--update-golden"):
        for name in kept - set(now):
            (folder / "rendered" / name).unlink()
    else:
        assert kept == set(now)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_object_of_an_example_is_valid(helm: Helm, example: str) -> None:
    release = helm.template(CHART / "examples" / example / "values.yaml")
    for version in (OLDEST, NEWEST):
        assert [problem for document in release.documents for problem in problems(document, version)] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_passes_lint(helm: Helm, example: str) -> None:
    done = helm.run("lint", "--strict", str(CHART), "--values", str(CHART / "examples" / example / "values.yaml"))
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout and "[ERROR]" not in done.stdout


def test_everything_switched_on_is_valid(everything: Release) -> None:
    for version in (OLDEST, NEWEST):
        assert [problem for document in everything.documents for problem in problems(document, version)] == []
    kinds = {document["kind"] for document in everything.documents}
    assert kinds == {
        "ClusterQueue",
        "ConfigMap",
        "Deployment",
        "HTTPRoute",
        "Ingress",
        "Job",
        "LocalQueue",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "PriorityClass",
        "PrometheusRule",
        "RayService",
        "ResourceFlavor",
        "Role",
        "RoleBinding",
        "Secret",
        "Service",
        "ServiceAccount",
        "ServiceMonitor",
        "StatefulSet",
    }


def test_the_default_values_are_valid(helm: Helm) -> None:
    assert [problem for document in helm.template().documents for problem in problems(document)] == []


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("Deployment", lambda d: d["spec"]["template"]["spec"]["containers"][0].update(resorces={})),
        ("Deployment", lambda d: d["spec"].update(replicas="two")),
        ("NetworkPolicy", lambda d: d["spec"].update(policyType=[])),
        ("RayService", lambda d: d["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].update(minReplica=1)),
        (
            "RayService",
            lambda d: d["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(
                imagge="x"
            ),
        ),
        ("ServiceMonitor", lambda d: d["spec"]["endpoints"][0].update(portt="x")),
        ("PrometheusRule", lambda d: d["spec"]["groups"][0]["rules"][0].update(expression="x")),
        ("HTTPRoute", lambda d: d["spec"]["rules"][0].update(backends=[])),
        ("ClusterQueue", lambda d: d["spec"].update(cohort="x")),
    ],
)
def test_the_check_finds_a_misspelt_field(everything: Release, kind: str, change: Callable[[Any], None]) -> None:
    import copy

    document = copy.deepcopy(everything.of_kind(kind)[0])
    assert problems(document) == []
    change(document)
    assert problems(document) != []
