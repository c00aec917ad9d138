"""Building an image takes minutes and the network: it is asked for by `make test-images` alone."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("DRAFTLINE_TEST_IMAGES") else ["test_build.py", "test_serve_build.py"]
