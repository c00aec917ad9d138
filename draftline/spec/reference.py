"""The reference of all spec fields as Markdown, made from the models themselves.

``docs/run-spec.md`` is its output; a test holds the two equal. Meanings come
from the docstrings, types and defaults from the models, so nothing is told
twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from docstring_parser import DocstringStyle, parse
from pydantic.fields import FieldInfo

from draftline.errors import SpecError
from draftline.spec.models import Part, RunSpec

_HEAD = """# Run spec

Every field of a run spec: its type, its default, and what it means. `draftline recipes smollm2-135m` prints a complete
spec to start from; `draftline validate spec.yaml` checks one; `--set part.field=value` overrides a field for one run.
A field that is left out has its default. An unknown field is an error.

*Runs again from* names the first step that reads the field. Change it, and that step and those that read its results
run again; all others are taken from the workspace. `-` means that no step's key holds the field: it says where or by
how many the work is done, or which branches there are. `register`, `gate` and `deploy` run every time: they bring a
service to a state.

This page is generated from the docstrings in `draftline/spec/models.py`. Do not edit it.
"""

_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_BY_CONTENT = {
    "prompts.source": "`prompts`, when the content differs",
    "evaluation.suite_files": "`evaluation`, when the content differs; `prompts`, when it overlaps them",
}
"""Fields that name what enters a key by its content."""
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}


def render_reference(fields_of_steps: Mapping[str, Sequence[str]]) -> str:
    """The whole reference.

    Args:
        fields_of_steps: For every step, in the order of the DAG, the dotted
            spec fields (or whole parts) that enter its content key.

    Returns:
        Markdown that ends with a newline.

    Raises:
        SpecError: a field has no meaning in its model's docstring.
    """
    sections = [_HEAD]
    for path, part in _parts(RunSpec, ""):
        sections.append(_section(path, part, fields_of_steps))
    return "\n".join(sections)


def _parts(model: type[Part], path: str) -> Iterator[tuple[str, type[Part]]]:
    yield path, model
    for name, field in model.model_fields.items():
        if (part := _part_of(field)) is not None:
            yield from _parts(part, f"{path}{name}.")


def _part_of(field: FieldInfo) -> type[Part] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Part) else None


def _section(path: str, model: type[Part], fields_of_steps: Mapping[str, Sequence[str]]) -> str:
    docstring = parse(model.__doc__ or "", style=DocstringStyle.GOOGLE)
    meanings = {param.arg_name: _one_line(param.description or "") for param in docstring.params}
    properties = model.model_json_schema()["properties"]
    title = f"`{path.rstrip('.')}`" if path else "Top level"
    lines = [f"## {title}", "", _one_line(docstring.short_description or ""), ""]
    lines += ["| field | type | default | runs again from | meaning |", "| --- | --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if _part_of(field) is not None:
            continue
        cells = (
            f"`{name}`",
            _type_text(properties[name]),
            f"`{_default_text(field)}`",
            _first_reader(path + name, fields_of_steps),
            meanings.get(name) or _constant_meaning(path + name, field),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    below = [f"`{path}{name}`" for name, field in model.model_fields.items() if _part_of(field) is not None]
    if below:
        lines += ["", f"Parts below: {', '.join(below)}."]
    return "\n".join(lines) + "\n"


def _constant_meaning(path: str, field: FieldInfo) -> str:
    if len(get_args(field.annotation)) == 1:
        return "The only value; another is refused."
    raise SpecError(f"{path!r} has no meaning in its model's docstring", remedy="Add it under Attributes")


def _type_text(schema: Mapping[str, Any]) -> str:
    """The type in words, with its bounds."""
    if "anyOf" in schema:
        return " or ".join(_type_text(choice) for choice in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "type" not in schema:
        return "any value"
    if schema["type"] == "array":
        return f"list, each {_type_text(schema['items'])}"
    if schema["type"] == "object":
        return f"mapping of names to {_type_text(schema['additionalProperties'])}"
    bounds = [f"{words} {_number_text(schema[key])}" for key, words in _BOUNDS.items() if key in schema]
    return ", ".join([_WORDS[schema["type"]], *bounds])


def _number_text(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _default_text(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _first_reader(path: str, fields_of_steps: Mapping[str, Sequence[str]]) -> str:
    if path in _BY_CONTENT:
        return _BY_CONTENT[path]
    for step, fields in fields_of_steps.items():
        if any(path == field or path.startswith(f"{field}.") for field in fields):
            return f"`{step}`"
    return "-"


def _one_line(text: str) -> str:
    """Docstring text in Markdown, with YAML's word for nothing."""
    return " ".join(text.replace("``None``", "``null``").replace("``", "`").split())
