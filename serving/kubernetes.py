"""The Serve application as a ``RayService`` declares it: an import path and plain arguments, and no driver.

KubeRay hands the arguments to Serve, which calls :func:`build` on the
cluster. They hold the run spec's parts ``target`` and ``serving`` themselves,
not a mounted file: a changed argument is a changed ``serveConfigV2``, which
Serve takes over in the running cluster, while a changed file goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from draftline.errors import SpecError
from draftline.spec import RunSpec, build_spec
from serving.replica import ReplicaConfig

if TYPE_CHECKING:
    from ray import serve

_SPEC_PARTS = ("target", "serving")


class Arguments(BaseModel):
    """What stands in ``args`` beside the spec's parts; see :class:`serving.replica.ReplicaConfig`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    draft_uri: str | None = None
    tracking_uri: str | None = None
    cache_dir: Path | None = None
    num_threads: PositiveInt = 2
    poll_s: PositiveFloat = 20.0
    api_keys_file: Path | None = None


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application for ``import_path: serving.kubernetes:build``.

    Resources of a replica are set in the declaration's ``deployments``, its
    number follows from ``serving.min_replicas`` and ``serving.max_replicas``.

    Args:
        args: ``target`` and ``serving`` (parts of a run spec), and the fields of :class:`Arguments`.

    Raises:
        SpecError: an unknown key or an impossible value.
    """
    # Ray Serve takes seconds to import; reading arguments needs none of it.
    config = read_arguments(args)
    if config.spec.serving.engine == "vllm":
        from serving.vllm.app import build_vllm_app, plan_app

        application: serve.Application = build_vllm_app(plan_app(config))
        return application
    from serving.app import build_app

    return build_app(config)


def read_arguments(args: Mapping[str, Any]) -> ReplicaConfig:
    """The configuration that the arguments stand for; errors as :func:`build`."""
    spec: RunSpec = build_spec(
        {name: args[name] for name in _SPEC_PARTS if name in args}, origin="the Serve config's args"
    )
    try:
        rest = Arguments.model_validate({name: value for name, value in args.items() if name not in _SPEC_PARTS})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise SpecError(
            f"the Serve config's args are wrong at {where!r}",
            got=problem["msg"],
            expected=", ".join((*_SPEC_PARTS, *Arguments.model_fields)),
        ) from None
    return ReplicaConfig(spec=spec, **dict(rest))
