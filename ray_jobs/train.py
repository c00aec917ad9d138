"""The draft station: Ray Train's TorchTrainer around :class:`draftline.training.loop.DraftTrainer`."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from typing import Any

import ray.train
import ray.train.torch
import torch

from draftline.cache.shards import Manifest
from draftline.draft.build import num_parameters
from draftline.errors import DraftlineError, FormatError, ObjectNotFound, StepError, TrainingDiverged
from draftline.jobs import error_document, revive
from draftline.steps import StepContext, StepOutput
from draftline.target.load import load_target
from draftline.training.architecture import draft_config
from draftline.training.early_stop import best_record
from draftline.training.loop import DraftTrainer, TrainingInputs
from draftline.training.workers import Workers
from ray_jobs.runtime import cluster_cpus, main, reserved_cpus
from ray_jobs.stream import capture_figures, num_capture_workers, open_stream, running_hub

_HISTORY = "history.jsonl"


def run(context: StepContext) -> StepOutput:
    """Train from the newest checkpoint in the workspace, then store the draft.

    Checkpoints are ours (one object, written atomically, in the workspace),
    so a killed job resumes wherever it is started again; Ray Train gives
    workers, their process group and restarts.
    """
    train = context.spec.train
    if train.num_workers > cluster_cpus():
        raise StepError(
            f"train.num_workers={train.num_workers} does not fit the cluster",
            got=f"{cluster_cpus()} CPUs",
            remedy="Lower train.num_workers or start a larger cluster",
        )
    started = time.monotonic()
    context.store.delete(_failure_key(context))
    captures = _fit(context)
    _raise_common_failure(context)
    files = _stored_files(context)
    history = [json.loads(line) for line in context.store.get(f"{context.prefix}/{_HISTORY}").splitlines()]
    last = (best_record(history) if train.early_stop_patience else None) or history[-1]
    target = load_target(context.spec.target)
    config = draft_config(context.spec, target)
    metrics = {
        "train_loss": last["loss"],
        "train_seconds": time.monotonic() - started,
        "num_parameters": float(num_parameters(config)),
        **captures,
    }
    if "validation_loss" in last:
        metrics["validation_loss"] = last["validation_loss"]
        metrics["validation_accepted_length"] = last["accepted_length"]
    outputs = {
        "files": files,
        "draft_vocab_size": config.draft_vocab_size,
        "target_layer_ids": list(config.target_layer_ids),
        "num_parameters": int(metrics["num_parameters"]),
        "history": _HISTORY,
        "steps": int(last["step"]),
    }
    return StepOutput(outputs, metrics)


def _fit(context: StepContext) -> dict[str, float]:
    """Run the workers; a worker that dies is started again with the others, twice at most.

    Returns:
        What was captured meanwhile, in mode ``stream``.

    Raises:
        DraftlineError: the workers' own error.
    """
    train = context.spec.train
    # Trainers and capture actors share what is free.
    num_together = train.num_workers + num_capture_workers(context)
    capture_cpus = reserved_cpus(context.spec.cache.threads_per_worker, num_together)
    with (
        tempfile.TemporaryDirectory(prefix="draftline-train-") as scratch,
        running_hub(context, capture_cpus) as hub,
    ):
        trainer = ray.train.torch.TorchTrainer(
            _worker,
            train_loop_config={"context": context, "hub": hub},
            scaling_config=ray.train.ScalingConfig(
                num_workers=train.num_workers,
                resources_per_worker={"CPU": reserved_cpus(train.threads_per_worker, num_together)},
            ),
            # A fresh name and folder: Ray Train would silently resume an equal one, and resuming is ours.
            run_config=ray.train.RunConfig(
                name=f"{context.key}-{os.getpid()}",
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=2),
            ),
            torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        )
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from None
        return capture_figures(hub)


def _worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    context: StepContext = config["context"]
    torch.set_num_threads(context.spec.train.threads_per_worker)
    torch.use_deterministic_algorithms(True)
    world = ray.train.get_context()
    workers = Workers(world.get_world_rank(), world.get_world_size())
    try:
        _train(context, workers, config["hub"])
    except (TrainingDiverged, FormatError, ObjectNotFound) as error:
        # It has reached every worker, and would come again: raised here, Ray Train would start all of it anew.
        if workers.is_first:
            context.store.put(_failure_key(context), json.dumps(error_document(error)).encode())


def _train(context: StepContext, workers: Workers, hub: Any) -> None:
    hidden = context.inputs["hidden-states"]
    counts = json.loads(context.store.get(f"{hidden.prefix}/{hidden.outputs['counts']}"))
    inputs = TrainingInputs(
        spec=context.spec,
        store=context.store,
        cache_prefix=hidden.prefix,
        manifest=Manifest.from_json(hidden.outputs, kind=str(hidden.outputs["kind"])),
        counts=[(int(token), int(count)) for token, count in counts],
        prefix=context.prefix,
        open_source=None if hub is None else lambda split: open_stream(hub, context, split, workers.rank),
    )

    def on_step(step: int, figures: dict[str, float]) -> None:
        if workers.is_first:
            length = f", accepted length {figures['accepted_length']:.2f}" if "accepted_length" in figures else ""
            context.report(step, trainer.num_steps, "steps", f"loss {figures['loss']:.3f}{length}", figures)

    target = load_target(context.spec.target, dtype="fp32")
    trainer = DraftTrainer(inputs, target, workers=workers, on_step=on_step)
    trainer.run()
    if workers.is_first:
        for name, data in trainer.export().items():
            context.store.put(f"{context.prefix}/draft/{name}", data)
        context.store.put(f"{context.prefix}/{_HISTORY}", trainer.history_file())


def _failure_key(context: StepContext) -> str:
    return f"{context.scratch}/failed.json"


def _raise_common_failure(context: StepContext) -> None:
    try:
        document = context.store.get(_failure_key(context))
    except ObjectNotFound:
        return
    raise revive(json.loads(document))


def _stored_files(context: StepContext) -> dict[str, str]:
    names = ("config.json", "model.safetensors")
    return {name: hashlib.sha256(context.store.get(f"{context.prefix}/draft/{name}")).hexdigest() for name in names}


def _cause(error: Exception) -> DraftlineError:
    """The worker's own error, out of Ray Train's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in failures.values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, DraftlineError):
            return cause
    return StepError(
        "training failed", got=str(error).strip().splitlines()[-1][:300], remedy="Read the log; the run can be resumed"
    )


if __name__ == "__main__":
    main(run)
