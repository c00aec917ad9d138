"""Training: it learns, it resumes to the bit, workers count alike, and it stops on what is not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from draftline.draft.checkpoint import from_files
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.errors import TrainingDiverged
from draftline.spec import RunSpec, derive
from draftline.target.load import Target
from draftline.training.architecture import default_mask_token, draft_config
from draftline.training.checkpoints import CheckpointStore
from draftline.training.loop import DraftTrainer, TrainingInputs
from draftline.training.meter import StepMeter
from tests.engine.runs import answer, make_engine
from tests.training.cases import (
    SPEC,
    Interrupted,
    conversations,
    deterministic,
    grammar_splits,
    interrupt_at,
    make_inputs,
    poisoned,
    train,
)


@pytest.fixture(autouse=True)
def _as_the_job_runs() -> Iterator[None]:
    with deterministic():
        yield


@pytest.fixture(scope="module")
def base(loaded_target: Target, tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return make_inputs(loaded_target, tmp_path_factory.mktemp("cache"), grammar_splits(loaded_target))


@pytest.fixture(scope="module")
def uninterrupted(base: TrainingInputs, loaded_target: Target) -> tuple[dict[str, bytes], bytes]:
    with deterministic():
        return train(replace(base, prefix="uninterrupted"), loaded_target)


def test_a_run_is_a_function_of_its_inputs(
    base: TrainingInputs, loaded_target: Target, uninterrupted: tuple[dict[str, bytes], bytes]
) -> None:
    torch.manual_seed(12345)
    assert train(replace(base, prefix="again"), loaded_target) == uninterrupted


@pytest.mark.parametrize("step", range(1, 7))
def test_an_interruption_at_any_step_changes_no_bit(
    base: TrainingInputs, loaded_target: Target, uninterrupted: tuple[dict[str, bytes], bytes], step: int
) -> None:
    inputs = replace(base, prefix=f"interrupted-{step}")
    with pytest.raises(Interrupted):
        DraftTrainer(inputs, loaded_target, on_step=interrupt_at(step)).run()
    torch.manual_seed(step)
    done: list[int] = []
    trainer = DraftTrainer(inputs, loaded_target, on_step=lambda number, figures: done.append(number))
    trainer.run()
    assert done == list(range(step // 2 * 2 + 1, 7)), "it must go on from the newest checkpoint"
    assert (trainer.export(), trainer.history_file()) == uninterrupted


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("head", ["gated", "rnn"])
def test_other_heads_and_optimizers_resume_to_the_bit(
    base: TrainingInputs, loaded_target: Target, optimizer: str, head: str
) -> None:
    spec = derive(SPEC, {"train.optimizer": optimizer, "draft.markov_head": head, "train.steps": 4})
    whole = train(replace(base, spec=spec, prefix=f"whole-{optimizer}-{head}"), loaded_target)
    inputs = replace(base, spec=spec, prefix=f"parts-{optimizer}-{head}")
    with pytest.raises(Interrupted):
        DraftTrainer(inputs, loaded_target, on_step=interrupt_at(3)).run()
    assert train(inputs, loaded_target) == whole


def test_a_damaged_newest_checkpoint_is_passed_over(
    base: TrainingInputs, loaded_target: Target, uninterrupted: tuple[dict[str, bytes], bytes]
) -> None:
    inputs = replace(base, prefix="damaged")
    with pytest.raises(Interrupted):
        DraftTrainer(inputs, loaded_target, on_step=interrupt_at(5)).run()
    newest = "damaged/scratch/step-00000004.safetensors"
    data = inputs.store.get(newest)
    flipped = bytearray(data)
    flipped[-100] ^= 1
    for damage in (data[: len(data) // 2], b"", b"not a checkpoint at all", bytes(flipped)):
        inputs.store.put(newest, damage)
        found = CheckpointStore(inputs.store, "damaged/scratch").latest()
        assert found is not None and found.step == 2
    assert train(inputs, loaded_target) == uninterrupted


def test_only_the_newest_checkpoints_stay(base: TrainingInputs, loaded_target: Target) -> None:
    inputs = replace(base, prefix="kept")
    train(inputs, loaded_target)
    names = [info.key.rsplit("/", 1)[1] for info in inputs.store.list("kept/scratch/")]
    assert names == ["step-00000004.safetensors", "step-00000006.safetensors"]


def test_history_and_progress(base: TrainingInputs, loaded_target: Target) -> None:
    seen: dict[int, dict[str, float]] = {}
    trainer = DraftTrainer(replace(base, prefix="history"), loaded_target, on_step=seen.__setitem__)
    history = trainer.run()
    assert list(seen) == list(range(1, 7))
    assert [record["step"] for record in history] == [3, 6]
    assert [json.loads(line) for line in trainer.history_file().splitlines()] == history
    weights = SPEC.train.loss
    for record in history:
        parts = weights.ce * record["ce"] + weights.tv * record["tv"] + weights.confidence * record["confidence"]
        assert record["loss"] == pytest.approx(parts)
        assert 1 <= record["accepted_length"] <= 1 + SPEC.draft.block_size
        assert record["validation_loss"] > 0


def one_sample(target: Target, folder: Path, spec: RunSpec) -> tuple[TrainingInputs, tuple[int, ...], list[int]]:
    """A cache of nothing but the target's own greedy answer to one question."""
    _, ids, mask = conversations(target, 1)[0]
    prompt = tuple(ids[: mask.index(1)])
    request = EngineRequest("r", prompt, SamplingParams(28, 0.0, ignore_eos=True))
    said = answer(make_engine(target), [request])["r"].token_ids
    sample = ("only", [*prompt, *said], [0] * len(prompt) + [1] * len(said))
    return make_inputs(target, folder, {"train": [[sample]], "validation": [[sample]]}, spec), prompt, said


