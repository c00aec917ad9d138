"""One exception tree for everything a user can meet.

.. code-block:: text

    DraftlineError
    ├── SpecError           a run spec is malformed or impossible
    ├── InputError          user data (prompts, files) cannot be used
    ├── TargetError         a target model cannot be found or loaded
    ├── StorageError        the workspace failed
    │   ├── ObjectNotFound  no object at this key
    │   ├── ObjectExists    create-if-absent lost: the key is taken
    │   ├── AccessDenied    wrong or missing credentials
    │   ├── StoreUnreachable  no answer from the endpoint
    │   └── NoSpace         disk or quota is full
    ├── FormatError         an artefact is truncated, corrupt, foreign or newer
    ├── StepError           a pipeline step failed
    ├── PlatformError       an embedded service (MLflow, Ray, Serve) failed
    ├── RegistryError       the model registry refused or lacks something
    └── TrainingDiverged    NaN or Inf in training; names the batch

Every message says what was being done, what was found, what was expected
and what the user can do about it. ``exit_code`` is what the command line
returns.
"""

from __future__ import annotations


class DraftlineError(Exception):
    """Base of all errors that Draftline raises on purpose.

    Args:
        what: What went wrong, in one clause.
        got: What was found.
        expected: What would have been right.
        remedy: What the user can do now.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: object | None = None,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.remedy = remedy
        super().__init__(self._render())

    def _render(self) -> str:
        parts = [self.what.rstrip(".")]
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        text = "; ".join(parts) + "."
        if self.remedy is not None:
            text += f" {self.remedy.rstrip('.')}."
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (Ray, kfp); keyword arguments must survive pickling.
        return (_rebuild, (type(self), self.what, self.got, self.expected, self.remedy))


def _rebuild(
    cls: type[DraftlineError],
    what: str,
    got: object | None,
    expected: str | None,
    remedy: str | None,
) -> DraftlineError:
    return cls(what, got=got, expected=expected, remedy=remedy)


class SpecError(DraftlineError):
    """A run spec is malformed or asks for an impossible combination."""

    exit_code = 2


class InputError(DraftlineError):
    """User data cannot be used at all (single bad records never raise)."""

    exit_code = 3


class TargetError(DraftlineError):
    """A target model or its tokenizer cannot be found or loaded."""

    exit_code = 4


class StorageError(DraftlineError):
    """The workspace could not be read or written."""

    exit_code = 5


class ObjectNotFound(StorageError):
    """No object exists at the key."""


class ObjectExists(StorageError):
    """Create-if-absent found the key taken."""


class AccessDenied(StorageError):
    """The store refused the credentials, or none were given."""


class StoreUnreachable(StorageError):
    """The store's endpoint did not answer."""


class NoSpace(StorageError):
    """The disk or the quota is full."""


class FormatError(DraftlineError):
    """An artefact is truncated, corrupt, foreign or of a newer format."""

    exit_code = 6


class StepError(DraftlineError):
    """A pipeline step failed."""

    exit_code = 7


class PlatformError(DraftlineError):
    """An embedded service could not be started, reached or stopped."""

    exit_code = 8


class RegistryError(DraftlineError):
    """The model registry refused, or lacks what was asked for."""

    exit_code = 9


class TrainingDiverged(DraftlineError):
    """The loss or a gradient became NaN or Inf; the last good checkpoint stays."""

    exit_code = 10
