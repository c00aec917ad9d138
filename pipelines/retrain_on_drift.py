"""The pipeline ``retrain-on-drift``: made to run again and again, trains only where a server reported drift."""

from typing import Any

from kfp import dsl

from components.drift.component import drift
from components.image import DEFAULT_IMAGE
from components.outcome.component import outcome
from pipelines.training_steps import DEFAULT_RAY_JOB, TrainingKnobs, add_training, equip, knobs_of


@dsl.pipeline(
    name="draftline-retrain-on-drift",
    description="Train a new draft model where servers reported that the champion drifted.",
)
def retrain_on_drift(
    spec_uri: str,
    workspace: str,
    suites: list[str],
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
    target_cpu: str = "8",
    target_memory: str = "32Gi",
    target_workers: str = "1",
    train_cpu: str = "8",
    train_memory: str = "64Gi",
    train_workers: str = "1",
    gpu_type: str = "nvidia.com/gpu",
    gpu_count: str = "1",
    ray_job: dict[str, Any] = DEFAULT_RAY_JOB,
) -> None:
    """Train a new draft model where servers reported that the champion drifted.

    Args:
        spec_uri: Object URI of the resolved run spec (YAML); its prompts.source is where live requests are kept.
        workspace: URI of the workspace, ``s3://bucket/prefix``.
        suites: Evaluation suites, those of the spec.
        force: Train in any case.
        image: Image of every step and of its jobs.
        config_map: ConfigMap with the addresses and what the chart has set up for jobs.
        s3_secret: Secret with accesskey and secretkey; may be missing where pods have an identity.
        mlflow_secret: Secret with username and password, or token; may be missing where MLflow asks for none.
        hf_secret: Secret with token, for a target that the Hugging Face hub guards; may be missing.
        light_cpu: CPUs of every step's own pod; heavy work is done by RayJobs.
        light_memory: Memory of every step's own pod.
        node_selector: Of every step's own pod.
        tolerations: Of every step's own pod.
        target_cpu: CPUs of each worker that runs the target.
        target_memory: Memory of each worker that runs the target.
        target_workers: Workers that answer prompts and capture hidden states.
        train_cpu: CPUs of each training worker.
        train_memory: Memory of each training worker.
        train_workers: Training workers.
        gpu_type: Resource name of the accelerator.
        gpu_count: Accelerators of each worker.
        ray_job: Further settings of the RayJobs; empty computes in the steps' own pods.
    """
    knobs = knobs_of(TrainingKnobs, locals())
    outcome_task = outcome(spec_uri=spec_uri, workspace=workspace)
    with dsl.ExitHandler(outcome_task, name="whatever-happens"):
        drift_task = drift(spec_uri=spec_uri, force=force)
        with dsl.If(drift_task.outputs["Output"] == True, name="drifted"):  # noqa: E712 - builds a KFP condition
            add_training(spec_uri, workspace, suites, knobs)
    equip([drift_task, outcome_task], knobs)
