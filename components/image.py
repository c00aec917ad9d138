"""The container image that steps run in on a cluster."""

DEFAULT_IMAGE = "ghcr.io/draftline/draftline-python:0.1.0"
"""Default of the pipeline's ``image`` parameter; holds Draftline and kfp."""
