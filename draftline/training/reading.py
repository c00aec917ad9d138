"""Say at which step samples could not be read, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from draftline.errors import FormatError, ObjectNotFound, StorageError

_REPAIR = (
    "`draftline cache verify URI --repair` with this workspace finds all damage; then run the pipeline again: what is "
    "damaged or missing is captured anew, and training goes on from its newest checkpoint"
)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Name what was being read for in the errors of the body.

    Args:
        what: For example ``"training step 7"``.

    Raises:
        FormatError, StorageError: those of the body, of the same type, with ``what`` in front; for a damaged or a
            missing shard with a remedy that repairs it.
    """
    try:
        yield
    except (FormatError, StorageError) as error:
        remedy = _REPAIR if isinstance(error, FormatError | ObjectNotFound) else error.remedy
        raise type(error)(
            f"{what} cannot read its samples: {error.what}", got=error.got, expected=error.expected, remedy=remedy
        ) from error
