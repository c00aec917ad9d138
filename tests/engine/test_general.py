"""Engines whose target runs by transformers' own forward: greedy output is ``generate``'s, token for token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftline.draft.prompt_lookup import PromptLookup
from draftline.engine.engine import Engine
from draftline.scheduling.policies import FixedPolicy, ThresholdPolicy
from draftline.spec import TargetSpec
from draftline.target.load import Target, load_target
from tests.counted_forward import count_rows
from tests.engine.runs import answer, greedy, make_engine, questions
from tests.servers.tiny_target import random_draft, tiny_draft_config
from tests.target.test_general import family_config
from tests.target.test_lean import save_model

MAX_TOKENS = 24


@pytest.fixture(
    scope="module",
    params=["qwen2", "olmo3", "granite", "gpt_neox", "opt", "gemma2", "qwen3_moe", "deepseek_v3"],
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target")
    save_model(family_config(request.param), path)
    return path


@pytest.fixture(scope="module")
def target(folder: Path) -> Target:
    return load_target(TargetSpec(source=str(folder)), dtype="fp32")


@pytest.fixture(scope="module")
def prompts(target: Target) -> list[tuple[int, ...]]:
    """Ragged; the last two share a beginning with an earlier one."""
    found = [prompt[-90:] for prompt in questions(target, 5)]
    longest = max(found, key=len)
    return [*found, (*longest, 17), (*longest, 18, 19)]


@pytest.fixture(scope="module")
def expected(folder: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """What ``generate`` says, each prompt alone, by plain attention."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return [
        model.generate(torch.tensor([prompt]), max_new_tokens=MAX_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


@pytest.mark.parametrize("kind", ["none", "lookup", "draft"])
@pytest.mark.parametrize(("slots", "prefill_tokens"), [(1, 512), (4, 9)])
def test_output_is_that_of_generate(
    target: Target,
    prompts: list[tuple[int, ...]],
    expected: list[list[int]],
    kind: str,
    slots: int,
    prefill_tokens: int,
) -> None:
    engine: Engine
    if kind == "draft":
        config = tiny_draft_config(target.config)
        draft = random_draft(replace(config, num_heads=4, num_kv_heads=2, head_dim=16), 1)
        engine = make_engine(
            target, draft, ThresholdPolicy(0.1), slots=slots, context=128, prefill_tokens=prefill_tokens
        )
    else:
        engine = make_engine(target, policy=FixedPolicy(), slots=slots, context=128, prefill_tokens=prefill_tokens)
        if kind == "lookup":
            engine.swap_proposer(lambda room: PromptLookup(room, 4))
    found = answer(engine, greedy(prompts, MAX_TOKENS))
    assert [found[f"r{number}"].token_ids for number in range(len(prompts))] == expected
    if kind != "none":
        assert sum(one.stats.num_draft_tokens for one in found.values()) > 0


def test_a_known_beginning_is_not_computed_again(
    target: Target, prompts: list[tuple[int, ...]], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(target, slots=2, context=128)
    rows = count_rows(target, monkeypatch)
    first, second = prompts[-2:]
    assert answer(engine, greedy([first], MAX_TOKENS))["r0"].token_ids == expected[-2]
    rows.clear()
    assert answer(engine, greedy([second], MAX_TOKENS))["r0"].token_ids == expected[-1]
    assert rows[0] == 2