@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_one_repeated_sample_is_learnt_until_whole_blocks_are_accepted(
    loaded_target: Target, tmp_path: Path, head: str
) -> None:
    """The gate of the whole chain: cache, anchors, loss, optimiser, export, runner, engine."""
    spec = derive(
        SPEC,
        {
            "train.steps": 60,
            "train.samples_per_step": 1,
            "train.anchors_per_sample": 24,
            "train.checkpoint_every_steps": 1000,
            "train.validate_every_steps": 1000,
            "draft.markov_head": head,
        },
    )
    inputs, prompt, said = one_sample(loaded_target, tmp_path, spec)
    trainer = DraftTrainer(inputs, loaded_target)
    trainer.run()
    draft = from_files(*trainer.export().values())
    request = EngineRequest("r", prompt, SamplingParams(26, 0.0, ignore_eos=True))
    one = answer(make_engine(loaded_target, draft), [request])["r"]
    assert one.token_ids == said[:26]
    # The prompt's token, then five steps of four drafts and the target's own.
    assert one.stats.accepted_histogram == [0, 0, 0, 0, 5]


def test_not_a_number_names_the_samples_and_keeps_the_last_checkpoint(loaded_target: Target, tmp_path: Path) -> None:
    def damage(name: str, data: bytes) -> bytes:
        return poisoned(data, 2) if name == "train-00001.safetensors" else data

    spec = derive(SPEC, {"train.checkpoint_every_steps": 1, "train.samples_per_step": 2})
    inputs = make_inputs(loaded_target, tmp_path, grammar_splits(loaded_target), spec, damage)
    done: list[int] = []
    trainer = DraftTrainer(inputs, loaded_target, on_step=lambda step, figures: done.append(step))
    with pytest.raises(TrainingDiverged, match=r"the loss became NaN .* samples") as caught:
        trainer.run()
    assert "0-6" in str(caught.value.got), "the third sample of the second shard"
    assert len(str(caught.value.got).split(",")) == 2
    assert done, "the bad sample came first; choose another seed"
    found = CheckpointStore(inputs.store, "draft/run/scratch").latest()
    assert found is not None and found.step == done[-1]
    assert all(value.isfinite().all() for value in found.tensors.values())


