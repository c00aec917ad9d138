"""What mlflow keeps for the whole process, taken back so that no test depends on those before it. A pytest plugin.

Ray keeps more (its environment, as it was when it was imported), so tests use it in processes of their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

_MLFLOW_URI_ENVS = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
"""Setting an address in mlflow sets its variable as well, for child processes."""


@pytest.fixture(autouse=True)
def _forget_registry() -> Iterator[None]:
    """Make mlflow forget the server of this test, which it would prefer to what the next test's environment says."""
    before = {name: os.environ.get(name) for name in _MLFLOW_URI_ENVS}
    yield
    if "mlflow" in sys.modules:
        import mlflow

        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
