"""From responses to token samples: the mask is exactly what the target produced."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from draftline.cache.shards import Manifest, Shard, decode_shard
from draftline.errors import FormatError, InputError
from draftline.progress import ListProgress
from draftline.spec import RunSpec, derive
from draftline.steps.context import StepContext, StepOutput
from draftline.steps.ledger import StepResult
from draftline.storage.local import LocalStore
from draftline.tokens.station import run, sample_of


def record(*turns: tuple[list[int], list[int]], name: str = "a/0", split: str = "train") -> dict[str, Any]:
    return {
        "id": name,
        "split": split,
        "turns": [{"prompt_ids": prompt, "response_ids": response} for prompt, response in turns],
    }


def masked(one: dict[str, Any], max_length: int = 99) -> list[tuple[int, int]]:
    sample, _ = sample_of(one, max_length)
    return list(zip(sample.input_ids, sample.loss_mask, strict=True))


def test_one_turn() -> None:
    assert masked(record(([1, 2], [3, 4]))) == [(1, 0), (2, 0), (3, 1), (4, 1)]


def test_later_turns_keep_the_marks_of_earlier_answers() -> None:
    first, second = ([1, 2], [3, 4]), ([1, 2, 3, 4, 9, 5], [6])
    assert masked(record(first, second)) == [(1, 0), (2, 0), (3, 1), (4, 1), (9, 0), (5, 0), (6, 1)]


def test_what_a_template_rewrites_loses_its_mark() -> None:
    """The end token of the first answer comes back as something else: marks end where the texts part."""
    first, second = ([1, 2], [3, 4]), ([1, 2, 3, 8, 9], [6])
    assert masked(record(first, second)) == [(1, 0), (2, 0), (3, 1), (8, 0), (9, 0), (6, 1)]
    # A template that drops earlier answers altogether.
    assert masked(record(first, ([1, 7], [6]))) == [(1, 0), (7, 0), (6, 1)]


def test_an_answer_keeps_its_mark_where_the_template_takes_a_thought_out_before_it() -> None:
    """As Qwen3's does without thinking: 7 7 opens an answer, and is gone once the answer is history."""
    first = ([1, 2, 7, 7], [3, 4])
    second = ([1, 2, 3, 4, 9, 7, 7], [6, 4])
    third = ([1, 2, 3, 4, 9, 6, 4, 8, 7, 7], [5])
    marks = "".join(str(mark) for _, mark in masked(record(first, second)))
    assert marks == "0011000" + "11"
    sample, _ = sample_of(record(first, second, third), 99)
    assert sample.input_ids == [*third[0], *third[1]]
    assert "".join(map(str, sample.loss_mask)) == "0011011000" + "1"


def test_answers_are_found_in_their_order() -> None:
    """An answer that the user repeats is marked once, at its own place, and two equal answers at two."""
    first, second = ([1, 7], [3, 4]), ([1, 3, 4, 2, 3, 4, 2, 7], [3, 4])
    assert "".join(str(mark) for _, mark in masked(record(first, second))) == "01100000" + "11"
    third = ([1, 3, 4, 2, 3, 4, 2, 3, 4, 7], [5])
    assert "".join(str(mark) for _, mark in masked(record(first, second, third))) == "0110000110" + "1"


@pytest.mark.parametrize(("limit", "length", "was_cut"), [(4, 4, False), (3, 3, True), (1, 1, True), (9, 4, False)])
def test_long_samples_are_cut_at_the_end(limit: int, length: int, was_cut: bool) -> None:
    sample, cut = sample_of(record(([1, 2], [3, 4])), limit)
    assert (sample.input_ids, cut) == ([1, 2, 3, 4][:length], was_cut)
    assert len(sample.loss_mask) == length


def test_a_conversation_without_an_answer_is_empty() -> None:
    sample, was_cut = sample_of({"id": "a/0", "split": "train", "turns": []}, 9)
    assert (sample.input_ids, sample.loss_mask, was_cut) == ([], [], False)