def test_the_architecture_follows_spec_and_target(loaded_target: Target) -> None:
    config = draft_config(SPEC, loaded_target)
    assert (config.vocab_size, config.draft_vocab_size, config.hidden_size) == (loaded_target.vocab_size, 60, 64)
    assert config.target_layer_ids == (0, 1)
    assert config.num_target_layers == 4
    whole = draft_config(derive(SPEC, {"draft.vocab_size": 0}), loaded_target)
    large = draft_config(derive(SPEC, {"draft.vocab_size": 9999}), loaded_target)
    assert whole.draft_vocab_size == large.draft_vocab_size == loaded_target.vocab_size
    assert not whole.is_pruned


def test_the_mask_token_is_one_that_text_never_holds(loaded_target: Target) -> None:
    assert loaded_target.tokenizer.convert_ids_to_tokens(default_mask_token(loaded_target)) == "<|mask|>"
    assert draft_config(derive(SPEC, {"draft.mask_token_id": 5}), loaded_target).mask_token_id == 5


def test_without_a_validation_split_there_is_no_validation(loaded_target: Target, tmp_path: Path) -> None:
    splits = {"train": [conversations(loaded_target, 4)]}
    history = DraftTrainer(make_inputs(loaded_target, tmp_path, splits), loaded_target).run()
    assert history and all("validation_loss" not in record for record in history)


@pytest.mark.parametrize("changes", [{"train.loss.kl": 0.5}, {"train.loss.position_weights": "dpace"}])
def test_other_losses_train_and_add_up(
    base: TrainingInputs, loaded_target: Target, changes: dict[str, float | str]
) -> None:
    spec = derive(SPEC, {"train.steps": 30, **changes})
    trainer = DraftTrainer(replace(base, spec=spec, prefix=f"losses/{next(iter(changes))}"), loaded_target)
    history = trainer.run()
    weights = spec.train.loss
    for record in history:
        parts = weights.ce * record["ce"] + weights.tv * record["tv"] + weights.confidence * record["confidence"]
        assert record["loss"] == pytest.approx(parts + weights.kl * record.get("kl", 0.0))
    assert ("kl" in history[-1]) == (weights.kl > 0)
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]


STOPPING = derive(
    SPEC,
    {
        "train.steps": 30,
        "train.validate_every_steps": 1,
        "train.checkpoint_every_steps": 4,
        "train.early_stop_patience": 3,
        "train.muon_lr": 0.3,
        "train.lr": 0.1,
    },
)
"""Learns fast and then gets worse."""


@pytest.fixture(scope="module")
def stopped(base: TrainingInputs, loaded_target: Target) -> tuple[list[dict[str, float]], dict[int, Tensor], bytes]:
    """History of a run that stops early, a weight after every step, and what was exported."""
    weights: dict[int, Tensor] = {}
    with deterministic():
        trainer = DraftTrainer(
            replace(base, spec=STOPPING, prefix="stopped"),
            loaded_target,
            on_step=lambda step, figures: weights.__setitem__(
                step, trainer._objective.model.norm.weight.detach().clone()
            ),
        )
        history = trainer.run()
    return history, weights, trainer.export()["model.safetensors"]


def test_training_stops_when_held_out_accepted_length_grows_no_more(
    stopped: tuple[list[dict[str, float]], dict[int, Tensor], bytes],
) -> None:
    history, weights, exported = stopped
    lengths = [record["accepted_length"] for record in history]
    best = 1 + lengths.index(max(lengths))
    assert len(history) == list(weights)[-1] == best + 3 < 30, "choose rates at which it gets worse"
    assert torch.equal(load_safetensors(exported)["norm.weight"], weights[best])
    assert not torch.equal(weights[best], weights[best + 3])


@pytest.mark.parametrize("step", [1, 4, 5, 6, 7, 8, 9, 10, 11])
def test_an_early_stop_is_the_same_after_an_interruption(
    base: TrainingInputs,
    loaded_target: Target,
    stopped: tuple[list[dict[str, float]], dict[int, Tensor], bytes],
    step: int,
) -> None:
    history, weights, exported = stopped
    inputs = replace(base, spec=STOPPING, prefix=f"stopped-{step}")
    with pytest.raises(Interrupted):
        DraftTrainer(inputs, loaded_target, on_step=interrupt_at(min(step, len(weights)))).run()
    trainer = DraftTrainer(inputs, loaded_target)
    assert trainer.run() == history
    assert trainer.export()["model.safetensors"] == exported


