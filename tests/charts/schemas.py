"""Strict validation of rendered objects: Kubernetes' own by its OpenAPI schema, custom ones by their CRD's."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import referencing
from kubernetes_validate.utils import schema_contents

from tests.charts.subsets import SUBSETS

CRDS = Path(__file__).parent / "crds"
OLDEST, NEWEST = "1.29.0", "1.37.0"
"""Kubernetes versions that objects must be valid for: the chart's oldest, and the newest that was published."""


def problems(document: dict[str, Any], kubernetes: str = NEWEST) -> list[str]:
    """What is wrong with an object; an unknown field is wrong."""
    where = f"{document['kind']} {document['metadata']['name']}"
    validator = _validator(document["apiVersion"], document["kind"], kubernetes)
    return [f"{where}: {error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@cache
def _validator(api_version: str, kind: str, kubernetes: str) -> Any:
    group, _, version = api_version.rpartition("/")
    crd = (
        [path for path in CRDS.glob("*.gz") if path.name.startswith(f"{group}_{kind.lower()}s_{version}.")]
        if group
        else []
    )
    if crd:
        schema = json.loads(gzip.decompress(crd[0].read_bytes()))["schema"]
        closed = close(schema)
        # The schema leaves metadata to the API server.
        closed["properties"]["metadata"] = {"type": "object"}
        return jsonschema.Draft202012Validator(closed)
    if (api_version, kind) in SUBSETS:
        return jsonschema.Draft202012Validator(SUBSETS[api_version, kind])
    stem = f"{kind.lower()}-{group.partition('.')[0]}-{version}" if group else f"{kind.lower()}-{version}"
    folder = f"kubernetes-json-schema/v{kubernetes}-local-strict"
    schema = schema_contents(f"{folder}/{stem}.json", kubernetes)
    return jsonschema.Draft202012Validator(schema, registry=_definitions(folder, kubernetes))


@cache
def _definitions(folder: str, kubernetes: str) -> Any:
    # kubernetes_validate.validate reads these megabytes again for every object.
    resource = referencing.Resource.from_contents(
        schema_contents(f"{folder}/_definitions.json", kubernetes),
        default_specification=referencing.jsonschema.DRAFT202012,
    )
    return referencing.Registry().with_resources([("", resource), ("_definitions.json", resource)]).crawl()


def close(schema: Any) -> Any:
    """A CRD's structural schema as a JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "properties":
            closed[name] = {key: close(inner) for key, inner in value.items()}
        elif name != "format":
            closed[name] = close(value)
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
        closed["type"] = ["integer", "string"]
    if (
        "properties" in schema
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed["additionalProperties"] = False
    if schema.get("nullable") and isinstance(closed.get("type"), str):
        closed["type"] = [closed["type"], "null"]
    return closed
