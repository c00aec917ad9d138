"""KFP component of the station ``responses``: the target answers the prompts."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Output

from components.image import DEFAULT_IMAGE


@dsl.component(base_image=DEFAULT_IMAGE, install_kfp_package=False)
def responses(
    spec_uri: str,
    workspace: str,
    cpu: str,
    memory: str,
    gpu_type: str,
    gpu_count: str,
    num_workers: str,
    ray_job: dict,
    prompts: Input[Dataset],
    result: Output[Dataset],
) -> None:
    """Let the target answer every prompt.

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
        result: Receives the step's result (JSON) and a summary as metadata.
    """
    from components.runtime import run_station

    run_station(
        "responses",
        spec_uri,
        workspace,
        {"prompts": prompts},
        result=result,
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
