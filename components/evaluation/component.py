"""KFP component of the station ``evaluation``: measure one suite."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def evaluation(
    spec_uri: str,
    workspace: str,
    cpu: str,
    memory: str,
    gpu_type: str,
    gpu_count: str,
    num_workers: str,
    ray_job: dict,
    suite: str,
    prompts: Input[Dataset],
    draft: Input[Model],
    calibration: Input[Artifact],
    result: Output[Artifact],
    metrics: Output[Metrics],
    page: Output[HTML],
) -> None:
    """Measure acceptance, speed-up and losslessness on one suite.

    Args:
        spec_uri: Path or object URI of the resolved run spec (YAML).
        workspace: URI of the workspace.
        cpu: CPUs of each worker of the step's RayJob.
        memory: Memory of each.
        gpu_type: Resource name of its accelerator.
        gpu_count: Accelerators of each.
        num_workers: Workers.
        ray_job: Further settings of the RayJob (components/cluster/settings.py); empty computes in the step's pod.
        suite: Name of the suite to measure.
        prompts: Result of the station prompts.
        draft: Result of the station draft.
        calibration: Result of the station calibration.
        result: Receives the step's result (JSON) and a summary as metadata.
        metrics: Receives the step's numbers for the KFP page.
        page: Receives the suite's tables and plots for the KFP page.
    """
    from components.runtime import run_station

    run_station(
        "evaluation",
        spec_uri,
        workspace,
        {"prompts": prompts, "draft": draft, "calibration": calibration},
        result=result,
        item=suite,
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
