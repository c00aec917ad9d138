"""The report: complete, honest, self-contained and the same bytes each time."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from PIL import Image

from draftline.errors import FormatError
from draftline.report.card import PLOTS, headline, headline_tiles, render_card
from draftline.report.collect import collect, finite, metrics_document
from draftline.report.lines import MAX_LINES, acceptance_figure, sweep_figure
from draftline.report.page import render_page
from draftline.report.plots import (
    Reliability,
    accepted_length_figure,
    reliability_figure,
    render_plots,
    training_figure,
)
from draftline.report.station import run
from draftline.spec import RunSpec, derive
from draftline.steps import StepContext, StepResult
from draftline.storage import open_store
from draftline.storage.base import ObjectStore
from tests.report import examples


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(str(tmp_path / "workspace"))


@pytest.fixture
def context(store: ObjectStore) -> StepContext:
    return examples.context("report", store, examples.trained(store))


@pytest.mark.slow
def test_station_writes_all_files_with_their_digests_twice_the_same(context: StepContext) -> None:
    output = run(context)
    assert set(output.outputs["files"]) == {"card.md", "metrics.json", "report.html", *PLOTS}
    for name, digest in output.outputs["files"].items():
        assert hashlib.sha256(context.store.get(f"{context.prefix}/{name}")).hexdigest() == digest
    assert output.outputs["summary"]["held-out"]["accepted_length"] == 2.6
    assert output.outputs["summary"]["held-out"]["lossless"] == "lossless"
    assert output.metrics["speedup_over_plain/humaneval"] == 1.7
    assert output.metrics["accepted_length_at_1/held-out"] == pytest.approx(2.34)
    assert run(context) == output


def test_pictures_carry_no_date_or_program(context: StepContext) -> None:
    for name, data in render_plots(collect(context)).items():
        image = Image.open(io.BytesIO(data))
        assert set(image.info) <= {"dpi"}, name
        assert image.width > 500
        # Something is drawn: a blank figure has one colour.
        assert len(image.convert("L").getcolors() or range(2)) > 20


@pytest.mark.slow
def test_users_matplotlib_settings_do_not_change_the_bytes(context: StepContext) -> None:
    import matplotlib

    data = collect(context)
    plain = render_plots(data)["loss.png"]
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "black"}):
        assert render_plots(data)["loss.png"] == plain


def test_card_tells_figures_data_limits_and_provenance(context: StepContext) -> None:
    card = render_card(collect(context))
    for expected in (
        "| held-out | 64 | 2.60 | 2.34 | 10.7 | 1.70x | 2.85x | 0.031 | lossless |",
        "| held-out | billing | 9 | 2.80 | 2.52 | 10.7 |",
        "| held-out | 1 | 0.130 | 0.040 | 0.150 | 0.150 | 0.822 |",
        "| 0.2 | 0.44 | 5.40 | 2.34 |",
        "| 0.8 | n/a | 0.60 | 1.56 |",
        "50 of 50 prompts gave the same tokens",
        "in bf16",
        "640 read, dropped: 3 malformed, 17 near duplicate",
        "| hidden-states | `bbbbbbbbbbbbbbbbbbb1` |",
        "Apache-2.0",
        "11,234,567 parameters",
        "| 7 | 0.150 | 0.032 | 0.140 | 0.100 | 0.780 |",
        "num_layers: 1",
    ):
        assert expected in card
    assert all(f"]({name})" in card for name in PLOTS)


@pytest.mark.parametrize(
    ("override", "changes"),
    [({"workspace": "elsewhere"}, False), ({"cache.workers": 7}, False), ({"gate.max_ece": 0.5}, False),
     ({"serving.max_replicas": 4}, False), ({"train.steps": 7}, True)],
)  # fmt: skip
def test_fields_outside_the_reports_key_do_not_change_it(
    store: ObjectStore, override: dict[str, object], changes: bool
) -> None:
    results = examples.trained(store)
    one = render_card(collect(examples.context("report", store, results)))
    other = render_card(collect(examples.context("report", store, results, spec=derive(RunSpec(), override))))
    assert (one != other) is changes


def test_metrics_json_feeds_the_gate_and_holds_no_nan(store: ObjectStore) -> None:
    suites = {"held-out": examples.evaluation_outputs("held-out") | {"ece": math.nan}}
    context = examples.context("report", store, examples.trained(store, suites=suites))
    document = metrics_document(collect(context))
    assert document["suites"]["held-out"]["ece"] is None
    assert document["suites"]["held-out"]["accepted_length"] == 2.6
    assert document["calibration"]["ece_after"] == examples.calibration_outputs()["ece_after"]
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_finite_reaches_every_depth() -> None:
    assert finite({"a": [1.0, math.inf, {"b": (math.nan, "x")}]}) == {"a": [1.0, None, {"b": [None, "x"]}]}


def test_bare_run_still_has_a_report(store: ObjectStore) -> None:
    """No history, no calibration, unmeasured figures, ancestors gone from the workspace."""
    draft = StepResult("draft", "1" * 20, outputs={"files": {}})
    calibration = StepResult("calibration", "2" * 20)
    evaluation = StepResult("evaluation", "3" * 20, "held-out", {"prompts": "4" * 20}, {"accepted_length": None})
    inputs = {"draft": draft, "calibration": calibration, "evaluation:held-out": evaluation}
    context = examples.context("report", store, inputs)
    output = run(context)
    card = context.store.get(f"{context.prefix}/card.md").decode()
    assert "| held-out | n/a | n/a | n/a | n/a | n/a | n/a | not-checked |" in card
    assert "no calibrated confidences" in card
    assert output.metrics == {}


def test_damaged_history_is_named(context: StepContext) -> None:
    context.store.put(f"{context.inputs['draft'].prefix}/history.jsonl", b'{"step": 1}\n{"st')
    with pytest.raises(FormatError, match=r"history\.jsonl is damaged"):
        run(context)


def test_page_is_self_contained_and_runs_nothing_of_the_users(store: ObjectStore) -> None:
    outputs = examples.evaluation_outputs("held-out")
    labels = ("<script>alert(1)</script>", "a | b", "`c | d", "$\\frac{", "![x](http://example.com/x.png)")
    outputs["domains"] = dict.fromkeys(labels, 2.0)
    results = examples.trained(store, suites={"held-out": outputs})
    context = examples.context("report", store, results)
    run(context)
    page = context.store.get(f"{context.prefix}/report.html").decode()
    assert "<script" not in page
    assert page.count('src="data:image/png;base64,') == len(PLOTS)
    assert page.count("src=") == len(PLOTS)
    assert "<td>a | b</td>" in page
    assert "<td>`c | d</td>" in page


def test_page_shows_tables_and_title() -> None:
    page = render_page("# T\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n", {}, title="A & B")
    assert "<title>A &amp; B</title>" in page
    assert "<td>2</td>" in page


def test_headline_names_each_suite() -> None:
    text = headline({"held-out": examples.evaluation_outputs("held-out")})
    assert text == "held-out: accepted length 2.60, 1.70x over plain decoding"


def test_bars_are_labelled_and_missing_values_said() -> None:
    figure = accepted_length_figure({"held-out": {"accepted_length": None}, "humaneval": {"accepted_length": 2.0}})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["n/a", "2.00"]
    assert [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] == [0.0, 2.0]


def test_training_curve_plots_what_was_logged() -> None:
    figure = training_figure(examples.history_lines(100))
    loss = figure.axes[0]
    assert np.asarray(loss.lines[0].get_xdata()).tolist() == list(range(1, 101))
    assert np.asarray(loss.lines[2].get_xdata()).tolist() == [50, 100]


def test_the_card_compares_the_maps(context: StepContext) -> None:
    card = render_card(collect(context))
    assert (
        "*Before* and *after* the chosen map, a slope and a bias per position, on the calibration split, each" in card
    )
    assert "(32 requests in 5 folds)" in card and "Chosen: the simplest of four." in card
    assert "| **bias** | a slope and a bias per position | 0.020 | 0.160 | 0.500 | 0.800 |" in card
    assert "| sts | sequential temperature scaling | 0.060 |" in card


def test_every_temperature_has_its_bar() -> None:
    figure = accepted_length_figure({"held-out": examples.evaluation_outputs("held-out")})
    (axes,) = figure.axes
    bars = [bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)]
    assert bars == pytest.approx([2.6, 2.34, 2.4, 2.16, 2.8, 2.52, 2.5, 2.25])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["temperature 0", "temperature 1"]


def test_few_suites_are_lines_and_many_are_cells() -> None:
    suites = {f"suite-{n}": examples.evaluation_outputs("held-out") for n in range(MAX_LINES + 1)}
    few = dict(list(suites.items())[:2])
    assert [len(axes.lines) for axes in acceptance_figure(few).axes] == [2, 2]
    assert [len(axes.lines) for axes in sweep_figure(few).axes] == [2, 2, 2]
    line = sweep_figure(few).axes[2].lines[0]
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([2.6 * (1 - 0.05 * k) for k in range(9)])
    for figure, columns in ((acceptance_figure(suites), 7), (sweep_figure(suites), 5)):
        for axes in figure.axes:
            assert not axes.lines and len(axes.images) == 1
            assert len(axes.texts) in (columns * len(suites), (columns - 1) * len(suites))
    assert "no confidences" in [text.get_text() for text in sweep_figure({"x": {}}).axes[0].texts]


def test_reliability_on_the_suite_that_the_fit_has_not_seen() -> None:
    found = Reliability.of_suites({"held-out": examples.evaluation_outputs("held-out")})
    assert found.where == "held-out, temperature 0"
    assert found.ece_after[0] == pytest.approx(0.01)
    figure = reliability_figure(found)
    assert figure.axes[0].get_title() == "position 1\nECE 0.100 → 0.010"
    assert Reliability.of_suites({}).after == ()


def test_page_opens_with_the_figures_that_matter_and_folds_what_is_looked_up() -> None:
    suites = {"held-out": examples.evaluation_outputs("held-out")}
    tiles = headline_tiles(suites)
    assert tiles[0] == ("2.60", "tokens per target step, held-out") and ("50 / 50") in dict(tiles)
    assert headline_tiles({"held-out": {}}) == [] == headline_tiles({})
    page = render_page("# A <b>\n\n## Results\n\nx\n\n## Spec\n\ny\n\n## More\n\nz", {}, title="t", tiles=tiles)
    assert page.index("<h1>") < page.index('class="tiles"') < page.index("<h2>Results</h2>")
    assert "<details>\n<summary><h2>Spec</h2></summary>\n<p>y</p>\n</details>\n<h2>More</h2>" in page
    assert page.count("<details>") == 1 and "<script" not in page and "http" not in page
