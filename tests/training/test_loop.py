"""Training: it learns, it resumes to the bit, workers count alike, and it stops on what is not finite."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from draftline.cache.hidden import HiddenIndex
from draftline.draft import bigrams
from draftline.draft.checkpoint import from_files
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.errors import TrainingDiverged
from draftline.spec import RunSpec, derive
from draftline.target.load import Target
from draftline.training import block_objective, loop
from draftline.training.architecture import default_mask_token, draft_config
from draftline.training.checkpoints import CheckpointStore
from draftline.training.loop import DraftTrainer, TrainingInputs
from tests.engine.runs import answer, make_engine
from tests.training.cases import (
    SPEC,
    Interrupted,
    conversations,
    deterministic,
    grammar_splits,
    interrupt_at,
    make_inputs,
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
        if name != "train-00001.safetensors":
            return data
        # The record of what only the third sample has ends with its normalisers. No capture would write a NaN.
        index = HiddenIndex.of(data, origin=name)
        start, size = index.record_range(index.segments(2)[-1])
        end, changed = start + size, bytearray(data)
        changed[end - 32 : end] = b"\xff" * 32
        return bytes(changed)

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


class Exchange:
    """``all_reduce`` between threads, in place of a process group."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._lock = threading.Lock()
        self._given: list[Tensor] = []

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Everyone takes the value of the thread that is named after the source."""
        is_source = threading.current_thread().name == f"rank {source}"
        if not is_source:
            tensor.zero_()
        self.all_reduce(tensor)

    def all_reduce(self, tensor: Tensor) -> None:
        with self._lock:
            self._given.append(tensor.clone())
        self._barrier.wait(60)
        total = torch.stack(self._given).sum(0)
        self._barrier.wait(60)
        with self._lock:
            self._given.clear()
        tensor.copy_(total)
        self._barrier.wait(60)


def test_two_workers_count_what_one_counts(
    base: TrainingInputs, loaded_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums are added in another order, so figures agree to rounding, and the draft nearly so."""
    spec = derive(SPEC, {"train.optimizer": "adamw", "train.lr": 1e-3})
    alone = DraftTrainer(replace(base, spec=spec, prefix="alone"), loaded_target)
    figures = alone.run()
    exchange, lock = Exchange(2), threading.Lock()

    # Real workers are processes, each with a global generator of its own; threads take turns with theirs.
    def low_rank(table: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        with lock:
            first, second = bigrams.low_rank(table, rank, seed)
        # On another processor the same decomposition may come out with other signs.
        sign = -1.0 if threading.current_thread().name == "rank 1" else 1.0
        return sign * first, sign * second

    monkeypatch.setattr(block_objective, "low_rank", low_rank)
    monkeypatch.setattr(
        loop, "distributed", SimpleNamespace(all_reduce=exchange.all_reduce, broadcast=exchange.broadcast)
    )
    trainers = [
        DraftTrainer(replace(base, spec=spec, prefix="pair"), loaded_target, rank=rank, world_size=2)
        for rank in range(2)
    ]
    histories: dict[int, list[dict[str, float]]] = {}
    threads = [
        threading.Thread(
            target=lambda rank=rank: histories.setdefault(rank, trainers[rank].run()), name=f"rank {rank}", daemon=True
        )
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert histories[0] == histories[1]
    for one, two in zip(figures, histories[0], strict=True):
        assert two == pytest.approx(one, rel=2e-3)
    exports = [from_files(*trainer.export().values()).weights for trainer in (*trainers, alone)]
    for name, value in exports[0].items():
        assert torch.equal(value, exports[1][name]), f"the workers drifted apart in {name}"
        torch.testing.assert_close(value, exports[2][name], atol=2e-3, rtol=1e-2)


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
