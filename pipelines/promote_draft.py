"""The pipeline ``promote-draft``: a registered draft becomes champion without being trained anew."""

from typing import Any

from kfp import dsl

from components.image import DEFAULT_IMAGE
from components.promote.component import promote
from pipelines.training_steps import Knobs, equip, knobs_of, show_endpoint


@dsl.pipeline(
    name="draftline-promote-draft",
    description="Make a registered draft model the champion, if the gate lets it through.",
)
def promote_draft(
    model: str,
    version: str = "challenger",
    reason: str = "",
    force: bool = False,
    image: str = DEFAULT_IMAGE,
    config_map: str = "draftline",
    s3_secret: str = "draftline-s3",
    mlflow_secret: str = "draftline-mlflow",
    hf_secret: str = "draftline-hf",
    light_cpu: str = "1",
    light_memory: str = "4Gi",
    node_selector: dict[str, str] = {},  # noqa: B006 - kfp compiles it, nobody changes it
    tolerations: list[dict[str, Any]] = [],  # noqa: B006
) -> None:
    """Make a registered draft the champion and wait until the endpoint uses it.

    Args:
        model: Registered model.
        version: A version or an alias.
        reason: Kept in the audit trail.
        force: Overrule the gate; needs a reason.
        image: Image of the step.
        config_map: ConfigMap with the addresses.
        s3_secret: Secret with accesskey and secretkey; may be missing where pods have an identity.
        mlflow_secret: Secret with username and password, or token; may be missing where MLflow asks for none.
        hf_secret: Secret with token; not used here, may be missing.
        light_cpu: CPUs of the step's pod.
        light_memory: Memory of the step's pod.
        node_selector: Of the step's pod.
        tolerations: Of the step's pod.
    """
    knobs = knobs_of(Knobs, locals())
    promote_task = promote(model=model, version=version, reason=reason, force=force)
    equip([promote_task], knobs)
    show_endpoint([promote_task], knobs)
