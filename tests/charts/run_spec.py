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
    schema = _without_titles(model.model_json_schema())
    document = docstring_parser.parse(inspect.cleandoc(model.__doc__ or ""))
    meanings = {field.arg_name: " ".join((field.description or "").split()) for field in document.params}
    for name, field in schema["properties"].items():
        field["description"] = meanings[name].replace("``", "`")
    schema["description"] = f"The run spec's part: {document.short_description}"
    return schema


def _without_titles(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: _without_titles(value)
            for key, value in node.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_without_titles(value) for value in node] if isinstance(node, list) else node
