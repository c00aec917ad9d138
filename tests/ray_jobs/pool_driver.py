"""Run by ``test_pool.py`` in a process of its own: shards over actors that die, fail or refuse to start."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import ray

from draftline.errors import DraftlineError, InputError, TargetError
from ray_jobs.pool import map_shards


@ray.remote
class Worker:
    """Notes every attempt in a file, and does what the shard's name says."""

    def __init__(self, folder: str, mood: str) -> None:
        self._folder = Path(folder)
        if mood == "refuses":
            raise TargetError("no such target", remedy="Choose another")

    def run(self, shard: str) -> str:
        """See :class:`Worker`."""
        with open(self._folder / shard, "a", encoding="ascii") as handle:
            handle.write("x")
        attempts = (self._folder / shard).stat().st_size
        if (shard == "dies-once" and attempts == 1) or shard == "dies-always":
            os._exit(1)
        if shard == "fails":
            raise InputError("a bad shard", got=shard)
        return f"{shard}:{attempts}"


def main(folder: str, mood: str, shards: list[str]) -> dict[str, object]:
    """Map the shards; what came back, or the error."""
    ray.init(address=os.environ["RAY_ADDRESS"], logging_level=logging.ERROR, log_to_driver=False)
    done: dict[str, str] = {}
    try:
        map_shards(Worker, (folder, mood), shards, workers=2, num_cpus=1, on_done=done.__setitem__)
    except DraftlineError as error:
        return {"done": done, "error": [type(error).__name__, str(error)]}
    finally:
        ray.shutdown()
    return {"done": done, "error": None}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], sys.argv[3:])))
