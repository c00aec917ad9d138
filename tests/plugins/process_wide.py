"""What libraries keep for the whole process, held still so that no test depends on those before it. A pytest plugin."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Ray reads it once, when it is imported, which collecting the tests may do: set by a fixture it would come too late,
# and 127.0.0.1 would mean the host's outer address, where nothing of ours listens.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

_TRACKING_URI_ENV = "MLFLOW_TRACKING_URI"


@pytest.fixture(autouse=True)
def _forget_registry() -> Iterator[None]:
    """Make mlflow forget the server of this test, which it would prefer to what the next test's environment says."""
    before = os.environ.get(_TRACKING_URI_ENV)
    yield
    if "mlflow" in sys.modules:
        import mlflow

        mlflow.set_tracking_uri(None)  # takes the variable out of the environment as well
        mlflow.set_registry_uri(None)
    if before is not None:
        os.environ[_TRACKING_URI_ENV] = before
