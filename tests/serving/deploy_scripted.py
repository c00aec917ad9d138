"""``PORT OVERRIDES [FOLDER]``: deploy replicas of the scripted engine; ``down``: take the endpoint down.

With a folder, replicas have loaded when they are told so there. ``watch``
prints how many replicas take requests, five times a second.

A process of its own, like the deploy station's: Ray reads its environment when
it is imported, and pytest's process must stay free of it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path

from draftline.spec import derive, recipe
from serving.deploy import APP, deploy, undeploy
from serving.replica import ReplicaConfig
from tests.serving.scripted_replica import start_scripted


def watch() -> None:
    """Print the number of running replicas until somebody ends this."""
    import ray
    from ray import serve

    from serving.app import DEPLOYMENT

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
    while True:
        application = serve.status().applications.get(APP)
        states = application.deployments[DEPLOYMENT].replica_states if application else {}
        print(int(states.get("RUNNING", 0)), flush=True)
        time.sleep(0.2)


if __name__ == "__main__":
    if sys.argv[1] == "down":
        undeploy()
    elif sys.argv[1] == "watch":
        watch()
    else:
        spec = derive(recipe("smollm2-135m"), json.loads(sys.argv[2]))
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
        deploy(ReplicaConfig(spec, cache_dir=folder), port=int(sys.argv[1]), start=start_scripted)
