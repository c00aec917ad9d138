"""How Hypothesis runs here. A pytest plugin.

No deadline: examples of a property run on a machine that is shared with other
work, where any of them may take long. In CI the examples are always the same,
so that a red run is about the change; on a developer's machine they vary.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
