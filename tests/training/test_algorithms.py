"""DFlash and Eagle3, from cache to engine: they learn, resume to the bit, and are accepted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftline.draft.checkpoint import DraftModel, from_files
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.spec import RunSpec, derive
from draftline.spec.algorithms import ALGORITHM_OVERRIDES, REFERENCE_LOSS
from draftline.target.load import Target
from draftline.training.eagle3_objective import Eagle3Objective
from draftline.training.loop import DraftTrainer, TrainingInputs
from tests.engine.runs import Answer, answer, greedy, make_engine
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
from tests.training.group import Scenario, run_group
from tests.training.test_loop import one_sample

ALGORITHMS = ("dflash", "eagle3")


def spec_of(algorithm: str, **overrides: Any) -> RunSpec:
    """The tests' run as another algorithm, with the reference's loss."""
    changes = {**ALGORITHM_OVERRIDES[algorithm], **REFERENCE_LOSS[algorithm]}
    return derive(SPEC, {**changes, "draft.ttt_length": SPEC.draft.block_size, **overrides})


def trained(inputs: TrainingInputs, target: Target) -> tuple[DraftModel, list[dict[str, Any]]]:
    trainer = DraftTrainer(inputs, target)
    history = trainer.run()
    return from_files(*trainer.export().values()), history


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_repeated_sample_is_learnt_until_whole_blocks_are_accepted(
    loaded_target: Target, tmp_path: Path, algorithm: str
) -> None:
    spec = spec_of(
        algorithm,
        **{
            "train.steps": 60,
            "train.samples_per_step": 1,
            "train.anchors_per_sample": 24,
            "train.checkpoint_every_steps": 1000,
            "train.validate_every_steps": 1000,
        },
    )
    inputs, prompt, said = one_sample(loaded_target, tmp_path, spec)
    draft, _ = trained(inputs, loaded_target)
    assert draft.config.algorithm == algorithm
    request = EngineRequest("r", prompt, SamplingParams(26, 0.0, ignore_eos=True))
    one = answer(make_engine(loaded_target, draft), [request])["r"]
    assert one.token_ids == said[:26]
    # The prompt's token, then five steps of four drafts and the target's own.
    assert one.stats.accepted_histogram == [0, 0, 0, 0, 5]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_short_training_is_accepted_on_unseen_questions_and_changes_no_token(
    loaded_target: Target, tmp_path: Path, algorithm: str
) -> None:
    """Seen: accepted length 3.2 (DFlash) and 3.7 (Eagle3), of at most 5."""
    spec = spec_of(algorithm, **{"train.steps": 60, "train.samples_per_step": 8, "train.anchors_per_sample": 12})
    samples = conversations(loaded_target, 48)
    splits = {"train": [samples], "validation": [conversations(loaded_target, 6, seed=9)]}
    draft, history = trained(make_inputs(loaded_target, tmp_path, splits, spec), loaded_target)
    offline = [record["accepted_length"] for record in history if "accepted_length" in record]
    assert offline[-1] > offline[0] + 0.5
    asked = [tuple(ids[: mask.index(1)]) for _, ids, mask in conversations(loaded_target, 8, seed=77)]
    requests = greedy([*asked, *asked[:2]], ignore_eos=False)
    plain: dict[str, Answer] = {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in requests}
    found = answer(make_engine(loaded_target, draft, slots=3, prefill_tokens=20), requests)
    assert {n: one.token_ids for n, one in found.items()} == {n: one.token_ids for n, one in plain.items()}
    accepted = sum(one.stats.num_accepted_tokens for one in found.values())
    steps = sum(one.stats.num_steps for one in found.values())
    assert 1 + accepted / steps > 2.5
    # What is taken over from a slot serves as well as what is computed: of the same question all but its last token is.
    again = make_engine(loaded_target, draft)
    first, second = (answer(again, [requests[0]])["r0"] for _ in range(2))
    assert first.stats == second.stats


def test_eagle3_learns_with_weights_by_confidence(loaded_target: Target, tmp_path: Path) -> None:
    """D-PACE: a chain is a block, and sums are divided by chains."""
    spec = spec_of("eagle3", **{"train.steps": 30, "train.loss.position_weights": "dpace"})
    inputs = make_inputs(loaded_target, tmp_path, grammar_splits(loaded_target), spec)
    objective, source = Eagle3Objective(spec, loaded_target, inputs.counts), inputs.source("train")
    assert source is not None
    objective.initialise(source)
    batch = objective.build_batch([source.at(0), source.at(1)], [0, 1])
    chains = batch.valid_N // spec.draft.ttt_length
    assert 1 < len(chains.unique()) < len(chains)
    assert float(objective.terms(batch).sums.scalar("weight")) == len(chains.unique())
    _, history = trained(inputs, loaded_target)
    for record in history:
        parts = spec.train.loss.ce * record["ce"] + spec.train.loss.tv * record["tv"]
        assert record["loss"] == pytest.approx(parts + spec.train.loss.kl * record.get("kl", 0.0))
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]


@pytest.mark.parametrize("step", [1, 3])
def test_eagle3_resumes_to_the_bit(loaded_target: Target, tmp_path: Path, step: int) -> None:
    spec = spec_of("eagle3", **{"train.steps": 4})
    base = make_inputs(loaded_target, tmp_path, grammar_splits(loaded_target), spec)
    with deterministic():
        whole = train(replace(base, prefix="whole"), loaded_target)
        inputs = replace(base, prefix=f"parts-{step}")
        with pytest.raises(Interrupted):
            DraftTrainer(inputs, loaded_target, on_step=interrupt_at(step)).run()
        assert train(inputs, loaded_target) == whole


@pytest.mark.slow
def test_two_workers_train_eagle3_to_one_workers_curve(
    loaded_target: Target, tiny_target: Path, tmp_path: Path
) -> None:
    """Replicated and sharded; workers add the same numbers in another order (see ``test_parallel``)."""
    spec = spec_of("eagle3", **{"train.lr": 1e-3, "train.muon_lr": 5e-3})
    base = make_inputs(loaded_target, tmp_path / "cache", grammar_splits(loaded_target), spec)
    with deterministic():
        files, history = train(replace(base, prefix="alone"), loaded_target)
    alone = [json.loads(line) for line in history.splitlines()]
    scenarios = [
        Scenario(replace(base, prefix=mode, spec=derive(spec, {"train.parallel": mode}))) for mode in ("ddp", "fsdp")
    ]
    expected = from_files(*files.values()).weights
    for outcome in run_group(tmp_path / "group", tiny_target, 2, scenarios):
        assert [worker.error for worker in outcome] == [None, None]
        for found, wanted in zip(outcome[0].history, alone, strict=True):
            assert found == {name: pytest.approx(value, rel=2e-4) for name, value in wanted.items()}
        weights = from_files(*outcome[0].files.values()).weights
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, atol=2e-4, rtol=2e-3)
