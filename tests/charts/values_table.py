"""The table of values in the chart's README, from the schema and the defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_MISSING = object()


@dataclass(frozen=True)
class Row:
    """One value.

    Attributes:
        path: Dotted.
        type: As people say it.
        default: As JSON; empty where there is none.
        description: What it does.
        has_default: Whether values.yaml has it.
    """

    path: str
    type: str
    default: str
    description: str
    has_default: bool


def render_table(schema: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """A section with a table for each top-level value."""
    lines: list[str] = []
    section = ""
    for row in rows(schema, values):
        top = row.path.partition(".")[0]
        is_single = "properties" not in _resolve(schema, schema["properties"][top])
        heading = "names" if is_single else top
        if heading != section:
            section = heading
            about = "Of all objects." if is_single else _resolve(schema, schema["properties"][top])["description"]
            lines += ["", f"### `{top}`" if not is_single else "### Names", "", about, ""]
            lines += ["| value | type | default | |", "| --- | --- | --- | --- |"]
        default = f"`{row.default}`" if row.default else ""
        lines.append(f"| `{row.path}` | {row.type} | {default} | {row.description} |".replace("|  |", "| |"))
    return "\n".join(lines[1:]) + "\n"


def rows(schema: Mapping[str, Any], values: Mapping[str, Any]) -> list[Row]:
    """All values, in the schema's order; maps and lists are one value each."""
    return list(_rows(schema, schema["properties"], values, ""))


def _rows(root: Mapping[str, Any], properties: Mapping[str, Any], values: Any, prefix: str) -> Iterator[Row]:
    for name, reference in properties.items():
        node = _resolve(root, reference)
        value = values.get(name, _MISSING) if isinstance(values, Mapping) else _MISSING
        path = f"{prefix}{name}"
        if "properties" in node:
            yield from _rows(root, node["properties"], value, f"{path}.")
            continue
        # Parts of the run spec have their defaults there, and the schema repeats them.
        shown = node.get("default", _MISSING) if value is _MISSING else value
        default = "" if shown is _MISSING else json.dumps(shown, ensure_ascii=False)
        if len(default) > 60:
            default = "see values.yaml"
        text = str(node["description"]).replace("|", "\\|")
        yield Row(path, _type(root, node), default.replace("|", "\\|"), text, value is not _MISSING)


def _resolve(root: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """A node with its reference followed; what stands beside the reference goes first."""
    if "$ref" not in node:
        return dict(node)
    target = root["$defs"][node["$ref"].rpartition("/")[2]]
    return {**target, **{key: value for key, value in node.items() if key != "$ref"}}


def _type(root: Mapping[str, Any], node: Mapping[str, Any]) -> str:
    if "enum" in node:
        return " or ".join(f"`{choice}`" if choice != "" else "empty" for choice in node["enum"])
    if "anyOf" in node:
        return " or ".join(_type(root, choice) for choice in node["anyOf"])
    kind = node.get("type", "any")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {_type(root, _resolve(root, node['items']))}s"
    return {"object": "map"}.get(str(kind), str(kind))
