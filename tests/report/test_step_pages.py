"""Pages of single steps for the Kubeflow UI: whole, self-contained, and with the step's own figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftline.gate import judge
from draftline.report.step_pages import render_step_page
from draftline.spec import RunSpec
from draftline.spec.models import GateSpec
from draftline.steps import StepResult
from draftline.storage import ObjectStore, open_store
from tests.report import examples


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "workspace"))


@pytest.mark.parametrize(
    ("label", "headings", "num_plots"),
    [
        ("draft", ["Training", "Figures"], 1),
        ("calibration", ["Calibration"], 1),
        (
            "evaluation:humaneval",
            ["Results", "Losslessness", "Accepted length by domain", "Acceptance by position", "Calibration",
             "Verifying less"],
            4,
        ),
    ],
)  # fmt: skip
def test_a_step_shows_its_part_of_the_card(store: ObjectStore, label: str, headings: list[str], num_plots: int) -> None:
    results = examples.trained(store)
    inputs = {name: result for name, result in results.items() if name in ("draft", "calibration") and name != label}
    page = render_step_page(RunSpec(), store, inputs, results[label])
    assert [part.partition("</h2>")[0] for part in page.split("<h2>")[1:]] == headings
    assert page.count("data:image/png;base64,") == page.count("<img") == num_plots
    assert "<script" not in page and "://" not in page


def test_a_suites_page_tells_its_own_figures_and_no_other_suites(store: ObjectStore) -> None:
    suites = {
        "held-out": examples.evaluation_outputs("held-out", accepted_length=2.6),
        "mine": examples.evaluation_outputs("mine", accepted_length=4.25),
    }
    results = examples.trained(store, suites=suites)
    page = render_step_page(RunSpec(), store, results, results["evaluation:mine"])
    assert "<b>4.25</b>" in page
    assert "held-out" not in page


def test_the_gates_page_names_every_rule(store: ObjectStore) -> None:
    verdict = judge(GateSpec(min_accepted_length=9.0), {"held-out": examples.evaluation_outputs("held-out")}, {}, None)
    result = StepResult("gate", "k", outputs={**verdict.to_document(), "alias": "challenger"})
    page = render_step_page(RunSpec(), store, {}, result)
    assert "Not passed: the version is <code>challenger</code> now" in page
    assert page.count("<tr>") == 1 + len(verdict.reasons)
    assert page.count("<strong>fails</strong>") == sum(not reason.ok for reason in verdict.reasons) > 0


def test_a_step_without_a_page_is_refused(store: ObjectStore) -> None:
    with pytest.raises(ValueError, match="tokens has no page"):
        render_step_page(RunSpec(), store, {}, StepResult("tokens", "k"))
