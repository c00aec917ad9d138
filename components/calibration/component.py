"""KFP component of the station ``calibration``: fit the draft's confidences."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def calibration(
    spec_uri: str,
    workspace: str,
    cpu: str,
    memory: str,
    gpu_type: str,
    gpu_count: str,
    num_workers: str,
    ray_job: dict,
    prompts: Input[Dataset],
    draft: Input[Model],
    result: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
) -> None:
    """Fit the draft's confidences and profile the step cost.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        cpu: CPUs of each worker of the step's RayJob.
        memory: Memory of each.
        gpu_type: Resource name of its accelerator.
        gpu_count: Accelerators of each.
        num_workers: Workers.
        ray_job: Further settings of the RayJob (components/cluster/settings.py); empty computes in the step's pod.
        prompts: Result of the station prompts.
        draft: Result of the station draft.
        result: Receives the step's result (JSON) and a summary as metadata.
        metrics: Receives the step's numbers for the KFP page.
        page: Receives the reliability diagram and the cost of a step for the KFP page.
    """
    from components.runtime import run_station

    run_station(
        "calibration",
        spec_uri,
        workspace,
        {"prompts": prompts, "draft": draft},
        result=result,
        metrics=metrics,
        page=page,
        job=ray_job
        and {
            **ray_job,
            "cpu": cpu,
            "memory": memory,
            "gpu_type": gpu_type,
            "gpu_count": gpu_count,
            "num_workers": num_workers,
        },
    )
