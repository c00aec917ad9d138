"""What pipelines have in common: the training steps, and what each step gets of a cluster.

Shapes that look odd and why (kfp 2.17.3; each is held by a test):

* Results travel as artifacts: inside a ParallelFor the local runner replaces
  parameter outputs of outer tasks by the loop item.
* The gate's verdict is its only parameter output and unnamed: the local
  runner cannot resolve a condition on a named one.
* Suites run one at a time (``parallelism=1``): they are timed.
* Resources given as parameters are registered by hand: inside a condition, an
  exit handler or a ParallelFor the compiler otherwise refers to inputs that the
  sub-DAG lacks.
* KFP's cache is off: the workspace's ledger knows what is done, and stations
  with effects (register, gate, deploy) must always run.

Heavy steps compute in RayJobs. Their pods only wait, so they ask for as little
as the light steps; the sizes of targets and training are the jobs'.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl import PipelineTask

from components.calibration.component import calibration
from components.deploy.component import deploy
from components.draft.component import draft
from components.evaluation.component import evaluation
from components.gate.component import gate
from components.hidden_states.component import hidden_states
from components.prompts.component import prompts
from components.register.component import register
from components.report.component import report
from components.responses.component import responses
from components.tokens.component import tokens

CONFIG_ENV = {
    "mlflow-tracking-uri": "MLFLOW_TRACKING_URI",
    "s3-endpoint-url": "AWS_ENDPOINT_URL_S3",
    "s3-region": "AWS_DEFAULT_REGION",
}
"""Keys of the config map and the variables that every step reads."""

ENDPOINT_ENV = {"serving-endpoint": "DRAFTLINE_ENDPOINT", "ray-address": "RAY_ADDRESS"}
"""The config map's keys for the deploy step alone: the endpoint that follows the champion, or a Ray to start one on."""

JOB_ENV = {
    "job-service-account": "DRAFTLINE_JOB_SERVICE_ACCOUNT",
    "job-priority-class": "DRAFTLINE_JOB_PRIORITY_CLASS",
    "kueue-queue": "DRAFTLINE_KUEUE_QUEUE",
}
"""The config map's keys for heavy steps: what the chart has set up for their RayJobs."""

POD_ENV = {"DRAFTLINE_POD": "metadata.name", "DRAFTLINE_NAMESPACE": "metadata.namespace"}
"""How a step that uses the Kubernetes API knows itself: its jobs take over its image and references to secrets."""

DEFAULT_RAY_JOB: dict[str, Any] = {
    "head_cpu": "2",
    "head_memory": "16Gi",
    "shared_memory": "8Gi",
    "ray_version": "2.60.0",
    "auth": "token",
    "queue": "",
    "priority_class": "",
    "service_account": "",
    "node_selector": {},
    "tolerations": [],
    "spot": False,
    "retries": 2,
    "backoff_limit": 0,
    "deadline_s": 7 * 24 * 3600,
    "start_deadline_s": 0,
    "ttl_s": 3600,
    "unreachable_s": 300,
}
"""The parameter ``ray_job``, see :class:`components.cluster.settings.JobSettings`; empty texts mean the chart's."""

S3_SECRET_ENV = {"accesskey": "AWS_ACCESS_KEY_ID", "secretkey": "AWS_SECRET_ACCESS_KEY"}
"""Keys of the secret (as KFP's own object-store secret names them) and the variables that boto3 reads."""

MLFLOW_SECRET_ENV = {
    "username": "MLFLOW_TRACKING_USERNAME",
    "password": "MLFLOW_TRACKING_PASSWORD",
    "token": "MLFLOW_TRACKING_TOKEN",
}
"""Keys of the secret and the variables that MLflow's client reads; a user with a password, or a token."""

HF_SECRET_ENV = {"token": "HF_TOKEN"}
"""Key of the secret and the variable that the Hugging Face hub's client reads."""


def _read_config_map(tasks: Iterable[PipelineTask], name: str, key_to_env: Mapping[str, str]) -> None:
    """Give steps the cluster's addresses, as far as the config map exists and has them."""
    for task in tasks:
        kubernetes.use_config_map_as_env(
            task, config_map_name=name, config_map_key_to_env=dict(key_to_env), optional=True
        )


def _read_secret(tasks: Iterable[PipelineTask], name: str, key_to_env: Mapping[str, str]) -> None:
    """Give steps credentials, as far as the secret exists and has them."""
    for task in tasks:
        kubernetes.use_secret_as_env(task, secret_name=name, secret_key_to_env=dict(key_to_env), optional=True)


def _request(tasks: Iterable[PipelineTask], cpu: str, memory: str) -> None:
    """Ask for CPUs and memory and be held to them."""
    for task in tasks:
        task.set_cpu_request(cpu).set_cpu_limit(cpu).set_memory_request(memory).set_memory_limit(memory)
        task.register_pipeline_channels([cpu, memory])


def _share_memory(tasks: Iterable[PipelineTask]) -> None:
    """Room for Ray's object store, for a heavy step that computes in its own pod."""
    for task in tasks:
        kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory")


def _place(tasks: Iterable[PipelineTask], node_selector: dict[str, str], tolerations: list[dict[str, Any]]) -> None:
    """Which nodes the steps' pods may run on."""
    for task in tasks:
        kubernetes.add_node_selector_json(task, node_selector)
        kubernetes.add_toleration_json(task, tolerations)
        task.register_pipeline_channels([node_selector, tolerations])


