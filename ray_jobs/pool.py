"""Shards over an actor pool: the unit of progress, of retry and of resume."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray

from draftline.errors import DraftlineError, StepError

_ATTEMPTS = 3


def map_shards(
    actor_class: Any,
    arguments: tuple[Any, ...],
    shards: Sequence[Any],
    *,
    workers: int,
    num_cpus: float,
    on_done: Callable[[Any, Any], None],
) -> None:
    """Call ``actor.run(shard)`` for every shard, a few at a time.

    A killed actor is started again and its shard repeated, which is safe
    because a shard's bytes depend on the shard alone.

    Args:
        actor_class: A class decorated with ``ray.remote`` that has ``run``.
        arguments: Of its constructor.
        shards: The work, in order.
        workers: Actors at most.
        num_cpus: Logical CPUs of each actor.
        on_done: Called with the shard and what ``run`` returned, in order of finishing.

    Raises:
        DraftlineError: what ``run`` raised.
        StepError: an actor died again and again on one shard.
    """
    pending = deque((shard, 1) for shard in shards)
    actors = [actor_class.options(num_cpus=num_cpus).remote(*arguments) for _ in range(min(workers, len(shards)))]
    idle = list(actors)
    running: dict[Any, tuple[Any, Any, int]] = {}
    try:
        while pending or running:
            while pending and idle:
                actor, (shard, attempt) = idle.pop(), pending.popleft()
                running[actor.run.remote(shard)] = (actor, shard, attempt)
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            actor, shard, attempt = running.pop(ready)
            try:
                on_done(shard, ray.get(ready))
            except ray.exceptions.RayTaskError as error:
                raise own_error(error) from None
            except ray.exceptions.RayActorError as error:
                if error.actor_init_failed:
                    # Its constructor raised: another attempt would end alike. Ray keeps the error as the only argument.
                    raise own_error(error.args[0] if error.args else error) from None
                if attempt == _ATTEMPTS:
                    raise StepError(
                        f"the worker of shard {shard!r} died {attempt} times",
                        got=str(error).splitlines()[0],
                        remedy="Usually memory: lower responses.shard_prompts or the number of workers",
                    ) from None
                pending.appendleft((shard, attempt + 1))
                actor = actor_class.options(num_cpus=num_cpus).remote(*arguments)
                actors.append(actor)
            idle.append(actor)
    finally:
        for actor in actors:
            ray.kill(actor)


def own_error(error: Any) -> Exception:
    """What the worker itself raised, when it is an error for users; else Ray's report of it."""
    cause = getattr(error, "cause", None)
    own: Exception = cause if isinstance(cause, DraftlineError) else error
    return own
