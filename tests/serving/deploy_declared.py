"""``CONFIG.json``: deploy what a RayService declares, as KubeRay does; ``down NAME``: take it down.

A process of its own, like ``deploy_scripted``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

if __name__ == "__main__":
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    if sys.argv[1] == "down":
        serve.delete(sys.argv[2])
    else:
        config = json.loads(Path(sys.argv[1]).read_text())
        serve.start(proxy_location="HeadOnly", http_options=config["http_options"])
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)
        applications = serve.status().applications
        print(json.dumps({name: list(application.deployments) for name, application in applications.items()}))
