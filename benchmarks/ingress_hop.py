"""What a chunk of a stream costs with an ingress deployment of its own, against one deployment for both.

``python -m benchmarks.ingress_hop`` starts a Ray on this machine, streams the
same chunks through Serve's proxy both ways, in turns, at an engine's pace (as
fast as they go, chunks would travel in bundles), and prints the medians of CPU
time per chunk over Ray's processes, with the ratio. Behind docs/adr/0032.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import AsyncIterator

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import httpx
import psutil
import ray
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

PORT = 18231
NUM_CHUNKS = 300
PACE_S = 0.01
NUM_STREAMS = 4
ROUNDS = 5
CHUNK = 'data: {"id":"cmpl-0123456789abcdef","choices":[{"index":0,"text":" three words here"}]}\n\n'

api = FastAPI()


async def _chunks() -> AsyncIterator[str]:
    for _ in range(NUM_CHUNKS):
        yield CHUNK
        await asyncio.sleep(PACE_S)


@serve.deployment(max_ongoing_requests=64)
@serve.ingress(api)
class Both:
    """Ingress and engine in one."""

    @api.get("/")
    async def stream(self) -> StreamingResponse:
        """All chunks."""
        return StreamingResponse(_chunks(), media_type="text/event-stream")


@serve.deployment(max_ongoing_requests=64)
class Engine:
    """The engine behind an ingress."""

    async def stream(self) -> AsyncIterator[str]:
        """All chunks."""
        async for chunk in _chunks():
            yield chunk


far = FastAPI()


@serve.deployment(max_ongoing_requests=64)
@serve.ingress(far)
class Ingress:
    """Passes on what the engine streams."""

    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine.options(stream=True)

    @far.get("/")
    async def stream(self) -> StreamingResponse:
        """All chunks, from the other deployment."""
        return StreamingResponse(self._engine.stream.remote(), media_type="text/event-stream")


def _cpu_s() -> float:
    family = [p for p in psutil.Process().children(recursive=True) if "ray::" in " ".join(p.cmdline())]
    return sum(sum(p.cpu_times()[:2]) for p in family)


async def _read(url: str) -> int:
    async with httpx.AsyncClient(timeout=120) as client, client.stream("GET", url) as response:
        return sum([len(part) async for part in response.aiter_bytes()])


def measure(url: str) -> float:
    """Microseconds of CPU time per chunk."""

    async def load() -> list[int]:
        return await asyncio.gather(*[_read(url) for _ in range(NUM_STREAMS)])

    cpu_s = _cpu_s()
    sizes = asyncio.run(load())
    assert sizes == [NUM_CHUNKS * len(CHUNK)] * NUM_STREAMS
    return (_cpu_s() - cpu_s) / (NUM_STREAMS * NUM_CHUNKS) * 1e6


def main() -> None:
    """Measure and print."""
    ray.init(num_cpus=8, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Both.bind(), name="both", route_prefix="/both")
    serve.run(Ingress.bind(Engine.bind()), name="apart", route_prefix="/apart")
    found: dict[str, list[float]] = {"both": [], "apart": []}
    for round_number in range(ROUNDS + 1):
        for name, measured in found.items():
            value = measure(f"http://127.0.0.1:{PORT}/{name}/")
            if round_number:
                measured.append(value)
    both, apart = (statistics.median(values) for values in found.values())
    print(f"both {both:.0f} us, apart {apart:.0f} us of CPU per chunk; apart / both: {apart / both:.2f}")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
