"""Compile pipelines to the YAML that a KFP backend takes."""

from __future__ import annotations

import ast
import importlib
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

from draftline.errors import InputError, StorageError

PIPELINES = {
    "train-draft": "pipelines.train_draft:train_draft",
    "promote-draft": "pipelines.promote_draft:promote_draft",
    "retrain-on-drift": "pipelines.retrain_on_drift:retrain_on_drift",
}
"""``module:object`` of every pipeline by its name."""

DEFAULT_PIPELINE = "train-draft"
_STRUCT_DEFAULT = re.compile(r"^(#    \w+: dict \[Default: )(\{.*\})(\])$", re.MULTILINE)


def load_pipeline(name: str) -> Any:
    """A pipeline object of kfp.

    Raises:
        InputError: there is no such pipeline.
    """
    if name not in PIPELINES:
        raise InputError("there is no such pipeline", got=name, expected=" or ".join(PIPELINES))
    module, _, attribute = PIPELINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def compile_pipeline(path: Path, name: str = DEFAULT_PIPELINE) -> None:
    """Write the compiled pipeline: two YAML documents, the pipeline spec and its Kubernetes part.

    Args:
        path: A ``.yaml`` or ``.yml`` file; replaced when it exists.
        name: Which of :data:`PIPELINES`.

    Raises:
        InputError: the file's name has another ending, or there is no such pipeline.
        StorageError: the file cannot be written.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            "cannot compile to this file",
            got=str(path),
            expected="a name that ends in .yaml",
            remedy=f"Write `draftline compile -o {path.with_suffix('.yaml')}`",
        )
    pipeline = load_pipeline(name)
    # kfp takes half a second to import; only those who compile pay it.
    from kfp import compiler

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draftline-", dir=path.parent) as folder, warnings.catch_warnings():
            # kfp warns about its own use of deprecated calls; none of it is the user's to act on.
            warnings.simplefilter("ignore")
            whole = Path(folder, "pipeline.yaml")
            compiler.Compiler().compile(pipeline, str(whole))
            whole.write_text(_settled(whole.read_text(encoding="utf-8")), encoding="utf-8")
            whole.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", remedy="Choose another file") from None


def _settled(text: str) -> str:
    """The text with defaults in its head comment in order: kfp prints them in another one each time."""

    def in_order(found: re.Match[str]) -> str:
        return f"{found[1]}{dict(sorted(ast.literal_eval(found[2]).items()))}{found[3]}"

    return _STRUCT_DEFAULT.sub(in_order, text)
