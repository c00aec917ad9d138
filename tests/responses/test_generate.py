"""The target's answers: equal to ``transformers``' where greedy, and a function of the shard alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftline.responses.generate import answer_shard, prompt_ids
from draftline.responses.plan import Conversation, plan_shards
from draftline.spec import ResponsesSpec
from draftline.steps.ledger import StepResult
from draftline.storage.local import LocalStore
from draftline.target.load import Target

SPEC = ResponsesSpec.model_validate({"max_new_tokens": 24, "sampling": {"temperature": 1.0, "top_p": 0.95}})
QUESTIONS = ("where is my parcel 1?", "where is my refund 7?", "where is my letter 3?")


def conversation(
    number: int, turns: tuple[str, ...], *, is_greedy: bool = True, system: str | None = None
) -> Conversation:
    return Conversation(f"p{number}/0", "desk", "train", system, turns, is_greedy)


CONVERSATIONS = [
    conversation(0, QUESTIONS[:1]),
    conversation(1, QUESTIONS, system="be kind"),
    conversation(2, QUESTIONS[1:], is_greedy=False),
    conversation(3, QUESTIONS[1:], is_greedy=False),
]


def answered(target: Target, conversations: list[Conversation], **options: Any) -> list[dict[str, Any]]:
    data = answer_shard(target, SPEC, options.pop("seed", 5), conversations, options.pop("max_context", 300), **options)
    return [json.loads(line) for line in data.split(b"\n") if line]


@pytest.fixture(scope="module")
def records(loaded_target: Target) -> list[dict[str, Any]]:
    return answered(loaded_target, CONVERSATIONS)


def test_greedy_answers_are_those_of_transformers(
    loaded_target: Target, tiny_target: Path, records: list[dict[str, Any]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    turns = [turn for record in records[:2] for turn in record["turns"]]
    assert len(turns) == 4
    for turn in turns:
        ids = torch.tensor([turn["prompt_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=SPEC.max_new_tokens, do_sample=False
        )
        assert turn["response_ids"] == out[0, ids.shape[1] :].tolist()
        ended = turn["response_ids"][-1] in loaded_target.eos_token_ids
        assert turn["finish_reason"] == ("stop" if ended else "length")


def test_turns_are_built_from_the_answers(loaded_target: Target, records: list[dict[str, Any]]) -> None:
    record = records[1]
    assert record["id"] == "p1/0" and record["split"] == "train" and record["domain"] == "desk"
    assert [m["role"] for m in record["messages"]] == ["system", *["user", "assistant"] * 3]
    assert record["messages"][0]["content"] == "be kind"
    for number, turn in enumerate(record["turns"]):
        before = record["messages"][: 2 + 2 * number]
        assert turn["prompt_ids"] == list(prompt_ids(loaded_target, before))
        said = loaded_target.tokenizer.decode(turn["response_ids"], skip_special_tokens=True)
        assert record["messages"][2 + 2 * number] == {"role": "assistant", "content": said}


def test_a_shard_is_repeated_to_the_byte(loaded_target: Target) -> None:
    one, two = (answer_shard(loaded_target, SPEC, 5, CONVERSATIONS, 300) for _ in range(2))
    assert one == two


def test_seeds_and_ids_make_the_difference(loaded_target: Target, records: list[dict[str, Any]]) -> None:
    assert records[2]["turns"][0]["prompt_ids"] == records[3]["turns"][0]["prompt_ids"]
    assert records[2]["turns"] != records[3]["turns"], "two samples of one prompt must differ"
    other = answered(loaded_target, CONVERSATIONS, seed=6)
    assert other[:2] == records[:2], "greedy answers have no seed"
    assert other[2]["turns"] != records[2]["turns"]


def test_company_does_not_change_an_answer(loaded_target: Target, records: list[dict[str, Any]]) -> None:
    for conversation_, record in zip(CONVERSATIONS, records, strict=True):
        assert answered(loaded_target, [conversation_]) == [record]


def test_turns_without_room_are_dropped_with_all_after_them(
    loaded_target: Target, records: list[dict[str, Any]]
) -> None:
    second = records[1]["turns"][1]
    room = len(second["prompt_ids"]) + SPEC.max_new_tokens
    enough, short = (answered(loaded_target, CONVERSATIONS[1:2], max_context=size)[0] for size in (room, room - 1))
    assert enough["turns"] == records[1]["turns"][:2]
    assert short["turns"] == records[1]["turns"][:1]
    assert [message["role"] for message in short["messages"]][-2:] == ["user", "assistant"], "a question is left over"
    nothing = answered(loaded_target, CONVERSATIONS[1:2], max_context=SPEC.max_new_tokens + 2)[0]
    assert nothing["turns"] == [] and "user" not in {message["role"] for message in nothing["messages"]}


def test_progress_ends_at_the_number_of_turns(loaded_target: Target) -> None:
    seen: list[float] = []
    answered(loaded_target, CONVERSATIONS, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(sum(len(c.turns) for c in CONVERSATIONS))


def test_the_plan_cuts_all_splits_into_shards(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.create()
    splits = {"train": 3, "validation": 2, "calibration": 1, "test": 2}
    for split, count in splits.items():
        lines = [
            json.dumps({"id": f"{split}{n}", "domain": "d", "system": None, "turns": ["a\u2028b"]}, ensure_ascii=False)
            for n in range(count)
        ]
        store.put(f"prompts/k/{split}.jsonl", "".join(line + "\n" for line in lines).encode())
    prompts = StepResult("prompts", "k", outputs={"files": {split: f"{split}.jsonl" for split in splits}})
    spec = ResponsesSpec.model_validate({"samples_per_prompt": 2, "greedy_first": True, "shard_prompts": 4})
    shards = plan_shards(store, prompts, spec)
    assert [len(shard) for shard in shards] == [4, 4, 1]
    flat = [c for shard in shards for c in shard]
    assert [(c.sample_id, c.split, c.is_greedy) for c in flat] == [
        *((f"train{n}/{i}", "train", i == 0) for n in range(3) for i in range(2)),
        *((f"validation{n}/0", "validation", True) for n in range(2)),
        ("calibration0/0", "calibration", True),
    ]
    assert flat[0].turns == ("a\u2028b",)
    plain = plan_shards(store, prompts, replace_spec(spec, greedy_first=False))
    assert not any(c.is_greedy for shard in plain for c in shard)


def replace_spec(spec: ResponsesSpec, **changes: object) -> ResponsesSpec:
    return ResponsesSpec.model_validate({**spec.model_dump(), **changes})
