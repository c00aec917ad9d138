"""``PORT OVERRIDES [FOLDER]``: deploy replicas of the scripted engine; ``down``: take the endpoint down.

With a folder, replicas have loaded when they are told so there.

A process of its own, like the deploy station's: Ray reads its environment when
it is imported, and pytest's process must stay free of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from draftline.spec import derive, recipe
from serving.deploy import deploy, undeploy
from serving.replica import ReplicaConfig
from tests.serving.scripted_replica import start_scripted

if __name__ == "__main__":
    if sys.argv[1] == "down":
        undeploy()
    else:
        spec = derive(recipe("smollm2-135m"), json.loads(sys.argv[2]))
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
        deploy(ReplicaConfig(spec, cache_dir=folder), port=int(sys.argv[1]), start=start_scripted)
