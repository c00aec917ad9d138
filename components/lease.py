"""One promotion at a time: a lease that MLflow's own registry keeps.

MLflow has no compare-and-set for aliases, but it makes registered models once
only: of two clients that create the same name, one is refused by the
database. The lease is such a name beside the model's, ``NAME.promotion``, there
for the second or two in which aliases are written, with a nonce and the
holder in its tags.

A holder that dies leaves it behind. Whoever waits and sees the same nonce for
``stale_s`` takes it away; no two clocks are compared. Of several that wait
only one may: it must first create the name of a claim on just that nonce.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.registry import registry_errors
from draftline.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

STALE_S = 60.0

_TAG_NONCE = "draftline.lease.nonce"
_TAG_HOLDER = "draftline.lease.holder"
_DESCRIPTION = "Held while aliases are written; gone in seconds."
_POLL_S = 0.2


@dataclass(frozen=True)
class Lease:
    """The right to write a model's aliases.

    Attributes:
        require: Call it before the write that counts; raises RegistryError when the lease was taken away.
    """

    require: Callable[[], None]


@contextmanager
def hold_lease(client: MlflowClient, model_name: str, holder: str, *, stale_s: float = STALE_S) -> Iterator[Lease]:
    """Hold the model's lease for the block.

    Args:
        client: From :func:`components.registry.connect`.
        model_name: Registered model.
        holder: Named to whoever waits.
        stale_s: After this long without a change of holder the lease of another is taken away.

    Raises:
        RegistryError: others hold it one after another, or the registry failed.
    """
    name, nonce = f"{model_name}.promotion", uuid.uuid4().hex
    with registry_errors(f"take the lease {name}"):
        _acquire(client, name, nonce, holder, stale_s)

    def require() -> None:
        with registry_errors(f"look at the lease {name}"):
            found = _read(client, name)
        if found is None or found[0] != nonce:
            raise RegistryError(
                f"the lease {name} was taken away from {holder}, who was too slow; the champion was not changed",
                remedy="Run the command again",
            )

    try:
        yield Lease(require)
    finally:
        try:
            with registry_errors(f"give the lease {name} back"):
                _delete_if(client, name, nonce)
        except RegistryError as error:
            # What was done under it stands; the next one waits until it is stale.
            logger.warning("%s", error)


def _acquire(client: MlflowClient, name: str, nonce: str, holder: str, stale_s: float) -> None:
    seen, since = None, time.monotonic()
    deadline = since + 4 * stale_s
    while not _create(client, name, nonce, holder):
        found = _read(client, name)
        if found != seen:
            seen, since = found, time.monotonic()
        elif found is not None and time.monotonic() - since >= stale_s:
            _take_away(client, name, found[0], holder)
        if time.monotonic() > deadline:
            who = found[1] if found else "nobody any more"
            raise RegistryError(
                f"another promotion does not end: {name} is held by {who}",
                remedy=f"If that process is gone, delete the registered models that begin with {name} in MLflow",
            )
        time.sleep(_POLL_S)


def _create(client: MlflowClient, name: str, nonce: str, holder: str) -> bool:
    """True when the name is ours: the database takes it once."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name,
            tags={_TAG_NONCE: nonce, _TAG_HOLDER: holder},
            description=_DESCRIPTION,
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return False
    return True


def _read(client: MlflowClient, name: str) -> tuple[str, str] | None:
    """Nonce and holder, or ``None`` when nobody holds it."""
    from mlflow.exceptions import MlflowException

    try:
        tags = client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return tags.get(_TAG_NONCE, ""), tags.get(_TAG_HOLDER, "unknown")


def _delete_if(client: MlflowClient, name: str, nonce: str) -> None:
    from mlflow.exceptions import MlflowException

    found = _read(client, name)
    if found is not None and found[0] == nonce:
        with suppress(MlflowException):  # somebody was faster
            client.delete_registered_model(name)


def _take_away(client: MlflowClient, name: str, nonce: str, holder: str) -> None:
    claim = f"{name}.{nonce[:12]}"
    if not _create(client, claim, nonce, holder):
        return
    try:
        _delete_if(client, name, nonce)
    finally:
        client.delete_registered_model(claim)
