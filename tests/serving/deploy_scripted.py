"""``PORT OVERRIDES``: deploy replicas of the scripted engine; ``down``: take the endpoint down.

A process of its own, like the deploy station's: Ray reads its environment when
it is imported, and pytest's process must stay free of it.
"""

from __future__ import annotations

import json
import sys

from draftline.spec import derive, recipe
from serving.deploy import deploy, undeploy
from serving.replica import ReplicaConfig
from tests.serving.scripted_replica import start_scripted

if __name__ == "__main__":
    if sys.argv[1] == "down":
        undeploy()
    else:
        spec = derive(recipe("smollm2-135m"), json.loads(sys.argv[2]))
        deploy(ReplicaConfig(spec), port=int(sys.argv[1]), start=start_scripted)
