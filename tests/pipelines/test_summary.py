"""The closing table from hand-made results."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from draftline.steps import StepResult
from pipelines.summary import render_summary


def evaluation(suite: str, **outputs: Any) -> StepResult:
    base = {
        "suite": suite,
        "num_prompts": 64,
        "num_tokens": 8192,
        "accepted_length": 2.512,
        "acceptance_by_position": [0.8, 0.751, 0.62],
        "tokens_per_s": {"speculative": 71.24, "plain": 40.0, "transformers": 22.5},
        "speedup_over_plain": 1.781,
        "speedup_over_transformers": 3.17,
        "lossless": {"verdict": "lossless", "num_prompts": 50, "num_equal": 50, "first_difference": None},
        "ece": 0.0416,
        "bytes_per_call": 10.26,
        "by_temperature": [
            {"temperature": 0.0, "accepted_length": 2.512},
            {"temperature": 1.0, "accepted_length": 2.104 if suite == "held-out" else None},
        ],
    }
    return StepResult("evaluation", "e" * 20, suite, {}, {**base, **outputs})


def shown(results: Mapping[str, StepResult]) -> str:
    output = io.StringIO()
    Console(file=output, width=100).print(render_summary(results))
    return output.getvalue()


def row(text: str, label: str) -> list[str]:
    """The cells of the table row with a label."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"│ {label}")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_every_number_is_where_it_belongs() -> None:
    text = shown(
        {
            "draft": StepResult(
                "draft", "d", outputs={"num_parameters": 12_340_000, "draft_vocab_size": 8192},
                metrics={"train_seconds": 432.0},
            ),
            "evaluation:held-out": evaluation("held-out"),
            "evaluation:humaneval": evaluation(
                "humaneval",
                accepted_length=1.9,
                acceptance_by_position=[0.6, 0.5],
                tokens_per_s={"speculative": 50.0, "plain": 41.0, "transformers": None},
                speedup_over_plain=1.22,
                speedup_over_transformers=None,
                lossless={"verdict": "diverged", "num_prompts": 50, "num_equal": 49, "first_difference": "p1 at 7"},
                ece=None,
            ),
            "register": StepResult("register", "r", outputs={"model_name": "support-desk", "version": "3"}),
            "gate": StepResult(
                "gate", "g",
                outputs={"passed": False, "alias": "challenger", "reasons": [
                    {"rule": "lossless", "ok": False, "got": "diverged", "needs": "lossless"},
                    {"rule": "accepted length on held-out", "ok": True, "got": 2.512, "needs": 1.5},
                ]},
            ),
        }
    )  # fmt: skip
    assert row(text, "accepted length (") == ["2.51", "1.90"]
    assert row(text, "accepted length at temperature 1") == ["2.10", "-"]
    assert row(text, "bytes of text") == ["10.3", "10.3"]
    assert row(text, "tokens/s with the draft") == ["71.2", "50.0"]
    assert row(text, "tokens/s plain") == ["40.0", "41.0"]
    assert row(text, "tokens/s transformers") == ["22.5", "-"]
    assert row(text, "speed-up over plain") == ["1.78x", "1.22x"]
    assert row(text, "speed-up over transformers") == ["3.17x", "-"]
    assert row(text, "output equals plain") == ["lossless 50/50", "diverged 49/50"]
    assert row(text, "calibration error") == ["0.042", "-"]
    assert row(text, "prompts / new tokens") == ["64 / 8,192", "64 / 8,192"]
    assert row(text, "held-out") == ["80 %", "75 %", "62 %"]
    assert row(text, "humaneval") == ["60 %", "50 %", ""]
    assert "Draft: 12.3 M parameters, 8,192 words of vocabulary, trained in 7.2 min" in text
    assert "Registered: support-desk version 3, alias challenger" in text
    assert "Gate: refused, not deployed" in text
    assert "✘ lossless: diverged (needs lossless)" in text
    assert "✔ accepted length on held-out: 2.51 (needs 1.5)" in text


def test_many_suites_are_rows() -> None:
    names = ["held-out", "aime25", "gsm8k", "livecodebench", "mt-bench"]
    text = shown({f"evaluation:{name}": evaluation(name) for name in names})
    proof = text.split("Acceptance by position")[0]
    assert row(proof, "held-out") == ["64", "2.51", "2.10", "10.3", "1.78x", "0.042", "lossless 50/50"]
    assert row(proof, "livecodebench")[2] == "-"


def test_a_passed_gate_and_missing_stations() -> None:
    text = shown({"gate": StepResult("gate", "g", outputs={"passed": True, "alias": "champion", "reasons": []})})
    assert text.strip() == "Gate: passed"
    assert shown({}).strip() == ""


def test_text_in_results_is_never_markup() -> None:
    reasons = [{"rule": "[red]rule[/red]", "ok": True, "got": "[/x]", "needs": True}]
    text = shown({"gate": StepResult("gate", "g", outputs={"passed": True, "reasons": reasons})})
    assert "✔ [red]rule[/red]: [/x] (needs yes)" in text
