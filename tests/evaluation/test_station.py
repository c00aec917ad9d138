"""The evaluation station on a stored draft, from prompts to figures."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import to_files
from draftline.errors import FormatError, InputError
from draftline.evaluation.station import evaluate
from draftline.progress import ListProgress
from draftline.spec import RunSpec, derive
from draftline.steps.context import StepContext
from draftline.steps.ledger import StepResult
from draftline.storage.local import LocalStore
from draftline.target.load import Target
from tests.servers.tiny_target import bigram_draft, grammar_pair


@pytest.fixture
def context(tiny_target: Path, loaded_target: Target, tmp_path: Path) -> StepContext:
    store = LocalStore(tmp_path)
    store.create()
    spec = derive(
        RunSpec(),
        {
            "target.source": str(tiny_target),
            "target.dtype": "fp32",
            "evaluation.max_prompts": 4,
            "evaluation.sampled_prompts": 3,
            "evaluation.max_new_tokens": 20,
            "evaluation.timing_prompts": 2,
            "evaluation.hf_prompts": 1,
            "evaluation.lossless_prompts": 6,
            "evaluation.lossless_tokens": 16,
            "serving.max_context": 100,
        },
    )
    lines = [
        json.dumps({"id": f"p{n}", "domain": "desk", "system": None, "turns": [grammar_pair(random.Random(n))[0]]})
        for n in range(6)
    ]
    lines.append(json.dumps({"id": "long", "domain": "desk", "system": None, "turns": ["x" * 500]}))
    store.put("prompts/p/test.jsonl", "".join(line + "\n" for line in lines).encode())
    files = to_files(bigram_draft(loaded_target))
    for name, data in files.items():
        store.put(f"draft/d/draft/{name}", data)
    store.put("calibration/c/calibration.json", Calibration.identity(4).to_json().encode())
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    inputs = {
        "prompts": StepResult("prompts", "p", outputs={"files": {"test": "test.jsonl"}}),
        "draft": StepResult("draft", "d", outputs={"files": digests}),
        "calibration": StepResult("calibration", "c", outputs={"file": "calibration.json"}),
    }
    return StepContext("evaluation", "e", spec, store, inputs, "held-out", ListProgress())


def test_all_figures_of_the_held_out_suite(context: StepContext) -> None:
    output = evaluate(context)
    figures = output.outputs
    assert (figures["suite"], figures["num_prompts"]) == ("held-out", 4)
    assert figures["lossless"] == {
        "verdict": "lossless",
        "num_prompts": 6,
        "num_equal": 6,
        "first_difference": None,
    }
    assert 1 < figures["accepted_length"] <= 5
    assert list(figures["domains"]) == ["desk"]
    assert len(figures["acceptance_by_position"]) == len(figures["survival_by_position"]) == 4
    assert set(figures["tokens_per_s"]) == {"speculative", "plain", "transformers"}
    assert json.loads(json.dumps(figures)) == figures
    greedy, sampled = figures["by_temperature"]
    assert (greedy["temperature"], sampled["temperature"]) == (0.0, 1.0)
    assert (greedy["num_prompts"], sampled["num_prompts"]) == (4, 3)
    assert greedy["accepted_length"] == figures["accepted_length"] != sampled["accepted_length"]
    assert output.metrics["accepted_length_at_1"] == sampled["accepted_length"]
    for one in (greedy, sampled):
        assert set(one["confidence"]) == {"before", "after"} and len(one["threshold_sweep"]) == 9
        assert one["domains"]["desk"]["accepted_length"] == one["accepted_length"]
        assert one["bytes_per_call"] > one["accepted_length"]
    assert figures["num_left_out"] == 1
    scalars = {"num_prompts", "num_tokens", "accepted_length", "speedup_over_plain", "speedup_over_transformers", "ece"}
    assert scalars <= set(output.metrics)
    assert all(output.metrics[name] == figures[name] for name in scalars)
    progress = context.progress
    assert isinstance(progress, ListProgress)
    done = [event.done for event in progress.events]
    assert done == sorted(done)
    assert (done[-1], {event.total for event in progress.events}) == (19.0, {19.0})
    assert {event.step for event in progress.events} == {"evaluation:held-out"}


def test_nothing_that_fits_is_an_input_error(context: StepContext) -> None:
    spec = derive(context.spec, {"serving.max_context": 22})
    with pytest.raises(InputError, match="no prompt of the suite fits"):
        evaluate(StepContext("evaluation", "e", spec, context.store, context.inputs, "held-out"))


def test_a_damaged_draft_or_calibration_is_a_format_error(context: StepContext) -> None:
    context.store.put("calibration/c/calibration.json", b"{")
    with pytest.raises(FormatError, match="calibration file is damaged"):
        evaluate(context)
    context.store.put("draft/d/draft/config.json", b"{}")
    with pytest.raises(FormatError, match="not what was trained"):
        evaluate(context)


def test_a_suite_of_several_turns_from_a_file(context: StepContext, tmp_path: Path) -> None:
    turns = [grammar_pair(random.Random(n))[0] for n in range(4)]
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"turns": turns[:2], "domain": "chat"}) + "\n" + json.dumps({"turns": turns[2:]}) + "\n")
    overrides = {"suites": ["held-out", "mine"], "suite_files": {"mine": str(file)}, "temperatures": [0.0]}
    spec = derive(context.spec, {f"evaluation.{name}": value for name, value in overrides.items()})
    spec = derive(spec, {"serving.max_context": 300})
    figures = evaluate(StepContext("evaluation", "e", spec, context.store, context.inputs, "mine")).outputs
    assert (figures["num_prompts"], figures["num_turns"]) == (2, 4)
    assert list(figures["domains"]) == ["chat", "general"]
    assert figures["lossless"]["verdict"] == "not-checked"
    assert len(figures["by_temperature"]) == 1
