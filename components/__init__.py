"""KFP components: one folder a station, each a thin shim around :mod:`components.runtime`."""
