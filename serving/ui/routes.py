"""Routes of the page: a handful of files from memory, and the figures that it polls.

The page needs nothing from any other host, and its policy forbids it to ask:
scripts and styles come from here alone, none is inline, and the sinks that
turn text into markup are closed (Trusted Types), so that a model's answer
stays text whatever it says.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from serving.service import CompletionService

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Totals(BaseModel):
    """Counters since the replica started; the page makes rates of their differences.

    Attributes:
        num_steps: Decode steps, counted once for every sequence in them.
        num_output_tokens: Tokens that these steps emitted.
        num_draft_tokens: Draft tokens that they verified.
        num_accepted_tokens: Of those, accepted.
    """

    num_steps: int
    num_output_tokens: int
    num_draft_tokens: int
    num_accepted_tokens: int


class LoadFigures(BaseModel):
    """Answer of ``GET /ui/load``: what ``/metrics`` says, as the page needs it.

    Attributes:
        replica: Tells replicas apart; counters of different ones must not be mixed.
        clock_s: The replica's monotonic clock.
        model: Name for requests.
        draft: The draft in use.
        policy: How much of a block is verified.
        num_spec_tokens: Most draft tokens of one step.
        max_context: Prompt plus answer tokens of one request.
        needs_key: Whether ``/v1`` asks for an API key.
        num_running: Sequences in a slot.
        num_waiting: Sequences queued for one.
        kv_cache_usage: Share of cache positions in use, 0 to 1.
        totals: Counters.
    """

    replica: str
    clock_s: float
    model: str
    draft: str | None
    policy: str
    num_spec_tokens: int
    max_context: int
    needs_key: bool
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    totals: Totals


@dataclass(frozen=True)
class _File:
    body: bytes
    media_type: str
    etag: str


def ui_routes(service: CompletionService, *, needs_key: bool) -> APIRouter:
    """Routes below ``/ui``.

    They ask for no key: the files are no secret, and the figures are those of
    ``/metrics``. What the page sends to ``/v1`` is another matter.

    Args:
        service: Whose figures are shown.
        needs_key: Whether ``/v1`` asks for one; the page then has a field for it.
    """
    files = _read_files()
    replica = secrets.token_hex(4)
    router = APIRouter()

    @router.get("/ui", include_in_schema=False)
    async def to_page() -> Response:
        # Relative, so that it holds behind a proxy that serves this application under a prefix.
        return RedirectResponse("ui/", headers=SECURITY_HEADERS)

    @router.get("/ui/load")
    async def load() -> LoadFigures:
        return _figures(service, replica, needs_key=needs_key)

    @router.get("/ui/{name:path}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        found = files.get(name or "index.html")
        if found is None:
            raise HTTPException(404, "there is no such file")
        # The page and its parts must be of one version: the browser keeps them, and asks each time.
        headers = {**SECURITY_HEADERS, "Cache-Control": "no-cache", "ETag": found.etag}
        if request.headers.get("if-none-match") == found.etag:
            return Response(status_code=304, headers=headers)
        return Response(found.body, media_type=found.media_type, headers=headers)

    return router


def _figures(service: CompletionService, replica: str, *, needs_key: bool) -> LoadFigures:
    info, load, totals = service.info, service.worker.load(), service.worker.metrics.totals
    return LoadFigures(
        replica=replica,
        clock_s=time.monotonic(),
        model=info.model_name,
        draft=info.draft,
        policy=info.policy,
        num_spec_tokens=info.num_spec_tokens,
        max_context=info.max_context,
        needs_key=needs_key,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        kv_cache_usage=load.kv_cache_usage,
        totals=Totals(
            num_steps=totals.num_steps,
            num_output_tokens=totals.num_output_tokens,
            num_draft_tokens=totals.num_draft_tokens,
            num_accepted_tokens=totals.num_accepted_tokens,
        ),
    )


def _read_files() -> dict[str, _File]:
    found = {}
    for entry in (resources.files("serving.ui") / "static").iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in MEDIA_TYPES:
            body = entry.read_bytes()
            found[entry.name] = _File(body, MEDIA_TYPES[suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"')
    return found
