"""The embedded platform: MLflow and Ray as supervised processes on loopback.

:mod:`pipelines.embedded.platform` is the front door (``up``, ``status``,
``down``). Nothing is imported here on purpose: the supervisor processes load
this package and must stay small.
"""
