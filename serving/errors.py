"""The one table that turns errors into HTTP status codes and OpenAI error bodies.

Handlers raise; nobody but this module picks a status. A body is always
``{"error": {"message", "type", "param", "code"}}``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from pydantic import BaseModel, ValidationError

from draftline import errors

RETRY_AFTER_S = 1
"""What a client is told to wait where nothing is known that would give a better time."""


class ErrorBody(BaseModel):
    """The inside of an OpenAI error response."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """An OpenAI error response."""

    error: ErrorBody


@dataclass(frozen=True)
class HttpError:
    """A status with its body and headers, ready to send."""

    status: int
    body: ErrorBody
    headers: dict[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, object]:
        """The JSON document of the response."""
        return ErrorResponse(error=self.body).model_dump()


class ServingError(errors.DraftlineError):
    """A request cannot be answered; carries what the client should see.

    Args:
        message: For the client: what is wrong and what to do.
        param: The request field at fault.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after_s = RETRY_AFTER_S

    def __init__(self, message: str, *, param: str | None = None, got: object | None = None) -> None:
        super().__init__(message, got=got)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.param))


def _rebuild(cls: type[ServingError], message: str, param: str | None) -> ServingError:
    return cls(message, param=param)


class BadRequest(ServingError):
    """The request is malformed or asks for something unsupported."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextTooLong(BadRequest):
    """Prompt plus answer do not fit the context window."""

    code = "context_length_exceeded"


class BodyTooLarge(BadRequest):
    """The request body exceeds what the server reads."""

    status = 413
    code = "request_too_large"


class RequestTimeout(BadRequest):
    """The request body did not arrive in time."""

    status = 408
    code = "request_timeout"


class UnsupportedMedia(BadRequest):
    """The request body is declared to be something other than plain JSON."""

    status = 415
    code = "unsupported_media_type"


class InvalidApiKey(ServingError):
    """No key, or a wrong one, on a server that asks for keys."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class UnknownModel(ServingError):
    """The server does not serve the named model."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class Overloaded(ServingError):
    """All slots and all queue places are taken.

    Args:
        message: For the client.
        retry_after_s: Whole seconds after which a place is likely to be free.
    """

    status = 429
    type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = RETRY_AFTER_S) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[object, ...]:
        return (partial(Overloaded, retry_after_s=self.retry_after_s), (self.message,))


class NotReady(ServingError):
    """The engine is stopped, failed or not loaded yet."""

    status = 503
    type = "server_error"
    code = "engine_unavailable"


class ReplicaLost(ServingError):
    """The replica died while this request was in flight; another one, or the same after its return, can answer it."""

    status = 503
    code = "replica_lost"


class EngineFailed(ServingError):
    """The engine failed while this request was in flight."""

    status = 500
    type = "server_error"
    code = "engine_error"


# Errors of the core that a request can meet. Anything else is a fault of the server: 500 without details.
_CORE_ERRORS: dict[type[errors.DraftlineError], tuple[int, str, str]] = {
    errors.InputError: (400, "invalid_request_error", "invalid_value"),
    errors.SpecError: (400, "invalid_request_error", "invalid_value"),
}

_STATUS_TYPES = {
    400: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
}


def to_http(error: BaseException) -> HttpError:
    """What to answer for ``error``.

    Args:
        error: Anything a handler raised.

    Returns:
        The response; an unexpected error becomes a 500 that names its type
        only, since its text may hold data of other users.
    """
    if isinstance(error, ServingError):
        headers = {}
        if error.status in (429, 503):
            headers["Retry-After"] = str(error.retry_after_s)
        if error.status in (408, 413, 415):
            # The rest of the body may still come; it must not be taken for the next request.
            headers["Connection"] = "close"
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return HttpError(
            error.status, ErrorBody(message=str(error), type=error.type, param=error.param, code=error.code), headers
        )
    for kind, (status, error_type, code) in _CORE_ERRORS.items():
        if isinstance(error, kind):
            return HttpError(status, ErrorBody(message=str(error), type=error_type, code=code))
    message = f"The server failed on this request ({type(error).__name__}). Its log has the details."
    return HttpError(500, ErrorBody(message=message, type="server_error", code="internal_error"))


def plain_status(status: int, message: str) -> HttpError:
    """The OpenAI shape of a routing answer such as 404 or 405."""
    return HttpError(status, ErrorBody(message=message, type=_STATUS_TYPES.get(status, "server_error")))


def from_validation(error: ValidationError) -> BadRequest:
    """The first fault of a request document, in words for its sender."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = [str(part) for part in fault["loc"] if not _is_union_branch(str(part))]
    param = ".".join(path) or None
    kind, text = fault["type"], fault["msg"].removeprefix("Value error, ")
    if kind == "json_invalid":
        return BadRequest(f"The request body is not valid JSON: {text}")
    if kind == "extra_forbidden":
        return BadRequest(
            f"'{param}' is not supported by this server. Remove it from the request; ignoring it would "
            "change the answer you expect",
            param=param,
        )
    if kind == "missing":
        return BadRequest(f"'{param}' is required", param=param)
    return BadRequest(f"{param}: {text}" if param else text, param=param)


def _is_union_branch(part: str) -> bool:
    # Pydantic names the tried branch of a union ("list[str]", "constrained-str") inside the location.
    return "[" in part or part in {"str", "constrained-str"}
