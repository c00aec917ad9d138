"""Engines assembled from a serving spec, a draft folder and a calibration file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import DraftModel, to_files
from draftline.draft.convert import Conversion, convert_checkpoint
from draftline.engine.build import build_engine, load_draft, run_to_completion
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.errors import FormatError, InputError, TargetError
from draftline.spec import ServingSpec
from draftline.target.load import Target
from tests.engine.runs import gather, greedy, questions
from tests.servers.tiny_target import bigram_draft, random_draft, tiny_draft_config


def serving(**changes: Any) -> ServingSpec:
    return ServingSpec.model_validate({"policy": "fixed", "max_requests": 2, "max_context": 200, **changes})


@pytest.fixture(scope="module")
def draft_dir(loaded_target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    for name, data in to_files(bigram_draft(loaded_target)).items():
        (folder / name).write_bytes(data)
    return folder


def calibration_file(folder: Path, temperatures: tuple[float, ...]) -> Path:
    path = folder / "calibration.json"
    path.write_text(Calibration(temperatures).to_json())
    return path


def num_drafted(engine: Any, target: Target) -> int:
    answers = gather(run_to_completion(engine, greedy(questions(target, 3), 20)))
    return sum(one.stats.num_draft_tokens for one in answers.values())


def test_without_a_draft_it_decodes_plainly(loaded_target: Target) -> None:
    engine = build_engine(loaded_target, serving(), draft_dir=None, calibration_file=None)
    assert num_drafted(engine, loaded_target) == 0


def test_the_policy_of_the_spec_decides(loaded_target: Target, draft_dir: Path) -> None:
    drafted = {
        policy: num_drafted(
            build_engine(loaded_target, serving(policy=policy), draft_dir=draft_dir, calibration_file=None),
            loaded_target,
        )
        for policy in ("off", "fixed", "threshold")
    }
    assert drafted["off"] == 0 < drafted["threshold"] < drafted["fixed"]


def test_the_calibration_moves_the_threshold(loaded_target: Target, draft_dir: Path, tmp_path: Path) -> None:
    spec = serving(policy="threshold", threshold=0.3)
    counts = []
    for temperature in (1.0, 9.0):
        file = calibration_file(tmp_path, (temperature,) * 4)
        counts.append(
            num_drafted(build_engine(loaded_target, spec, draft_dir=draft_dir, calibration_file=file), loaded_target)
        )
    assert counts[0] != counts[1]


@pytest.mark.parametrize("given", [True, False])
def test_who_drafts_may_be_chosen(loaded_target: Target, draft_dir: Path, given: bool) -> None:
    folder = draft_dir if given else None
    drafted = {
        proposer: num_drafted(
            build_engine(loaded_target, serving(proposer=proposer), draft_dir=folder, calibration_file=None),
            loaded_target,
        )
        for proposer in ("draft", "prompt_lookup", "none")
    }
    assert (drafted["draft"] > 0) == given
    assert drafted["prompt_lookup"] > 0 == drafted["none"]


def test_limits_come_from_spec_and_target(loaded_target: Target) -> None:
    engine = build_engine(loaded_target, serving(max_context=5000), draft_dir=None, calibration_file=None)
    engine.submit(EngineRequest("fits", (1,), SamplingParams(loaded_target.max_context - 1)))
    with pytest.raises(InputError, match="at most 1024"):
        engine.submit(EngineRequest("too long", (1,), SamplingParams(loaded_target.max_context)))


def test_misfits_and_damage_are_refused(loaded_target: Target, draft_dir: Path, tmp_path: Path) -> None:
    config = replace(tiny_draft_config(loaded_target.config), num_target_layers=9)
    for name, data in to_files(random_draft(config, 0)).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(TargetError, match="target layers"):
        load_draft(tmp_path, loaded_target)
    with pytest.raises(FormatError, match="no draft"):
        load_draft(tmp_path / "none", loaded_target)
    (tmp_path / "calibration.json").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        build_engine(loaded_target, serving(), draft_dir=draft_dir, calibration_file=tmp_path / "calibration.json")


def test_a_calibration_for_another_block_size_is_refused(
    loaded_target: Target, draft_dir: Path, tmp_path: Path
) -> None:
    file = calibration_file(tmp_path, (1.0, 1.0))
    with pytest.raises(FormatError, match="block"):
        build_engine(loaded_target, serving(policy="threshold"), draft_dir=draft_dir, calibration_file=file)


@pytest.mark.parametrize("size", [0, 40])
def test_copies_of_the_targets_tensors_must_be_the_targets(size: int, loaded_target: Target, tmp_path: Path) -> None:
    vocab = torch.arange(2, 2 + size) if size else None
    draft = random_draft(tiny_draft_config(loaded_target.config), 0, vocab=vocab)
    head = loaded_target.lm_head_VD if vocab is None else loaded_target.lm_head_VD[vocab]
    frozen = {"embed_tokens.weight": loaded_target.embedding_VD.clone(), "lm_head.weight": head.clone()}

    def loaded() -> DraftModel:
        for name, data in to_files(replace(draft, frozen=frozen)).items():
            (tmp_path / name).write_bytes(data)
        return load_draft(tmp_path, loaded_target)

    assert loaded().frozen == {}
    for name in frozen:
        right = frozen[name].clone()
        frozen[name][3, 5] += 1
        with pytest.raises(TargetError, match=f"another {name}"):
            loaded()
        frozen[name] = right


def test_a_draft_of_speculators_is_served_as_it_is(loaded_target: Target, draft_dir: Path, tmp_path: Path) -> None:
    convert_checkpoint(Conversion(draft_dir, tmp_path / "theirs", "speculators"))
    engines = [
        build_engine(loaded_target, serving(), draft_dir=folder, calibration_file=None)
        for folder in (draft_dir, tmp_path / "theirs")
    ]
    answers = [gather(run_to_completion(engine, greedy(questions(loaded_target, 2), 20))) for engine in engines]
    assert [one.token_ids for one in answers[0].values()] == [one.token_ids for one in answers[1].values()]
    counts = [[one.stats.num_accepted_tokens for one in each.values()] for each in answers]
    assert counts[0] == counts[1] and sum(counts[0]) > 0
