"""Read, override, derive and write run specs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from draftline.errors import SpecError
from draftline.spec.models import RunSpec


def parse_spec(text: str, *, origin: str = "the spec") -> RunSpec:
    """Parse YAML text into a spec.

    Args:
        text: The YAML document.
        origin: Named in error messages.

    Raises:
        SpecError: not YAML, not a mapping, an unknown key or an impossible value.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{origin} is not YAML: {error}", remedy="Start from `draftline recipes NAME`") from None
    if document is None:
        document = {}
    if not isinstance(document, dict):
        raise SpecError(
            f"{origin} has the wrong shape", got=type(document).__name__, expected="a mapping of spec parts"
        )
    return build_spec(document, origin=origin)


def load_spec(path: Path) -> RunSpec:
    """Read a spec from a YAML file; errors as :func:`parse_spec`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(
            f"no spec at {path}", remedy="Write one with `draftline recipes smollm2-135m > spec.yaml`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the spec {path}: {error}", remedy="Give a readable UTF-8 YAML file") from None
    return parse_spec(text, origin=str(path))


def build_spec(document: Mapping[str, Any], *, origin: str = "the spec") -> RunSpec:
    """Validate a plain mapping into a spec; errors as :func:`parse_spec`."""
    try:
        return RunSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError(_explain(error, origin), remedy="See `draftline recipes NAME` for a complete spec") from None


def derive(spec: RunSpec, overrides: Mapping[str, Any]) -> RunSpec:
    """A validated copy of ``spec`` with dotted keys replaced.

    Args:
        spec: The base.
        overrides: For example ``{"draft.num_layers": 2}``.

    Raises:
        SpecError: an unknown key or an impossible result.
    """
    document = spec.model_dump(mode="json")
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        node: Any = document
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node:
            raise SpecError(
                f"the spec has no key {dotted!r}", remedy=_suggest(dotted, _all_keys(spec.model_dump(mode="json")))
            )
        node[leaf] = value
    return build_spec(document, origin="the spec with overrides")


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Turn ``--set draft.num_layers=2`` arguments into a mapping; values are YAML.

    Raises:
        SpecError: an argument without ``=`` or with a value that is not YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, value = assignment.partition("=")
        if not separator or not key.strip():
            raise SpecError(
                f"cannot read --set {assignment!r}", expected="KEY=VALUE", remedy="For example --set draft.num_layers=2"
            )
        try:
            overrides[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise SpecError(f"the value of --set {assignment!r} is not YAML", remedy="Quote it") from None
    return overrides


def dump_spec(spec: RunSpec) -> str:
    """The spec as YAML; parsing it gives an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _explain(error: ValidationError, origin: str) -> str:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "(whole spec)"
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}. {_suggest(where, _all_keys(RunSpec().model_dump(mode='json')))}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = f" (got {given!r})" if not isinstance(given, dict | BaseModel) else ""
            lines.append(f"{where}: {message}{shown}")
    return f"{origin} is not valid: " + "; ".join(lines)


def _all_keys(document: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in document.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += _all_keys(value, f"{prefix}{key}.")
    return keys


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        leaf = key.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
    return f"Did you mean {close[0]!r}?" if close else "See `draftline recipes NAME` for all keys."
