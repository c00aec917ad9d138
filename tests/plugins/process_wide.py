"""What libraries keep for the whole process, held still so that no test depends on those before it. A pytest plugin."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Ray reads it once, when it is imported, which collecting the tests may do: set by a fixture it would come too late,
# and 127.0.0.1 would mean the host's outer address, where nothing of ours listens.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

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
