"""The HTTP routes: a FastAPI application over a :class:`CompletionService`.

It knows nothing of Ray Serve, so tests (and anyone's uvicorn) run the very
application that the replica runs.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import cache, partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from draftline import __version__
from draftline.errors import DraftlineError
from serving import openapi
from serving.edge import BodyLimits, Edge
from serving.errors import (
    BadRequest,
    HttpError,
    InvalidApiKey,
    UnknownModel,
    from_validation,
    plain_status,
    to_http,
)
from serving.render import ChatRenderer, CompletionRenderer, Renderer, merge, origins
from serving.schema import (
    ChatChunk,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    ModelCard,
    ModelList,
    SamplingFields,
)
from serving.service import CompletionService, Job
from serving.ui.routes import ui_routes

logger = logging.getLogger(__name__)

ReadMetrics = Callable[[str], Awaitable[bytes]]
"""Text of the metrics, for the host that was asked."""

RequestType = TypeVar("RequestType", bound=SamplingFields)


def create_api(
    service: CompletionService,
    api_keys: Sequence[str] = (),
    *,
    deployment: str = "",
    limits: BodyLimits | None = None,
    has_ui: bool = True,
    read_metrics: ReadMetrics | None = None,
) -> FastAPI:
    """The application.

    Args:
        service: Answers the requests.
        api_keys: Accepted bearer keys of ``/v1``; empty asks for none.
        deployment: Shown by ``/version``: equal for replicas that were told the same.
        limits: Of request bodies; by default what a full context can need.
        has_ui: Whether there is a page at ``/ui``.
        read_metrics: Text of ``/metrics``; ``None`` shows those of ``service`` alone.
    """
    # FastAPI's own pages take scripts from another host, on the origin whose tab may hold an API key.
    api = FastAPI(
        title="Draftline",
        version=__version__,
        description="OpenAI-compatible speculative decoding",
        docs_url=None,
        redoc_url=None,
    )
    api.include_router(_v1_routes(service), prefix="/v1", dependencies=[Depends(_key_guard(api_keys))])
    api.include_router(_service_routes(service, deployment, read_metrics or _own_metrics(service)))
    if has_ui:
        api.include_router(ui_routes(service, needs_key=bool(api_keys)))
    api.add_exception_handler(DraftlineError, _on_error)
    api.add_exception_handler(HTTPException, _on_http_exception)
    api.add_exception_handler(ClientDisconnect, _on_client_gone)
    api.add_exception_handler(Exception, _on_error)
    api.add_middleware(Edge, limits=limits or BodyLimits(max_bytes=_most_bytes(service.info.max_context)))
    describe = partial(
        openapi.document,
        api,
        model_name=service.info.model_name,
        has_keys=bool(api_keys),
        may_store=service.capture is not None,
    )
    api.openapi = cache(describe)  # type: ignore[method-assign]
    return api


def _most_bytes(max_context: int) -> int:
    # An id takes 8 bytes, a token of text about 4, or 24 where each character is escaped.
    return max(1024 * 1024, 32 * max_context)


def _v1_routes(service: CompletionService) -> APIRouter:
    router = APIRouter()

    posted = openapi.failures(openapi.POST_FAILURES)

    @router.post(
        "/chat/completions",
        response_model=ChatResponse,
        responses={**openapi.answers(ChatChunk), **posted},
        openapi_extra=openapi.request_body(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        document = await _read(request, ChatRequest)
        job = await service.start_chat(document)
        renderer = ChatRenderer(job, service.text, with_logprobs=document.wants_logprobs)
        return await _answer(request, service, document, job, renderer)

    @router.post(
        "/completions",
        response_model=CompletionResponse,
        responses={**openapi.answers(CompletionResponse), **posted},
        openapi_extra=openapi.request_body(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        document = await _read(request, CompletionRequest)
        job = await service.start_completion(document)
        renderer = CompletionRenderer(job, service.text, with_logprobs=document.wants_logprobs)
        return await _answer(request, service, document, job, renderer)

    @router.get("/models", responses=openapi.failures(openapi.GET_FAILURES))
    async def models() -> ModelList:
        return ModelList(data=[service.model_card()])

    @router.get("/models/{model_id:path}", responses=openapi.failures(openapi.GET_FAILURES))
    async def model(model_id: str) -> ModelCard:
        card = service.model_card()
        if model_id != card.id:
            raise UnknownModel(f"The model '{model_id}' is not served here; use '{card.id}'", param="model")
        return card

    return router


def _own_metrics(service: CompletionService) -> ReadMetrics:
    async def read(host: str) -> bytes:
        return service.worker.metrics.render()

    return read


def _service_routes(service: CompletionService, deployment: str, read_metrics: ReadMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=Health, responses=openapi.failures((503,)))
    async def health() -> Response:
        if service.worker.is_healthy:
            return JSONResponse(Health(draft=service.info.draft).model_dump())
        failure = service.worker.failure
        why = f"the engine failed ({type(failure).__name__})" if failure else "the engine is not running"
        return _respond(plain_status(503, f"Not healthy: {why}"))

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> Response:
        return Response(await read_metrics(request.url.hostname or ""), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__, **({"deployment": deployment} if deployment else {})}

    return router


async def _answer(
    request: Request, service: CompletionService, document: SamplingFields, job: Job, renderer: Renderer
) -> Response:
    if document.stream:
        return EventStream(job, _events(service, document, job, renderer))
    try:
        return await _collect_unless_gone(request, service, job, renderer)
    finally:
        job.generation.close()


async def _collect_unless_gone(request: Request, service: CompletionService, job: Job, renderer: Renderer) -> Response:
    """The whole answer, or nothing as soon as the client has hung up."""
    collecting = asyncio.ensure_future(_collect(service, job, renderer))
    watching = asyncio.ensure_future(_until_disconnect(request))
    try:
        await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientDisconnect
        return await collecting
    finally:
        for task in (collecting, watching):
            task.cancel()
        await asyncio.gather(collecting, watching, return_exceptions=True)


async def _collect(service: CompletionService, job: Job, renderer: Renderer) -> Response:
    pieces = [piece async for piece in job.generation.pieces()]
    document = renderer.whole(merge(pieces, job.generation.num_choices), service.usage(job), service.metrics(job))
    return Response(document.model_dump_json(), media_type="application/json")


async def _until_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    service: CompletionService, document: SamplingFields, job: Job, renderer: Renderer
) -> AsyncIterator[str]:
    try:
        for chunk in renderer.opening(job.generation.num_choices):
            yield _event(chunk.model_dump_json())
        async for piece in job.generation.pieces():
            chunk = renderer.chunk(piece)
            if document.wants_origins:
                chunk.draftline = origins(piece)
            yield _event(chunk.model_dump_json())
        if document.wants_usage_chunk:
            yield _event(renderer.closing(service.usage(job), service.metrics(job)).model_dump_json())
    except DraftlineError as error:
        # The status line is long gone; OpenAI clients raise on an event that holds an error.
        yield _event(json.dumps(to_http(error).document()))
    yield _event("[DONE]")


def _event(data: str) -> str:
    return f"data: {data}\n\n"


class Health(BaseModel):
    """Answer of ``GET /health`` while requests can be answered."""

    status: Literal["ok"] = "ok"
    draft: str | None


class EventStream(StreamingResponse):
    """Server-sent events that free the engine's slots however the response ends."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; also called when the client is gone before the first event."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.generation.close()


