"""Capture actors feed trainers through Ray's object store: one hub hands out shards and keeps the back-pressure.

The hub moves references only. A shard's bytes lie in the object store of the
node that captured it, and are read in place by trainers on that node. They are
freed when the hub and the last trainer have let go of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from draftline.cache.manifest import STREAM_KIND, Manifest, ShardInfo
from draftline.cache.order import WINDOW_SHARDS
from draftline.cache.schedule import CaptureSchedule
from draftline.cache.source import SampleSource
from draftline.cache.stream import StreamOrder, StreamSource
from draftline.errors import DraftlineError, StepError
from draftline.steps import StepContext
from ray_jobs.capture import CaptureWorker
from ray_jobs.pool import own_error

_ATTEMPTS = 3
_MAX_WAITING = 1000
TRAIN = "train"


@dataclass
class _Split:
    """Captures of one split.

    Attributes:
        shards: Token shards, in the manifest's order.
        schedule: What is captured next.
        refs: References to what is held.
        waiting: Who waits for a shard.
    """

    shards: tuple[ShardInfo, ...]
    schedule: CaptureSchedule
    refs: dict[int, Any] = field(default_factory=dict)
    waiting: dict[int, list[asyncio.Future[None]]] = field(default_factory=dict)


@ray.remote
class CaptureHub:
    """Owns the capture actors of one training run and what they have captured.

    Args:
        context: Of the draft step.
        num_cpus: Logical CPUs of each capture actor.
    """

    def __init__(self, context: StepContext, num_cpus: float) -> None:
        hidden = context.inputs["hidden-states"]
        manifest = Manifest.from_json(hidden.outputs, kind=STREAM_KIND)
        self._arguments = (context, str(hidden.outputs["source"]))
        self._num_cpus = num_cpus
        self._idle = [self._new_actor() for _ in range(context.spec.cache.workers)]
        self._splits = {
            split: _new_split(context, manifest, split) for split in {info.split: None for info in manifest.shards}
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_captures: dict[str, int] = dict.fromkeys(self._splits, 0)
        self._most_in_flight = 0

    async def fetch(self, split: str, reader: int, window: int, shard: int) -> list[Any]:
        """A reference to a captured shard, alone in a list so that nobody copies what it stands for.

        Raises:
            DraftlineError: why it cannot be captured.
        """
        state = self._splits[split]
        while not state.schedule.ask(reader, window, shard):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            state.waiting.setdefault(shard, []).append(waiter)
            self._advance()
            await waiter
        ref = state.refs[shard]
        self._advance()
        return [ref]

    async def leave(self, split: str, reader: int) -> None:
        """A reader needs nothing of a split until it fetches again."""
        self._splits[split].schedule.leave(reader)
        self._advance()

    async def figures(self) -> dict[str, float]:
        """Captures so far by split (``captures_train``, ...), and the most shards of ``train`` in flight together."""
        captures = {f"captures_{split}": float(count) for split, count in self._num_captures.items()}
        return {**captures, "most_in_flight": float(self._most_in_flight)}

    def _new_actor(self) -> Any:
        worker: Any = CaptureWorker
        return worker.options(num_cpus=self._num_cpus).remote(*self._arguments)

    def _advance(self) -> None:
        """Drop what is over, and give idle actors what is next."""
        for split, state in self._splits.items():
            for over in state.schedule.drop():
                del state.refs[over]
            while self._idle and (shard := state.schedule.next_capture()) is not None:
                task = asyncio.get_running_loop().create_task(self._capture(split, shard, self._idle.pop()))
                # The loop itself holds tasks weakly.
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        self._most_in_flight = max(self._most_in_flight, self._splits[TRAIN].schedule.num_in_flight)

    async def _capture(self, split: str, shard: int, actor: Any) -> None:
        state = self._splits[split]
        error: Exception | None = None
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                done, data = actor.stream.options(num_returns=2).remote(state.shards[shard])
                # Only the first answer is fetched: the second is the shard itself.
                await done
                state.refs[shard] = data
                error = None
                break
            except ray.exceptions.RayTaskError as failure:
                error = own_error(failure)
                break
            except ray.exceptions.RayActorError as failure:
                if failure.actor_init_failed:
                    error = own_error(failure.args[0] if failure.args else failure)
                    break
                error = _died(state.shards[shard].name, attempt, failure)
                actor = self._new_actor()
        self._idle.append(actor)
        self._num_captures[split] += 1
        waiters = state.waiting.pop(shard, [])
        if error is None:
            state.schedule.captured(shard)
        else:
            state.schedule.failed(shard)
        for waiter in waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
        self._advance()


class HubFeed:
    """One trainer's view of one split in the hub. Implements :class:`draftline.cache.stream.ShardFeed`.

    Args:
        hub: Handle of a :class:`CaptureHub`.
        split: Which split.
        reader: This trainer's rank.
    """

    def __init__(self, hub: Any, split: str, reader: int) -> None:
        self._hub = hub
        self._split = split
        self._reader = reader

    def fetch(self, window: int, shard: int) -> memoryview:
        """See :meth:`ShardFeed.fetch`."""
        try:
            (ref,) = ray.get(self._hub.fetch.remote(self._split, self._reader, window, shard))
            return memoryview(ray.get(ref))
        except ray.exceptions.RayTaskError as error:
            raise own_error(error) from None
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            raise StepError(
                "the captures that feed training were lost",
                got=str(error).splitlines()[0],
                remedy="Start the same run again: training goes on from its newest checkpoint",
            ) from None

    def leave(self) -> None:
        """See :meth:`ShardFeed.leave`."""
        self._hub.leave.remote(self._split, self._reader)


def capture_figures(hub: Any) -> dict[str, float]:
    """What a run's hub has captured so far, see :meth:`CaptureHub.figures`; nothing without a hub."""
    return {} if hub is None else ray.get(hub.figures.remote())


