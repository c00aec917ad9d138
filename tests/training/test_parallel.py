"""Several workers, as processes over gloo: the same loss curve replicated or sharded, and across restarts.

Each group of processes runs all its scenarios, since starting one takes
seconds. Tolerances: workers add the same numbers in another order. In fp32
over six steps that moves a figure by some 1e-6; AdamW divides by the root of
tiny squares in its first steps, so weights may differ more than losses do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftline.draft.checkpoint import from_files
from draftline.errors import FormatError, TrainingDiverged
from draftline.spec import derive
from draftline.target.load import Target
from draftline.training.checkpoints import CheckpointStore
from draftline.training.loop import TrainingInputs
from tests.training.cases import SPEC, Interrupted, deterministic, grammar_splits, make_inputs, poisoned, train
from tests.training.group import Outcome, Scenario, run_group

pytestmark = pytest.mark.slow

STEPS, PER_STEP = 6, 4
SAME = 2e-4
"""Relative; see above."""
OPTIMIZERS = ("adamw", "muon")
MODES = ("ddp", "fsdp")


def with_spec(base: TrainingInputs, prefix: str, overrides: Mapping[str, Any]) -> TrainingInputs:
    """The inputs of one run."""
    return replace(base, prefix=prefix, spec=derive(base.spec, {"train.lr": 1e-3, "train.muon_lr": 5e-3, **overrides}))


@pytest.fixture(scope="module")
def base(loaded_target: Target, tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return make_inputs(loaded_target, tmp_path_factory.mktemp("cache"), grammar_splits(loaded_target))


def damaged(target: Target, folder: Path) -> TrainingInputs:
    """NaN in the third sample of the second shard."""

    def damage(name: str, data: bytes) -> bytes:
        return poisoned(data, 2) if name == "train-00001.safetensors" else data

    return make_inputs(target, folder, grammar_splits(target), SPEC, damage)


@pytest.fixture(scope="module")
def alone(base: TrainingInputs, loaded_target: Target) -> dict[str, tuple[dict[str, bytes], list[dict[str, float]]]]:
    """One worker, per optimiser; and halves of runs that others go on with."""
    found = {}
    with deterministic():
        for name in OPTIMIZERS:
            files, history = train(with_spec(base, f"alone-{name}", {"train.optimizer": name}), loaded_target)
            found[name] = files, [json.loads(line) for line in history.splitlines()]
    return found


@pytest.fixture(scope="module")
def pair(
    base: TrainingInputs, loaded_target: Target, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Outcome]]:
    """Everything that two workers do."""
    folder = tmp_path_factory.mktemp("pair")
    scenarios: dict[str, Scenario] = {}
    for mode in MODES:
        for name in OPTIMIZERS:
            label = f"{mode}-{name}"
            options = {"train.parallel": mode, "train.optimizer": name}
            scenarios[label] = Scenario(with_spec(base, label, options))
            parts = with_spec(base, f"parts-{label}", options)
            scenarios[f"first-{label}"] = Scenario(parts, stop_after=3)
            scenarios[f"second-{label}"] = Scenario(parts)
        other = MODES[1 - MODES.index(mode)]
        switched = f"switch-{mode}"
        scenarios[f"first-{switched}"] = Scenario(with_spec(base, switched, {"train.parallel": mode}), stop_after=3)
        scenarios[f"second-{switched}"] = Scenario(with_spec(base, switched, {"train.parallel": other}))
        scenarios[f"passes-{mode}"] = Scenario(
            with_spec(base, f"passes-{mode}", {"train.parallel": mode, "train.micro_batch": 1})
        )
    scenarios["for-three"] = Scenario(with_spec(base, "for-three", {"train.parallel": "fsdp"}), stop_after=3)
    scenarios["for-one"] = Scenario(with_spec(base, "for-one", {"train.parallel": "fsdp"}), stop_after=3)
    bad = damaged(loaded_target, folder / "bad")
    scenarios["nan"] = Scenario(replace(bad, prefix="nan", spec=derive(bad.spec, {"train.checkpoint_every_steps": 1})))
    broken = damaged(loaded_target, folder / "broken")
    data = bytearray(broken.store.get("cache/train-00001.safetensors"))
    data[-9] ^= 1
    broken.store.put("cache/train-00001.safetensors", bytes(data))
    scenarios["broken"] = Scenario(replace(broken, prefix="broken"))
    outcomes = run_group(folder / "run", tiny_target, 2, list(scenarios.values()))
    return dict(zip(scenarios, outcomes, strict=True))


@pytest.fixture(scope="module")
def trio(
    base: TrainingInputs, pair: dict[str, list[Outcome]], tiny_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Outcome]]:
    """Three workers, whose shares of four samples are uneven; one run goes on from two workers' checkpoint."""
    folder = tmp_path_factory.mktemp("trio")
    scenarios = {
        "ddp": Scenario(with_spec(base, "trio-ddp", {})),
        "fsdp": Scenario(with_spec(base, "trio-fsdp", {"train.parallel": "fsdp"})),
        "first": Scenario(with_spec(base, "trio-parts", {}), stop_after=3),
        "second": Scenario(with_spec(base, "trio-parts", {})),
        "from-two": Scenario(with_spec(base, "for-three", {"train.parallel": "ddp"})),
    }
    outcomes = run_group(folder / "run", tiny_target, 3, list(scenarios.values()))
    return dict(zip(scenarios, outcomes, strict=True))


