"""How Hypothesis runs here. A pytest plugin.

No deadline, and no health check of speed: examples run on machines that are
shared with other work, where any of them may take long. In CI the examples are always the same,
so that a red run is about the change; on a developer's machine they vary.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
