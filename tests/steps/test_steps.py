"""Content keys that mean what they say, and a ledger with one winner."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftline.errors import FormatError, StepError
from draftline.progress import ListProgress
from draftline.prompts.source import read_source
from draftline.spec import RunSpec, derive
from draftline.steps import STATIONS, Ledger, StepContext, StepOutput, StepResult, content_key, step_prefix
from draftline.steps import execute as execute_module
from draftline.steps.execute import execute, load_function, outside_facts
from draftline.steps.stations import neutral_key
from draftline.storage.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    made = LocalStore(tmp_path)
    made.create()
    return made


def keys(spec: RunSpec) -> dict[str, str]:
    """Keys of the whole DAG with one suite and pinned facts."""
    found: dict[str, str] = {}
    known: dict[str, str] = {}
    for name, station in STATIONS.items():
        inputs: dict[str, str] = {}
        for source in station.inputs:
            inputs["evaluation:held-out" if source == "evaluation" else source] = known[source]
        facts = {"prompts": {"source": "s"}, "responses": {"target": "t"}, "evaluation": {"item": "held-out"}}
        found[name] = content_key(station, spec, inputs, facts.get(name))
        known[name] = neutral_key(station, spec, inputs, facts.get(name))
    return found


BASE = RunSpec()
PINNED = derive(
    BASE,
    {"name": "pinned", "seed": 5, "draft.num_layers": 2, "train.steps": 7, "prompts.limit": 9, "target.dtype": "fp32"},
)


def test_golden_keys_of_a_pinned_spec(check_golden: Any) -> None:
    """A change here makes every finished step in every workspace run again: intend it, or undo it."""
    check_golden(json.dumps(keys(PINNED), indent=1) + "\n", Path(__file__).parent / "golden" / "keys.json")


def changed(overrides: Mapping[str, Any]) -> set[str]:
    """Stations whose keys differ from the default spec's."""
    before, after = keys(BASE), keys(derive(BASE, overrides))
    return {name for name in STATIONS if before[name] != after[name]}


FROM_RESPONSES = {*STATIONS} - {"prompts"}
FROM_DRAFT = FROM_RESPONSES - {"responses", "tokens", "hidden-states"}
FROM_REPORT = {"report", "register", "gate", "deploy"}


@pytest.mark.parametrize(
    ("overrides", "stations"),
    [
        ({"workspace": "elsewhere"}, set()),
        ({"responses.workers": 7}, set()),
        ({"cache.workers": 7}, set()),
        ({"seed": 1}, set(STATIONS)),
        ({"prompts.limit": 5}, set(STATIONS)),
        ({"prompts.source": "elsewhere.jsonl"}, set()),
        ({"responses.max_new_tokens": 9}, FROM_RESPONSES),
        ({"responses.threads_per_worker": 1}, FROM_RESPONSES),
        ({"tokens.shard_tokens": 99}, FROM_RESPONSES - {"responses"}),
        ({"cache.codec": "fp32"}, FROM_DRAFT | {"hidden-states"}),
        # The same samples, kept or not: whoever trains on them does the same work.
        ({"cache.mode": "stream"}, {"hidden-states"}),
        ({"cache.stream_ahead_shards": 9}, set()),
        ({"draft.num_taps": 3}, FROM_DRAFT | {"hidden-states"}),
        ({"draft.num_layers": 3}, FROM_DRAFT),
        ({"train.steps": 3}, FROM_DRAFT),
        ({"train.num_workers": 2}, set()),
        ({"train.threads_per_worker": 7}, set()),
        ({"train.parallel": "fsdp"}, set()),
        ({"train.micro_batch": 2}, set()),
        ({"train.checkpoint_every_steps": 3, "train.keep_checkpoints": 5}, set()),
        ({"train.precision": "bf16"}, FROM_DRAFT),
        ({"train.epochs": 2}, FROM_DRAFT),
        ({"train.early_stop_patience": 2}, FROM_DRAFT),
        ({"train.validation_samples": 9}, FROM_DRAFT),
        ({"train.loss.ce": 0.3}, FROM_DRAFT),
        ({"calibration.max_prompts": 3}, FROM_DRAFT - {"draft"}),
        ({"evaluation.max_prompts": 3}, FROM_REPORT | {"evaluation"}),
        ({"evaluation.suites": ["held-out"]}, set()),
        ({"evaluation.suite_files": {"desk": "somewhere.jsonl"}}, set()),
        ({"evaluation.temperatures": [0.0]}, FROM_REPORT | {"evaluation"}),
        ({"evaluation.sampled_prompts": 5}, FROM_REPORT | {"evaluation"}),
        ({"gate.min_speedup": 9.0}, {"gate", "deploy"}),
        ({"serving.max_requests": 3}, {"deploy"}),
        ({"serving.threshold": 0.3}, FROM_REPORT | {"evaluation"}),
    ],
)
def test_a_field_changes_the_keys_of_those_who_read_it_and_after(overrides: dict[str, Any], stations: set[str]) -> None:
    assert changed(overrides) == stations