SPEC = derive(RunSpec(), {"tokens.max_length": 20, "tokens.shard_tokens": 12})


def run_on(
    folder: Path, shards: list[list[dict[str, Any]]], progress: ListProgress | None = None, damage: bytes = b""
) -> tuple[StepOutput, LocalStore]:
    store = LocalStore(folder)
    store.create()
    names = []
    digests = {}
    for number, records in enumerate(shards):
        names.append(f"shard-{number:05d}.jsonl")
        lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
        store.put(f"responses/r/{names[-1]}", lines.encode() + damage)
        digests[names[-1]] = hashlib.sha256(lines.encode()).hexdigest()
    responses = StepResult("responses", "r", outputs={"shards": names, "sha256": digests, "target": "fingerprint"})
    context = StepContext("tokens", "t", SPEC, store, {"responses": responses}, progress=progress or ListProgress())
    return run(context), store


def shards_of(output: StepOutput, store: LocalStore) -> dict[str, Shard]:
    manifest = Manifest.from_json(output.outputs, kind="tokens")
    return {s.name: decode_shard(store.get(f"tokens/t/{s.name}"), origin=s.name, expected=s) for s in manifest.shards}


def test_records_become_shards_by_split_with_counts(tmp_path: Path) -> None:
    records = [
        record(([1, 2], [3, 4, 5]), name="a/0"),
        record(([1], [6]), name="short/0"),
        record(([1, 2], [3] * 30), name="long/0"),
        record(([1, 2], [5, 6]), name="v/0", split="validation"),
        record(([1, 8, 2, 8], [3, 5, 7]), name="b/0"),
        {**record(name="silent/0"), "messages": [{"content": "line\u2028separator"}]},
    ]
    progress = ListProgress()
    output, store = run_on(tmp_path, [records[:3], records[3:]], progress)
    shards = shards_of(output, store)
    assert {name: list(shard.ids) for name, shard in shards.items()} == {
        "train-00000.safetensors": ["a/0", "long/0"],
        "train-00001.safetensors": ["b/0"],
        "validation-00000.safetensors": ["v/0"],
    }
    assert list(shards) == sorted(shards)
    first = shards["train-00000.safetensors"].tensors
    assert first["cu_seqlens"].tolist() == [0, 5, 25]
    assert first["input_ids"].tolist() == [1, 2, 3, 4, 5, 1, 2, *[3] * 18]
    assert first["loss_mask"].tolist() == [0, 0, 1, 1, 1, 0, 0, *[1] * 18]
    assert (output.outputs["num_cut"], output.outputs["num_empty"]) == (1, 2)
    assert output.outputs["target"] == "fingerprint"
    assert dict(output.metrics) == {"num_samples": 4.0, "num_tokens": 36.0}
    # Of training samples: produced tokens, likeliest first, ties by id; then in the same way what is only asked.
    counts = json.loads(store.get("tokens/t/counts.json"))
    assert counts == [[3, 20], [5, 2], [4, 1], [7, 1], [1, 3], [2, 3], [8, 2]]
    assert [(event.done, event.total) for event in progress.events] == [(1, 2), (2, 2)]


def test_equal_responses_give_equal_bytes(tmp_path: Path) -> None:
    records = [record(([1, 2], [n, 4, 5]), name=f"{n}/0") for n in range(9)]
    (one, first), (two, second) = (run_on(tmp_path / name, [records]) for name in "ab")
    assert one == two
    for info in Manifest.from_json(one.outputs, kind="tokens").shards:
        assert first.get(f"tokens/t/{info.name}") == second.get(f"tokens/t/{info.name}")


def test_nothing_to_train_on_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training sample"):
        run_on(tmp_path, [[record(([1], [2, 3]), split="validation"), record(([1], [2]))]])


def test_changed_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not what its step wrote"):
        run_on(tmp_path, [[record(([1, 2], [3, 4]))]], damage=b"\n")