def assert_same_curve(one: list[dict[str, float]], two: list[dict[str, float]]) -> None:
    assert [record["step"] for record in one] == [record["step"] for record in two] == [3, 6]
    for left, right in zip(one, two, strict=True):
        assert right == pytest.approx(left, rel=SAME)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_two_workers_train_as_one_does(
    alone: dict[str, tuple[dict[str, bytes], list[dict[str, float]]]],
    pair: dict[str, list[Outcome]],
    mode: str,
    name: str,
) -> None:
    first, second = pair[f"{mode}-{name}"]
    files, history = alone[name]
    assert first.history == second.history
    assert_same_curve(history, first.history)
    one, two = from_files(*files.values()).weights, from_files(*first.files.values()).weights
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=2e-3, rtol=1e-2, msg=lambda text, key=key: f"{key}: {text}")


def test_sharded_workers_hold_half_of_the_weights(pair: dict[str, list[Outcome]]) -> None:
    whole = pair["ddp-muon"][0].stored_bytes
    parts = [outcome.stored_bytes for outcome in pair["fsdp-muon"]]
    assert sum(parts) == whole and max(parts) < 0.52 * whole


@pytest.mark.parametrize("label", [f"{mode}-{name}" for mode in MODES for name in OPTIMIZERS])
def test_a_restart_with_as_many_workers_changes_no_bit(pair: dict[str, list[Outcome]], label: str) -> None:
    before, after, whole = (pair[f"{part}{label}"] for part in ("first-", "second-", ""))
    assert all(isinstance(outcome.error, Interrupted) for outcome in before)
    assert after[0].steps == [3, 4, 5, 6], "it must go on from the newest checkpoint"
    assert after[0].files == whole[0].files and after[0].history == whole[0].history


def test_three_workers_restart_to_the_bit_too(trio: dict[str, list[Outcome]]) -> None:
    """With three the order of a sum matters: DDP must not lay out its buckets anew after a restart."""
    assert trio["second"][0].steps == [3, 4, 5, 6]
    assert trio["second"][0].files == trio["ddp"][0].files
    assert trio["second"][0].history == trio["ddp"][0].history


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_read_in_the_other_mode(
    alone: dict[str, tuple[dict[str, bytes], list[dict[str, float]]]], pair: dict[str, list[Outcome]], mode: str
) -> None:
    after = pair[f"second-switch-{mode}"][0]
    assert after.steps == [3, 4, 5, 6]
    assert_same_curve(alone["muon"][1], after.history)


def test_other_numbers_of_workers_go_on_with_the_same_curve(
    alone: dict[str, tuple[dict[str, bytes], list[dict[str, float]]]],
    pair: dict[str, list[Outcome]],
    trio: dict[str, list[Outcome]],
) -> None:
    curve = alone["muon"][1]
    assert_same_curve(curve, trio["ddp"][0].history)
    assert_same_curve(curve, trio["fsdp"][0].history)
    assert trio["from-two"][0].steps == [3, 4, 5, 6]
    assert_same_curve(curve, trio["from-two"][0].history)
    # What two took until the checkpoint and three after it is every place of six steps, once.
    until = 2 * PER_STEP
    places = [place for outcome in pair["for-three"] for place in outcome.places if place < until]
    places += [place for outcome in trio["from-two"] for place in outcome.places]
    assert sorted(places) == list(range(STEPS * PER_STEP))


@pytest.mark.parametrize("mode", MODES)
def test_several_passes_add_up_to_one_step(
    alone: dict[str, tuple[dict[str, bytes], list[dict[str, float]]]], pair: dict[str, list[Outcome]], mode: str
) -> None:
    assert_same_curve(alone["muon"][1], pair[f"passes-{mode}"][0].history)


def test_not_a_number_on_one_worker_stops_all_and_names_its_samples(
    pair: dict[str, list[Outcome]], tmp_path_factory: pytest.TempPathFactory, loaded_target: Target
) -> None:
    first, second = pair["nan"]
    assert isinstance(first.error, TrainingDiverged) and isinstance(second.error, TrainingDiverged)
    assert str(first.error) == str(second.error)
    assert first.steps == second.steps and first.steps, "the bad sample came first; choose another seed"
    named = str(first.error.got).removeprefix("samples ").split(", ")
    assert "0-6" in named, "the third sample of the second shard"
    assert len(named) == PER_STEP // 2, "the other worker's samples are not to blame"


def test_a_damaged_shard_on_one_worker_stops_all(pair: dict[str, list[Outcome]]) -> None:
    errors = [outcome.error for outcome in pair["broken"]]
    assert all(isinstance(error, FormatError) for error in errors)
    assert len({str(error) for error in errors}) == 1 and "train-00001.safetensors" in str(errors[0])


def test_one_worker_goes_on_alone_from_a_sharded_checkpoint(
    base: TrainingInputs,
    pair: dict[str, list[Outcome]],
    alone: dict[str, tuple[dict[str, bytes], list[dict[str, float]]]],
    loaded_target: Target,
) -> None:
    inputs = with_spec(base, "for-one", {})
    assert isinstance(pair["for-one"][0].error, Interrupted)
    found = CheckpointStore(base.store, "for-one/scratch").latest()
    assert found is not None and found.step == 2
    with deterministic():
        _, history = train(inputs, loaded_target)
    assert_same_curve(alone["muon"][1], [json.loads(line) for line in history.splitlines()])
