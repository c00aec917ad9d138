"""The application's own OpenAPI document: what is really accepted and answered.

Request bodies are validated by hand (so that a refusal has OpenAI's shape),
which is why FastAPI cannot see them and they are added here.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serving.errors import ErrorResponse
from serving.schema import (
    NEUTRAL_VALUES,
    ChatChunk,
    ChatRequest,
    CompletionRequest,
    CompletionResponse,
    SamplingFields,
)

_SCHEMAS = "#/components/schemas/{model}"
_ADDED: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, ChatChunk, CompletionResponse, ErrorResponse)
_BEARER = "bearer"

POST_FAILURES = (400, 401, 404, 408, 413, 415, 429, 500, 503)
GET_FAILURES = (401, 404, 500, 503)
_WITH_RETRY_AFTER = (429, 503)


def failures(statuses: tuple[int, ...]) -> dict[int | str, dict[str, Any]]:
    """What a route may answer besides success, for FastAPI's ``responses``."""
    retry = {"Retry-After": {"description": "Whole seconds", "schema": {"type": "integer", "minimum": 1}}}
    return {
        status: {"model": ErrorResponse, **({"headers": retry} if status in _WITH_RETRY_AFTER else {})}
        for status in statuses
    }


def answers(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """A 200 that may also be a stream of server-sent events, each with a ``chunk``; the last says ``[DONE]``."""
    documents = [
        {"contentMediaType": "application/json", "contentSchema": {"$ref": _SCHEMAS.format(model=kind.__name__)}}
        for kind in (chunk, ErrorResponse)
    ]
    # Of one event: how OpenAPI before 3.2 describes a stream.
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, *documents]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"schema": event}}}}


def request_body(kind: type[SamplingFields]) -> dict[str, Any]:
    """FastAPI's ``openapi_extra`` of a route that reads ``kind``."""
    schema = {"$ref": _SCHEMAS.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def document(api: FastAPI, *, model_name: str, has_keys: bool, may_store: bool = False) -> dict[str, Any]:
    """The document of ``api``.

    Args:
        api: Its routes.
        model_name: The one value of ``model`` that is not answered 404.
        has_keys: Whether ``/v1`` asks for a bearer key.
        may_store: Whether ``store: true`` is accepted.
    """
    made = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for kind in _ADDED:
        schema = kind.model_json_schema(ref_template=_SCHEMAS)
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
    for name in (ChatRequest.__name__, CompletionRequest.__name__):
        properties = schemas[name]["properties"]
        properties["model"]["enum"] = [model_name]
        if not may_store:
            properties.pop("store", None)
        for field, values in NEUTRAL_VALUES.items():
            properties.setdefault(field, {"enum": list(values), "description": "Only values that ask for nothing."})
    for path, item in made["paths"].items():
        for operation in item.values():
            _say_what_we_answer(operation, is_guarded=has_keys and path.startswith("/v1/"))
    # FastAPI's own answer to a bad parameter; ours is 400.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if has_keys:
        components["securitySchemes"] = {_BEARER: {"type": "http", "scheme": "bearer"}}
    return made


def _say_what_we_answer(operation: dict[str, Any], *, is_guarded: bool) -> None:
    operation["responses"].pop("422", None)
    if is_guarded:
        operation["security"] = [{_BEARER: []}]
    parameters = [p for p in operation.get("parameters", []) if p["name"] != "authorization"]
    operation.pop("parameters", None)
    if parameters:
        operation["parameters"] = parameters