def test_every_field_of_a_station_exists() -> None:
    document = BASE.model_dump(mode="json")
    for station in STATIONS.values():
        for field in station.fields:
            node: Any = document
            for part in field.split("."):
                node = node[part]


def test_the_table_is_in_running_order() -> None:
    seen: set[str] = set()
    for station in STATIONS.values():
        assert set(station.inputs) <= seen
        seen.add(station.name)


def test_neutral_fields_are_fields_and_their_values_are_possible() -> None:
    for station in STATIONS.values():
        assert {field for field, _ in station.neutral} <= set(station.fields)
        derive(BASE, dict(station.neutral))


@pytest.mark.usefixtures("_fake_report")
def test_a_result_is_known_by_what_it_gives_not_by_how_it_is_kept(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = replace(
        execute_module.STATIONS["report"], fields=("name", "cache.mode"), neutral=(("cache.mode", "store"),)
    )
    monkeypatch.setattr(execute_module, "STATIONS", {**STATIONS, "report": reports})
    kept = execute("report", BASE, store, INPUTS, ListProgress())
    streamed = execute("report", derive(BASE, {"cache.mode": "stream"}), store, INPUTS, ListProgress())
    assert kept.key != streamed.key and len(CALLS) == 2
    assert kept.identity == streamed.identity == kept.key
    assert "stands_for" not in kept.outputs and streamed.outputs["stands_for"] == kept.key
    # The step after it finds its own result whichever of the two it is given, and says which one it read.
    after = {**STATIONS, "gate": replace(reports, name="gate", inputs=("report",), fields=("name",), neutral=())}
    monkeypatch.setattr(execute_module, "STATIONS", after)
    first = execute("gate", BASE, store, {"report": streamed}, ListProgress())
    assert execute("gate", BASE, store, {"report": kept}, ListProgress()) == first
    assert len(CALLS) == 3 and first.inputs == {"report": streamed.key}


def test_facts_and_branches_enter_the_key() -> None:
    station, inputs = STATIONS["evaluation"], {"prompts": "p", "draft": "d", "calibration": "c"}
    found = {content_key(station, BASE, inputs, {"item": item}) for item in ("held-out", "humaneval")}
    found.add(content_key(station, BASE, inputs))
    found.add(content_key(station, BASE, {**inputs, "draft": "other"}))
    found.add(content_key(replace(station, version=99), BASE, inputs))
    assert len(found) == 5
    assert all(len(key) == 20 and set(key) <= set("0123456789abcdef") for key in found)
    shuffled = dict(reversed(inputs.items()))
    assert content_key(station, BASE, shuffled) == content_key(station, BASE, inputs)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(StepError, match="lacks inputs"):
        content_key(STATIONS["report"], BASE, {"draft": "d", "calibration": "c"})
    content_key(STATIONS["report"], BASE, {"draft": "d", "calibration": "c", "evaluation:humaneval": "e"})


RESULT = StepResult("draft", "k" * 20, "", {"hidden-states": "h"}, {"files": {"a": "b"}, "ids": [1, 2]}, {"loss": 1.5})


def test_results_round_trip() -> None:
    assert StepResult.from_json(RESULT.to_json()) == RESULT
    assert StepResult.from_json(RESULT.to_json().encode()).to_json() == RESULT.to_json()
    assert RESULT.prefix == step_prefix("draft", "k" * 20) == f"draft/{'k' * 20}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("3", "damaged"),
        ("{}", "damaged"),
        (RESULT.to_json()[:-30], "damaged"),
        (json.dumps({**json.loads(RESULT.to_json()), "surprise": 1}), "damaged"),
        (json.dumps({**json.loads(RESULT.to_json()), "version": 2}), "unknown version"),
    ],
)
def test_damaged_and_newer_results_are_refused(store: LocalStore, text: str, message: str) -> None:
    store.put(f"{RESULT.prefix}/result.json", text.encode())
    with pytest.raises(FormatError, match=message):
        Ledger(store).find("draft", RESULT.key)
    with pytest.raises(FormatError, match=message):
        Ledger(store).commit(RESULT)


def test_nothing_is_found_before_a_commit(store: LocalStore) -> None:
    ledger = Ledger(store)
    assert ledger.find("draft", RESULT.key) is None
    assert ledger.commit(RESULT) == RESULT
    assert ledger.find("draft", RESULT.key) == RESULT
    assert ledger.find("draft", "o" * 20) is None


def test_of_many_racers_one_wins_and_all_agree(store: LocalStore) -> None:
    start = threading.Barrier(8)
    agreed: list[StepResult] = []

    def race(number: int) -> None:
        start.wait(30)
        agreed.append(Ledger(store).commit(replace(RESULT, metrics={"racer": float(number)})))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(agreed) == 8
    assert agreed == [Ledger(store).find("draft", RESULT.key)] * 8


CALLS: list[StepContext] = []