@contextmanager
def running_hub(context: StepContext, num_cpus: float) -> Iterator[Any]:
    """The hub of one training run, ended with its capture actors when the block ends; ``None`` in mode ``store``.

    Args:
        context: Of the draft step.
        num_cpus: Logical CPUs of each capture actor; the hub itself needs none.
    """
    if not num_capture_workers(context):
        yield None
        return
    actor: Any = CaptureHub
    hub = actor.options(num_cpus=0, max_concurrency=_MAX_WAITING).remote(context, num_cpus)
    try:
        yield hub
    finally:
        ray.kill(hub)


def num_capture_workers(context: StepContext) -> int:
    """How many capture actors the draft step needs beside its trainers: none where a cache is read."""
    is_stream = context.inputs["hidden-states"].outputs.get("kind") == STREAM_KIND
    return context.spec.cache.workers if is_stream else 0


def open_stream(hub: Any, context: StepContext, split: str, reader: int) -> SampleSource | None:
    """The samples of a split, or ``None`` where it has none.

    Args:
        hub: From :func:`running_hub`.
        context: Of the draft step.
        split: Which split.
        reader: This trainer's rank.
    """
    shards = Manifest.from_json(context.inputs["hidden-states"].outputs, kind=STREAM_KIND).of_split(split)
    if not shards:
        return None
    feed = HubFeed(hub, split, reader)
    keep_samples = 0 if split == TRAIN else context.spec.train.validation_samples
    return StreamSource(feed, shards, context.spec.seed, keep_samples=keep_samples)


def _new_split(context: StepContext, manifest: Manifest, split: str) -> _Split:
    shards = manifest.of_split(split)
    order = StreamOrder([info.num_samples for info in shards], context.spec.seed)
    # Trainers keep the few samples that they validate on, and seldom come for more: nothing is captured ahead.
    max_held = WINDOW_SHARDS + context.spec.cache.stream_ahead_shards if split == TRAIN else 0
    schedule = CaptureSchedule(order.shards, num_readers=context.spec.train.num_workers, max_held=max_held)
    return _Split(shards, schedule)


def _died(name: str, attempt: int, error: Exception) -> DraftlineError:
    return StepError(
        f"the worker that captures {name} died {attempt} times",
        got=str(error).splitlines()[0],
        remedy="Usually memory: lower cache.workers or tokens.shard_tokens",
    )
