"""Compile the training DAG to the YAML that a KFP backend takes."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from draftline.errors import InputError, StorageError


def compile_pipeline(path: Path) -> None:
    """Write the compiled pipeline: two YAML documents, the pipeline spec and its Kubernetes part.

    Args:
        path: A ``.yaml`` or ``.yml`` file; replaced when it exists.

    Raises:
        InputError: the file's name has another ending.
        StorageError: the file cannot be written.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            "cannot compile to this file",
            got=str(path),
            expected="a name that ends in .yaml",
            remedy=f"Write `draftline compile -o {path.with_suffix('.yaml')}`",
        )
    # kfp takes half a second to import; only those who compile pay it.
    from kfp import compiler

    from pipelines.train_draft import train_draft

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".draftline-", dir=path.parent) as folder, warnings.catch_warnings():
            # kfp warns about its own use of deprecated calls; none of it is the user's to act on.
            warnings.simplefilter("ignore")
            whole = Path(folder, "pipeline.yaml")
            compiler.Compiler().compile(train_draft, str(whole))
            whole.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}", remedy="Choose another file") from None