@pytest.fixture
def _fake_report(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    fake = replace(STATIONS["report"], run="tests.steps.test_steps:a_report")
    monkeypatch.setattr(execute_module, "STATIONS", {**STATIONS, "report": fake})


def a_report(context: StepContext) -> StepOutput:
    """Stands for the station's function."""
    CALLS.append(context)
    context.store.put(f"{context.scratch}/half.txt", b"half")
    if context.spec.name == "failing":
        raise StepError("no ink")
    return StepOutput({"file": "card.md"}, {"n": 2.0})


INPUTS = {
    name: StepResult(name.partition(":")[0], name[0] * 20)
    for name in ("draft", "calibration", "evaluation:held-out", "evaluation:humaneval")
}


@pytest.mark.usefixtures("_fake_report")
def test_a_finished_step_is_not_run_again(store: LocalStore) -> None:
    progress = ListProgress()
    first = execute("report", BASE, store, INPUTS, progress)
    assert execute("report", BASE, store, INPUTS, progress) == first
    assert [event.state for event in progress.events] == ["started", "finished", "skipped"]
    assert len(CALLS) == 1 and CALLS[0].inputs == INPUTS
    assert dict(first.inputs) == {name: result.key for name, result in INPUTS.items()}
    assert Ledger(store).find("report", first.key) == first
    other = {**INPUTS, "draft": StepResult("draft", "o" * 20)}
    assert execute("report", BASE, store, other, progress).key != first.key
    assert len(CALLS) == 2


@pytest.mark.usefixtures("_fake_report")
def test_scratch_outlives_all_but_the_commit(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Ledger, result: StepResult) -> StepResult:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ledger, "commit", killed)
        execute("report", BASE, store, INPUTS, ListProgress())
    (context,) = CALLS
    left = f"{context.scratch}/half.txt"
    assert [info.key for info in store.list(f"{context.prefix}/")] == [left]
    execute("report", BASE, store, INPUTS, ListProgress())
    assert [info.key for info in store.list(f"{context.prefix}/")] == [f"{context.prefix}/result.json"]
    store.put(left, b"a kill came between commit and clearing")
    execute("report", BASE, store, INPUTS, ListProgress())
    assert len(CALLS) == 2 and list(store.list(f"{context.scratch}/")) == []


@pytest.mark.usefixtures("_fake_report")
def test_a_failure_commits_nothing_and_is_reported(store: LocalStore) -> None:
    progress = ListProgress()
    spec = derive(BASE, {"name": "failing"})
    with pytest.raises(StepError, match="no ink"):
        execute("report", spec, store, INPUTS, progress)
    assert [(event.state, event.note) for event in progress.events] == [("started", ""), ("failed", "no ink.")]
    assert Ledger(store).find("report", CALLS[0].key) is None


def test_effects_run_every_time(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    fake = replace(STATIONS["report"], run="tests.steps.test_steps:a_report", is_effect=True)
    monkeypatch.setattr(execute_module, "STATIONS", {**STATIONS, "report": fake})
    one = execute("report", BASE, store, INPUTS, ListProgress())
    assert execute("report", BASE, store, INPUTS, ListProgress()) == one
    assert len(CALLS) == 2 and Ledger(store).find("report", one.key) is None


def test_a_suite_is_known_by_its_content_and_one_that_overlaps_nothing_trains_nothing_again(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"turns": ["Where do trains go at night?"]}\n')
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "one.jsonl").read_bytes())
    (tmp_path / "two.jsonl").write_text('{"turns": ["Where do trains go by day?"]}\n')

    def spec(name: str) -> RunSpec:
        suites = {"evaluation.suites": ["held-out", "desk"], "evaluation.suite_files": {"desk": str(tmp_path / name)}}
        return derive(BASE, suites)

    def key(name: str, item: str) -> dict[str, str]:
        return outside_facts(STATIONS["evaluation"], spec(name), item)

    assert key("one.jsonl", "desk") == key("copy.jsonl", "desk") != key("two.jsonl", "desk")
    assert key("one.jsonl", "held-out") == key("two.jsonl", "held-out")
    assert "suite" not in key("one.jsonl", "held-out") and "suite" in key("one.jsonl", "humaneval")
    prompts = STATIONS["prompts"]
    assert outside_facts(prompts, spec("one.jsonl"), "") == outside_facts(prompts, BASE, "")
    ticket = json.loads(read_source(BASE.prompts).data.splitlines()[7])
    (tmp_path / "quoted.jsonl").write_text(json.dumps({"turns": ticket["turns"]}) + "\n")
    assert outside_facts(prompts, spec("quoted.jsonl"), "") != outside_facts(prompts, BASE, "")


def test_station_functions_exist() -> None:
    for station in STATIONS.values():
        if not station.on_ray:
            assert callable(load_function(station.run))
    with pytest.raises(StepError, match="does not exist"):
        load_function("draftline.gate:no_such_thing")


def test_every_training_option_is_in_the_key_or_left_out_on_purpose() -> None:
    """A new option that changes bytes must not be forgotten in the station's fields."""
    left_out = {"num_workers", "threads_per_worker", "parallel", "micro_batch", "checkpoint_every_steps"}
    left_out |= {"keep_checkpoints"}
    named = {field.removeprefix("train.") for field in STATIONS["draft"].fields if field.startswith("train.")}
    assert named | left_out == set(type(BASE.train).model_fields)
    assert not named & left_out
