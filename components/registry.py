"""MLflow as Draftline uses it: one client, aliases, versions with digests.

mlflow is imported inside functions: it takes seconds, and a compiled pipeline
must be readable without it. Its own errors never leave this module; callers
see :class:`draftline.errors.RegistryError` and ``PlatformError``.
"""

from __future__ import annotations

import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from draftline.errors import PlatformError, RegistryError
from draftline.registry_layout import TAG_KEY, digests_from_tags, verify_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

TRACKING_URI_ENV = "MLFLOW_TRACKING_URI"
RUN_ID_ENV = "MLFLOW_RUN_ID"
MAX_DESCRIPTION_CHARS = 5000
"""Of a model version (a column of the registry's schema)."""

_REACH_TIMEOUT_S = 5.0


def connect(environ: Mapping[str, str] = os.environ) -> MlflowClient:
    """A client of the server that ``MLFLOW_TRACKING_URI`` names, which must answer.

    Raises:
        PlatformError: the variable is unset, or nothing answers there.
    """
    uri = environ.get(TRACKING_URI_ENV, "").strip()
    if not uri:
        raise PlatformError(
            f"{TRACKING_URI_ENV} is not set, so there is no model registry to write to",
            remedy=f"Start one with `draftline up`, or set {TRACKING_URI_ENV}=http://HOST:PORT",
        )
    if uri.startswith(("http://", "https://")):
        _require_answer(uri)
    import mlflow

    _quieten()
    # The models:/ scheme resolves through mlflow's process-wide URIs, whatever the client was given.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with registry_errors("open the model registry"):
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def registry_errors(doing: str) -> Iterator[None]:
    """Turn mlflow's and the network's errors into ours.

    Args:
        doing: Completes "could not ..." in the message.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:  # requests' errors are OSErrors
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise RegistryError(
            f"could not {doing}", got=first_line, remedy="See the MLflow server's log; the step can be run again"
        ) from error


def version_by_key(client: MlflowClient, model_name: str, key: str) -> ModelVersion | None:
    """The version that the register step with this content key made, or ``None``."""
    with registry_errors(f"list the versions of {model_name}"):
        found = client.search_model_versions(f"name = '{model_name}'")
    matching = [version for version in found if version.tags.get(TAG_KEY) == key]
    # Two racing runs may have registered twice; the older one counts, for both.
    return min(matching, key=lambda version: int(version.version)) if matching else None


def version_by_alias(client: MlflowClient, model_name: str, alias: str) -> ModelVersion | None:
    """The version an alias points at, or ``None``."""
    from mlflow.exceptions import MlflowException

    with registry_errors(f"look up {model_name}@{alias}"):
        try:
            return client.get_model_version_by_alias(model_name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def resolve(client: MlflowClient, model_name: str, alias_or_version: str, folder: Path) -> Path:
    """Download a registered draft and prove that it is what was registered.

    Args:
        client: From :func:`connect`.
        model_name: Registered model.
        alias_or_version: Such as ``champion`` or ``3``.
        folder: Where to put it; created.

    Returns:
        The local folder, laid out as in :mod:`draftline.registry_layout`.

    Raises:
        RegistryError: no such version, or the registry failed.
        FormatError: a file is missing or not the one that was registered.
    """
    return download_version(require_version(client, model_name, alias_or_version), folder)


def require_version(client: MlflowClient, model_name: str, alias_or_version: str) -> ModelVersion:
    """The version that a number or an alias names.

    Raises:
        RegistryError: no such version, or the registry failed.
    """
    version = _version(client, model_name, alias_or_version)
    if version is None:
        raise RegistryError(
            f"the registry has no {model_name}{_suffix(alias_or_version)}",
            remedy="Run the pipeline first, or look at the model's page in MLflow for its versions and aliases",
        )
    return version


def download_version(version: ModelVersion, folder: Path) -> Path:
    """Download one version and check its digests; errors as :func:`resolve`."""
    from mlflow.artifacts import download_artifacts

    origin = f"{version.name} version {version.version}"
    folder.mkdir(parents=True, exist_ok=True)
    with registry_errors(f"download {origin}"):
        local = Path(download_artifacts(f"models:/{version.name}/{version.version}", dst_path=str(folder)))
    verify_folder(local, digests_from_tags(version.tags), origin=origin)
    return local


def _version(client: MlflowClient, model_name: str, alias_or_version: str) -> ModelVersion | None:
    if not alias_or_version.isdigit():
        return version_by_alias(client, model_name, alias_or_version)
    from mlflow.exceptions import MlflowException

    with registry_errors(f"look up version {alias_or_version} of {model_name}"):
        try:
            return client.get_model_version(model_name, alias_or_version)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def _suffix(alias_or_version: str) -> str:
    return f" version {alias_or_version}" if alias_or_version.isdigit() else f"@{alias_or_version}"


def _quieten() -> None:
    """Keep mlflow's bars, links and notes out of our progress; it offers switches by environment only."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("mlflow").setLevel(logging.WARNING)


def _require_answer(uri: str) -> None:
    """Fail in seconds where mlflow would retry for minutes; any HTTP answer will do."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_REACH_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise PlatformError(
            f"no MLflow server answers at {uri}",
            got=reason,
            remedy=f"Start it with `draftline up`, or correct {TRACKING_URI_ENV}",
        ) from None
