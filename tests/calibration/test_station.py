"""Calibration by decoding for real, and the cost tables."""

from __future__ import annotations

import random
from dataclasses import replace

from draftline.calibration.profile import EngineSize, profile_costs
from draftline.calibration.station import calibrate, read_prompts
from draftline.calibration.survival import Calibration
from draftline.spec import derive
from draftline.target.load import Target
from tests.servers.tiny_target import bigram_draft, grammar_pair, random_draft, tiny_draft_config
from tests.training.cases import SPEC

QUESTIONS = [grammar_pair(random.Random(seed))[0] for seed in range(14)]
PROMPTS: list[dict[str, object]] = [{"system": None, "turns": [question]} for question in QUESTIONS]
FAST = derive(SPEC, {"calibration.profile_cost": False, "calibration.max_new_tokens": 24, "target.dtype": "fp32"})


def test_it_fits_what_the_engine_did(loaded_target: Target) -> None:
    draft = bigram_draft(loaded_target)
    seen: list[tuple[float, float]] = []
    fitted = calibrate(FAST, loaded_target, draft, PROMPTS, lambda done, total: seen.append((done, total)))
    assert len(fitted.temperatures) == draft.config.block_size
    assert fitted.num_samples >= 50
    assert sum(fitted.ece_after) < sum(fitted.ece_before)
    survival = fitted.expected_survival
    assert survival is not None and len(survival) == draft.config.block_size
    assert 1 > survival[0] > survival[-1] > 0 and list(survival) == sorted(survival, reverse=True)
    assert [done for done, _ in seen] == list(range(1, 15)) and seen[-1] == (14, 14)
    assert fitted == calibrate(FAST, loaded_target, draft, PROMPTS)


def test_nothing_to_fit_keeps_the_identity(loaded_target: Target) -> None:
    assert calibrate(FAST, loaded_target, bigram_draft(loaded_target), []) == Calibration.identity(4)
    config = replace(
        tiny_draft_config(loaded_target.config), enable_confidence_head=False, confidence_with_markov=False
    )
    assert calibrate(FAST, loaded_target, random_draft(config, 0), PROMPTS[:2]) == Calibration.identity(3)


def test_prompts_that_do_not_fit_are_left_out(loaded_target: Target) -> None:
    long: list[dict[str, object]] = [{"system": None, "turns": ["x" * 3000]}]
    assert calibrate(FAST, loaded_target, bigram_draft(loaded_target), long) == Calibration.identity(4)


def test_costs_are_profiled(loaded_target: Target) -> None:
    table = profile_costs(loaded_target, bigram_draft(loaded_target), EngineSize(3, 160, 4))
    assert table.requests == (1, 2, 3) and table.draft_requests == (1, 2, 3)
    assert {r * each for r in (1, 2, 3) for each in (1, 2, 4, 5)} == set(table.tokens)
    assert table.covers(3, 15) and table.context_tokens == 80
    assert {"machine", "threads", "dtype", "target", "draft"} == set(table.facts)


def test_read_prompts() -> None:
    data = '{"turns": ["a\u2028b"]}\n{"turns": ["c"]}\n'.encode()
    assert [record["turns"] for record in read_prompts(data, 0)] == [["a\u2028b"], ["c"]]
    assert len(read_prompts(data, 1)) == 1
