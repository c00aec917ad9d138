"""Component modules import nothing heavy at their top and hold nothing but a shim."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import components
from draftline.steps import STATIONS

ROOT = Path(components.__file__).parent
MODULES = sorted(ROOT.glob("*/component.py"))
ALLOWED = {"kfp", *sys.stdlib_module_names}
CONSTANTS = {"components.image"}


def imported(tree: ast.Module) -> set[str]:
    """Dotted modules that are imported anywhere outside a function."""
    found: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


def forbidden(source: str) -> set[str]:
    modules = imported(ast.parse(source))
    return {name for name in modules if name.split(".")[0] not in ALLOWED and name not in CONSTANTS}


BESIDE_STATIONS = {
    "drift": "components.drift.step.look_for_drift",
    "promote": "components.promote.step.promote_registered",
    "outcome": "components.outcome.step.report_outcome",
}
"""Components that are no station, and the function that does their work."""


def test_every_station_has_a_component() -> None:
    stations = {name.replace("-", "_") for name in STATIONS}
    assert {path.parent.name for path in MODULES} == stations | set(BESIDE_STATIONS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.parent.name)
def test_module_top_is_light(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8")) == set()


def test_the_shared_constant_module_imports_nothing() -> None:
    assert imported(ast.parse((ROOT / "image.py").read_text(encoding="utf-8"))) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", {"torch"}),
        ("from draftline.steps import STATIONS", {"draftline.steps"}),
        ("try:\n    import ray\nexcept ImportError:\n    ray = None", {"ray"}),
        ("from . import runtime", {"."}),
        ("class A:\n    import mlflow", {"mlflow"}),
        ("def f():\n    import torch", set()),
        ("import json\nfrom kfp import dsl", set()),
    ],
)
def test_the_guard_sees_what_it_should(source: str, found: set[str]) -> None:
    assert forbidden(source) == found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.parent.name)
def test_body_is_one_call(path: Path) -> None:
    """Only a docstring, the import of one function, its call and a return."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == [path.parent.name]
    docstring, importing, *rest = functions[0].body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    worker = BESIDE_STATIONS.get(path.parent.name, "components.runtime.run_station")
    module, _, name = worker.rpartition(".")
    assert ast.unparse(importing) == f"from {module} import {name}"
    calls = [node for node in ast.walk(functions[0]) if isinstance(node, ast.Call)]
    called = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]
    assert len(called) == 1
    if path.parent.name not in BESIDE_STATIONS:
        assert ast.literal_eval(called[0].args[0]) == path.parent.name.replace("_", "-")
    assert len(rest) <= 2