async def _read(request: Request, kind: type[RequestType]) -> RequestType:
    # The edge has bounded the body and waited for all of it.
    body = await request.body()
    try:
        parsed = kind.model_validate_json(body)
        # The parser keeps the last of two equal names; which one was meant is not ours to guess.
        json.loads(body, object_pairs_hook=_refuse_twins)
        return parsed
    except ValidationError as error:
        raise from_validation(error) from None
    except RecursionError:
        raise BadRequest("The request body is nested too deeply") from None


def _refuse_twins(pairs: list[tuple[str, object]]) -> None:
    if len(dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"'{twin}' is given more than once in one object. Remove all but one of them", param=twin)


def _key_guard(api_keys: Sequence[str]) -> Any:
    accepted = [key.encode() for key in api_keys]

    async def guard(authorization: Annotated[str | None, Header()] = None) -> None:
        if not accepted:
            return
        scheme, _, key = (authorization or "").partition(" ")
        # Every key is compared, in constant time, so that timing tells nothing.
        matches = [hmac.compare_digest(key.strip().encode(), known) for known in accepted]
        if scheme.lower() != "bearer" or not any(matches):
            raise InvalidApiKey("A valid API key is needed: send 'Authorization: Bearer KEY'")

    return guard


def _respond(error: HttpError) -> JSONResponse:
    return JSONResponse(error.document(), status_code=error.status, headers=error.headers)


async def _on_error(request: Request, error: Exception) -> Response:
    answer = to_http(error)
    if answer.status >= 500:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _respond(answer)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    answer = plain_status(status, f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}")
    # Which methods a 405 would have allowed.
    answer.headers.update(getattr(error, "headers", None) or {})
    return _respond(answer)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    # Nobody reads this; 499 is what proxies log for it.
    return Response(status_code=499)