def _introduce(tasks: Iterable[PipelineTask]) -> None:
    """Tell steps which pod they are."""
    for task in tasks:
        for variable, path in POD_ENV.items():
            kubernetes.use_field_path_as_env(task, env_name=variable, field_path=path)


@dataclass(frozen=True)
class Knobs:
    """A pipeline's parameters beside what it works on; described where the pipelines declare them."""

    image: str
    config_map: str
    s3_secret: str
    mlflow_secret: str
    hf_secret: str
    light_cpu: str
    light_memory: str
    node_selector: dict[str, str]
    tolerations: list[dict[str, Any]]


@dataclass(frozen=True)
class TrainingKnobs(Knobs):
    """The same of a pipeline that trains."""

    target_cpu: str
    target_memory: str
    target_workers: str
    train_cpu: str
    train_memory: str
    train_workers: str
    gpu_type: str
    gpu_count: str
    ray_job: dict[str, Any]


def knobs_of(kind: type[Any], parameters: Mapping[str, Any]) -> Any:
    """The knobs among a pipeline's parameters (its ``locals()``)."""
    return kind(**{one.name: parameters[one.name] for one in fields(kind)})


def equip(tasks: Iterable[PipelineTask], knobs: Knobs) -> None:
    """Give steps image, addresses, credentials, resources and nodes."""
    every = list(tasks)
    for task in every:
        task.set_caching_options(False)
        task.set_container_image(knobs.image)
        # Inside a condition or a loop the compiler declares only what is registered.
        task.register_pipeline_channels(
            [knobs.image, knobs.config_map, knobs.s3_secret, knobs.mlflow_secret, knobs.hf_secret]
        )
    _read_config_map(every, knobs.config_map, CONFIG_ENV)
    _read_secret(every, knobs.s3_secret, S3_SECRET_ENV)
    _read_secret(every, knobs.mlflow_secret, MLFLOW_SECRET_ENV)
    _read_secret(every, knobs.hf_secret, HF_SECRET_ENV)
    _request(every, knobs.light_cpu, knobs.light_memory)
    _place(every, knobs.node_selector, knobs.tolerations)


def show_endpoint(tasks: Iterable[PipelineTask], knobs: Knobs) -> None:
    """Tell steps which endpoint follows the champion."""
    _read_config_map(tasks, knobs.config_map, ENDPOINT_ENV)


def add_training(spec_uri: Any, workspace: str, suites: list[str], knobs: TrainingKnobs) -> None:
    """All steps from prompts to deployment.

    Args:
        spec_uri: Object URI of the resolved run spec.
        workspace: URI of the workspace.
        suites: Evaluation suites, those of the spec.
        knobs: Parameters of the pipeline.
    """
    where = {"spec_uri": spec_uri, "workspace": workspace}
    job = {"gpu_type": knobs.gpu_type, "gpu_count": knobs.gpu_count, "ray_job": knobs.ray_job}
    on_target = {"cpu": knobs.target_cpu, "memory": knobs.target_memory, **job}
    # Timed on one machine, which is no faster for another beside it.
    timed = {**where, **on_target, "num_workers": "1"}
    pooled = {**where, **on_target, "num_workers": knobs.target_workers}
    trained = {**where, "cpu": knobs.train_cpu, "memory": knobs.train_memory, **job, "num_workers": knobs.train_workers}
    prompts_task = prompts(**where)
    responses_task = responses(**pooled, prompts=prompts_task.outputs["result"])
    tokens_task = tokens(**where, responses=responses_task.outputs["result"])
    hidden_states_task = hidden_states(**pooled, tokens=tokens_task.outputs["result"])
    draft_task = draft(**trained, hidden_states=hidden_states_task.outputs["result"])
    proof = {"prompts": prompts_task.outputs["result"], "draft": draft_task.outputs["result"]}
    calibration_task = calibration(**timed, **proof)
    with dsl.ParallelFor(suites, name="suites", parallelism=1) as suite:
        evaluation_task = evaluation(**timed, **proof, suite=suite, calibration=calibration_task.outputs["result"])
    version = {"draft": draft_task.outputs["result"], "calibration": calibration_task.outputs["result"]}
    report_task = report(**where, **version, evaluation=dsl.Collected(evaluation_task.outputs["result"]))
    register_task = register(**where, **version, report=report_task.outputs["result"])
    gate_task = gate(**where, report=report_task.outputs["result"], register=register_task.outputs["result"])
    with dsl.If(gate_task.outputs["Output"] == True, name="passed"):  # noqa: E712 - builds a KFP condition
        deploy_task = deploy(**where, register=register_task.outputs["result"], gate=gate_task.outputs["result"])

    heavy = [responses_task, hidden_states_task, draft_task, calibration_task, evaluation_task]
    light = [prompts_task, tokens_task, report_task, register_task, gate_task, deploy_task]
    equip([*heavy, *light], knobs)
    _read_config_map(heavy, knobs.config_map, JOB_ENV)
    show_endpoint([deploy_task], knobs)
    _share_memory(heavy)
    _introduce([*heavy, deploy_task])
