"""Fixtures for all tests come from plugins, one module per kind of server."""

pytest_plugins = [
    "tests.plugins.golden",
    "tests.plugins.hypothesis_profile",
    "tests.plugins.order",
    "tests.plugins.process_wide",
    "tests.plugins.targets",
    "tests.servers.platform",
    "tests.servers.s3",
]
