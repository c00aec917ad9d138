"""The names and the user in the Dockerfile are those that pipelines and chart ask for."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from components.image import DEFAULT_IMAGE
from draftline import __version__
from tests.images.dockerfile import ROOT, read_dockerfile

_, STAGES = read_dockerfile()


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "charts/draftline/values.yaml").read_text(encoding="utf-8"))
    return loaded


def test_steps_run_in_the_target_cpu_by_default() -> None:
    assert f"ghcr.io/draftline/{STAGES['cpu'].labels['title']}:{__version__}" == DEFAULT_IMAGE


def test_the_chart_takes_checks_from_cpu_and_replicas_from_serve(values: dict[str, Any]) -> None:
    for image, target in ((values["image"], "cpu"), (values["serving"]["image"], "serve")):
        assert (image["registry"], image["repository"]) == ("ghcr.io", f"draftline/{STAGES[target].labels['title']}")


def test_the_charts_app_version_is_this_one() -> None:
    chart = yaml.safe_load((ROOT / "charts/draftline/Chart.yaml").read_text(encoding="utf-8"))
    assert str(chart["appVersion"]) == __version__


def test_pods_run_as_the_images_user(values: dict[str, Any]) -> None:
    user = STAGES["serve"].all("USER")[-1].partition(":")[0]
    for part in (values["serving"], values["tools"]):
        assert {str(part["security"][key]) for key in ("runAsUser", "runAsGroup", "fsGroup")} == {user}


def test_names_are_distinct() -> None:
    titles = [STAGES[target].labels["title"] for target in ("cpu", "gpu", "serve")]
    assert len(set(titles)) == 3
