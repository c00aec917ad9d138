"""The image ``serve`` has every package that a replica's modules import, and takes none from outside the lock."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib

import grimp
import pytest

from tests.images.dockerfile import ROOT

_NAME = re.compile(r"^[A-Za-z0-9._-]+")


def normal(requirement: str) -> str:
    """A distribution's name as packaging tools compare them."""
    found = _NAME.match(requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def group(project: dict[str, object]) -> set[str]:
    return {normal(line) for line in project["dependency-groups"]["serve"]}  # type: ignore[index]


def test_what_replicas_import_is_in_the_group(group: set[str]) -> None:
    graph = grimp.build_graph(
        "draftline", "serving", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    # vLLM brings an image of its own.
    served = [m for m in graph.modules if m.startswith("serving") and not m.startswith("serving.vllm")]
    imported = {name for module in served for name in graph.find_upstream_modules(module)}
    external = {m for m in imported if graph.is_module_squashed(m)} - set(sys.stdlib_module_names)
    assert {"torch", "ray", "mlflow"} <= external
    owners = importlib.metadata.packages_distributions()
    # mlflow-skinny holds what is imported of mlflow; boto3 brings its own two.
    implied = {"botocore": "boto3", "s3transfer": "boto3"}
    for module in sorted(external):
        names = {implied.get(normal(owner), normal(owner)) for owner in owners[module]}
        assert names & group, f"serving imports {module}, of {sorted(names)}: add it to the dependency group serve"


def test_the_group_is_a_part_of_the_dependencies_and_of_the_lock(group: set[str], project: dict[str, object]) -> None:
    dependencies = {normal(line) for line in project["project"]["dependencies"]}  # type: ignore[index]
    lock = {
        normal(line)
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    }
    assert group - dependencies == {"mlflow-skinny"}
    assert group <= lock