def test_epochs_decide_the_steps_and_the_schedule(base: TrainingInputs, loaded_target: Target) -> None:
    """Eleven samples, four a step: two epochs take six steps, as in the spec that says six."""
    by_epochs = derive(SPEC, {"train.epochs": 2, "train.steps": 100})
    seen: list[int] = []
    trainer = DraftTrainer(
        replace(base, spec=by_epochs, prefix="epochs"), loaded_target, on_step=lambda step, _: seen.append(step)
    )
    assert trainer.num_steps == 6
    trainer.run()
    assert seen == list(range(1, 7))
    assert (trainer.export(), trainer.history_file()) == train(replace(base, prefix="by-steps"), loaded_target)


def test_bf16_is_for_passes_alone(
    base: TrainingInputs, loaded_target: Target, uninterrupted: tuple[dict[str, bytes], bytes]
) -> None:
    """The curve stays near fp32's; weights, gradients and optimiser state are fp32."""
    files, history = train(replace(base, spec=derive(SPEC, {"train.precision": "bf16"}), prefix="bf16"), loaded_target)
    assert files["model.safetensors"] != uninterrupted[0]["model.safetensors"], "nothing ran in bf16"
    for half, full in zip(history.splitlines(), uninterrupted[1].splitlines(), strict=True):
        assert json.loads(half)["loss"] == pytest.approx(json.loads(full)["loss"], rel=0.03)
    found = CheckpointStore(base.store, "bf16/scratch").latest()
    assert found is not None
    assert {value.dtype for value in found.tensors.values()} == {torch.float32}


def test_taps_that_are_not_finite_name_their_sample(loaded_target: Target, tmp_path: Path) -> None:
    """They would spoil the measured scale of every tap, and every step then blames another sample."""

    def damage(name: str, data: bytes) -> bytes:
        return poisoned(data, 2, taps=True) if name == "train-00001.safetensors" else data

    inputs = make_inputs(loaded_target, tmp_path, grammar_splits(loaded_target), SPEC, damage)
    with pytest.raises(TrainingDiverged, match=r"taps.*sample 0-6"):
        DraftTrainer(inputs, loaded_target).run()


def test_a_held_out_sample_that_is_not_finite_is_named(loaded_target: Target, tmp_path: Path) -> None:
    def damage(name: str, data: bytes) -> bytes:
        return poisoned(data, 1) if name.startswith("validation") else data

    inputs = make_inputs(loaded_target, tmp_path, grammar_splits(loaded_target), SPEC, damage)
    with pytest.raises(TrainingDiverged, match=r"the held-out loss became NaN .* at step 3") as caught:
        DraftTrainer(inputs, loaded_target).run()
    assert sorted(str(caught.value.got).removeprefix("samples ").split(", ")) == ["9-0", "9-1", "9-2"]
    found = CheckpointStore(inputs.store, "draft/run/scratch").latest()
    assert found is not None and found.step == 2


def test_live_figures_say_how_fast_it_goes(base: TrainingInputs, loaded_target: Target) -> None:
    seen: list[dict[str, float]] = []
    trainer = DraftTrainer(
        replace(base, prefix="live"), loaded_target, on_step=lambda step, figures: seen.append(figures)
    )
    history = trainer.run()
    assert all(figures["tokens_per_s"] > 0 and 0 <= figures["data_wait_share"] <= 1 for figures in seen)
    assert all("tokens_per_s" not in record for record in history), "a result must not depend on the clock"


def test_the_meter_counts_tokens_and_waiting() -> None:
    source = SimpleNamespace(wait_s=1.0)
    now = [10.0]
    meter = StepMeter([source], lambda: now[0])  # type: ignore[list-item]
    now[0], source.wait_s = 12.0, 1.5
    assert meter.figures(300.0) == {"tokens_per_s": 150.0, "data_wait_share": 0.25}
    now[0] = 13.0
    assert meter.figures(50.0) == {"tokens_per_s": 50.0, "data_wait_share": 0.0}
