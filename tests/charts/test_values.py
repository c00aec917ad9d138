"""The schema is closed and describes every value; values.yaml and the README say the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.charts.helm import CHART, Helm
from tests.charts.run_spec import PARTS, schema_of_parts
from tests.charts.values_table import render_table, rows
from tests.pipelines.test_cli import invoke

SCHEMA_FILE = CHART / "values.schema.json"
BEGIN, END = "<!-- values: begin -->", "<!-- values: end -->"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return document


FREE_FORM = {"affinity", "topologySpreadConstraints", "valueFrom", "podSelector", "namespaceSelector", "ipBlock"}
"""Kubernetes' own objects, passed on: the API server checks them."""


def open_objects(node: Any, path: str) -> Iterator[str]:
    """Objects of a schema that take unknown keys of any shape."""
    if isinstance(node, list):
        for item in node:
            yield from open_objects(item, path)
    if not isinstance(node, dict):
        return
    extra = node.get("additionalProperties")
    # A map whose values have a shape is no hole.
    if node.get("type") == "object" and extra is not False and not isinstance(extra, dict):
        yield path
    for key, value in node.items():
        if key not in ("description", "default", "enum"):
            yield from open_objects(value, path if key in ("properties", "items", "$defs") else f"{path}.{key}")


def test_every_level_is_closed(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    holes = list(open_objects(schema, ""))
    assert holes and all(FREE_FORM & set(hole.split(".")) for hole in holes), holes


def undescribed(node: Any, path: str) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.get("properties", {}).items():
            if not value.get("description"):
                yield f"{path}.{name}"
        for key, value in node.items():
            yield from undescribed(value, f"{path}.{key}")


def test_every_value_is_described(schema: dict[str, Any]) -> None:
    assert list(undescribed(schema, "")) == []


def test_the_defaults_are_valid_and_complete(schema: dict[str, Any], values: dict[str, Any]) -> None:
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(values)) == []
    missing = [row.path for row in rows(schema, values) if not row.has_default]
    # Parts of the run spec have their defaults in the run spec.
    assert [path for path in missing if not path.startswith(("serving.spec.", "serving.target."))] == []


def test_values_are_commented() -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    sections = [part for part in text.split("\n\n") if part.strip()]
    assert len([part for part in sections if part.lstrip().startswith("#")]) >= 9


def with_run_spec(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with the run spec's parts as the models have them now."""
    return {**schema, "$defs": {**schema["$defs"], **schema_of_parts()}}


def test_parts_of_the_run_spec_are_those_of_the_models(
    schema: dict[str, Any], check_golden: Callable[[str, Path], None]
) -> None:
    assert set(PARTS) <= set(schema["$defs"])
    check_golden(json.dumps(with_run_spec(schema), indent=2, ensure_ascii=False) + "\n", SCHEMA_FILE)


def test_the_table_of_values_is_current(
    schema: dict[str, Any], values: dict[str, Any], check_golden: Callable[[str, Path], None]
) -> None:
    readme = CHART / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    check_golden(f"{before}{BEGIN}\n{render_table(with_run_spec(schema), values)}{END}{after}", readme)


def test_the_planner_s_values_are_taken(helm: Helm, tmp_path: Path) -> None:
    arguments = ("plan", "--target", "Qwen/Qwen3-8B", "--samples", "1000", "--helm-values")
    code, text, error = invoke(*arguments)
    assert (code, error) == (0, "")
    planned = yaml.safe_load(text)
    release = helm.template({**planned, "minio": {**planned["minio"], "enabled": True}})
    (claim,) = release.one("StatefulSet")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == planned["minio"]["persistence"]["size"]
    assert "Qwen/Qwen3-8B" in release.one("RayService")["spec"]["serveConfigV2"]
