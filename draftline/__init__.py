"""Draftline: train, prove, register and serve speculative-decoding drafts.

The core package. It never imports ray, kfp, mlflow, kubernetes, vllm or
fastapi; those live in ``ray_jobs``, ``pipelines``, ``components`` and
``serving``, which build on it.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
