"""The run spec's parts as the chart's schema repeats them, so that a typo in them fails the install."""

from __future__ import annotations

import inspect
from typing import Any

import docstring_parser

from draftline.spec import ServingSpec, TargetSpec
from draftline.spec.models import Part

PARTS: dict[str, type[Part]] = {"runSpecTarget": TargetSpec, "runSpecServing": ServingSpec}
"""Names in the schema's ``$defs``."""


def schema_of_parts() -> dict[str, Any]:
    """JSON Schema of each part, with the meaning of every field from its docstring."""
    return {name: _schema(model) for name, model in PARTS.items()}


def _schema(model: type[Part]) -> dict[str, Any]:
    schema = _inlined(_without_titles(model.model_json_schema()))
    _describe(schema, model)
    return {**schema, "description": f"The run spec's part: {schema['description']}"}


def _describe(schema: dict[str, Any], model: type[Part]) -> None:
    document = docstring_parser.parse(inspect.cleandoc(model.__doc__ or ""))
    meanings = {field.arg_name: " ".join((field.description or "").split()) for field in document.params}
    for name, field in schema["properties"].items():
        inner = model.model_fields[name].annotation
        if isinstance(inner, type) and issubclass(inner, Part):
            _describe(field, inner)
        field["description"] = meanings[name].replace("``", "`")
    schema["description"] = document.short_description


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Parts within the part in their places: the chart's schema has one list of definitions for all."""
    parts = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(value) for value in node]
        if not isinstance(node, dict):
            return node
        part = parts[node["$ref"].removeprefix("#/$defs/")] if "$ref" in node else {}
        return {key: resolve(value) for key, value in {**part, **node}.items() if key != "$ref"}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def _without_titles(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: _without_titles(value)
            for key, value in node.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_without_titles(value) for value in node] if isinstance(node, list) else node
