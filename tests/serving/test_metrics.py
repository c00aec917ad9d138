"""The metrics: documented, exported, counted right, and one page for all replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from draftline.engine.requests import DraftedBlocks, EngineLoad, StepReport
from draftline.spec import DriftSpec
from serving.exposition import ReplicaPage, merge_pages, pages_for
from serving.metric_table import all_rows, table_markdown
from serving.metrics import ServingMetrics
from serving.registry import DraftFiles
from serving.watch import DraftWatch
from tests.serving.servers import MODEL, serve_scripted

PAGE = Path("docs/metrics.md")
MARK = "--update-golden -->\n"


def read(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Value by sample name and labels, the model's name left out."""
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def new_metrics(load: EngineLoad | None = None) -> ServingMetrics:
    return ServingMetrics(MODEL, lambda: load or EngineLoad(0, 0, 0.0, 0.0))


def test_the_documentation_is_the_table(check_golden: Callable[[str, Path], None]) -> None:
    head = PAGE.read_text().split(MARK)[0]
    check_golden(f"{head}{MARK}\n{table_markdown()}", PAGE)


def test_a_live_scrape_shows_the_table_and_nothing_else() -> None:
    with serve_scripted() as server:
        server.client().completions.create(model=MODEL, prompt="hello", max_tokens=9)
        families = list(text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text))
    shown = {family.name: family for family in families if not family.name.endswith("_created")}
    rows = {row.name: row for row in all_rows()}
    assert set(shown) == set(rows)
    for name, family in shown.items():
        assert (family.type, family.documentation) == (rows[name].kind, rows[name].text)
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                assert sample.name in rows[name].series
                assert set(sample.labels) - {"le"} == {"model_name", *rows[name].labels}


def test_a_step_report_is_counted() -> None:
    metrics = new_metrics()
    for probes in (2, 5):
        metrics.record_report(
            StepReport(
                predicted_ms=20, measured_ms=30, draft_ms=4, verify_ms=22, num_tokens=11, budget=7, num_probes=probes
            )
        )
    metrics.record_report(StepReport(measured_ms=30, num_tokens=3, num_probes=1))
    shown = read(metrics.render().decode())
    assert shown["draftline:step_tokens_sum", ()] == 25 and shown["draftline:step_tokens_count", ()] == 3
    assert shown["draftline:verify_budget_sum", ()] == 14
    assert shown["draftline:verify_budget_bucket", (("le", "0.0"),)] == 1
    assert shown["draftline:predicted_step_seconds_total", ()] == pytest.approx(0.04)
    assert shown["draftline:measured_step_seconds_total", ()] == pytest.approx(0.06), "of steps with a prediction"
    assert shown["draftline:step_time_ratio", ()] == pytest.approx(1.5)
    assert shown["draftline:draft_probes_total", ()] == 5, "the number starts again with another draft"
    assert shown["draftline:draft_seconds_total", ()] == pytest.approx(0.008)


def test_prefix_hits_follow_the_engines_totals() -> None:
    metrics = new_metrics()
    metrics.record_prefixes(100, 0)
    metrics.record_prefixes(250, 64)
    shown = read(metrics.render().decode())
    assert (shown["vllm:prefix_cache_queries_total", ()], shown["vllm:prefix_cache_hits_total", ()]) == (250, 64)


def test_the_time_per_token_is_of_now() -> None:
    metrics = new_metrics(EngineLoad(2, 0, 0.1, 0.0))
    metrics.record_gap(0.3, 3)
    metrics.record_gap(0.02, 1)
    assert metrics.tpot_s == pytest.approx((0.3 + 0.02) / 4, rel=1e-3)
    idle = new_metrics()
    idle.record_gap(0.3, 3)
    assert np.isnan(idle.tpot_s), "what nobody waits for is not slow"


def test_the_watch_shows_acceptance_and_starts_anew_with_another_draft(tmp_path: Path) -> None:
    metrics = new_metrics()
    watch = DraftWatch(metrics, DriftSpec(window_blocks=400, min_blocks=200, min_requests=10))
    evaluation = tmp_path / "metrics.json"
    evaluation.write_text('{"suites": {"held-out": {"survival_by_position": [0.9, 0.7]}}}')
    watch.use(DraftFiles("desk/3", tmp_path, None, evaluation))
    for step in range(100):
        ids = [f"{step // 4}-{r}" for r in range(4)]
        watch.record(DraftedBlocks(ids, 2, None, np.full(4, 2), np.array([0, 0, 1, step % 2])))
    shown = read(metrics.render().decode())
    assert shown["draftline:draft_info", (("draft", "desk/3"),)] == 1
    assert shown["draftline:evaluated_survival", (("position", "1"),)] == 0.7
    assert shown["draftline:block_survival", (("position", "0"),)] == pytest.approx(1.5 / 4, abs=0.02)
    assert shown["draftline:evaluated_length", ()] == pytest.approx(2.6)
    assert shown["draftline:whole_block_length", ()] == pytest.approx(1 + 1.5 / 4)
    assert shown["draftline:acceptance_drift", ()] == pytest.approx(1 - 1.375 / 2.6)
    assert (shown["draftline:is_drifted", ()], shown["draftline:drift_events_total", ()]) == (1, 1)
    assert [event.draft for event in watch.take_events()] == ["desk/3"] and watch.take_events() == []
    watch.use(DraftFiles("desk/4", tmp_path, None))
    watch.record(DraftedBlocks(["a"], 3, None, np.array([3]), np.array([2])))
    shown = read(metrics.render().decode())
    infos = {labels: value for (name, labels), value in shown.items() if name == "draftline:draft_info"}
    assert infos == {(("draft", "desk/4"),): 1}
    assert shown["draftline:is_drifted", ()] == 0 and np.isnan(shown["draftline:acceptance_drift", ()])
    assert shown["draftline:whole_block_length", ()] == 3


def test_a_node_asked_by_its_address_shows_its_own_replicas() -> None:
    pages = [ReplicaPage("a", "10.0.0.1", "A"), ReplicaPage("b", "10.0.0.2", "B"), ReplicaPage("c", "10.0.0.2", "C")]
    nodes = {"10.0.0.1", "10.0.0.2", "10.0.0.3"}
    by_node = [pages_for(node, pages, nodes) for node in sorted(nodes)]
    assert by_node == [{"a": "A"}, {"b": "B", "c": "C"}, {}], "together every replica once"
    for other in ("draftline-serve.ml.svc", "10.96.0.7", "localhost", ""):
        assert set(pages_for(other, pages, nodes)) == {"a", "b", "c"}
    alone = [ReplicaPage("a", "127.0.0.1", "A")]
    assert set(pages_for("127.0.0.1", alone, {"127.0.0.1"})) == {"a"}


def test_one_page_shows_all_replicas() -> None:
    pages = {}
    for number, name in enumerate(("one", "two"), start=1):
        metrics = new_metrics(EngineLoad(number, 0, 0.25, 0.0))
        metrics.record_finished("stop", 0.2 * number)
        pages[name] = metrics.render().decode()
    merged = merge_pages(pages).decode()
    shown = read(merged)
    for number, name in enumerate(("one", "two"), start=1):
        replica = ("replica", name)
        assert shown["vllm:num_requests_running", (replica,)] == number
        assert shown["vllm:request_success_total", (("finished_reason", "stop"), replica)] == 1
        assert shown["vllm:e2e_request_latency_seconds_sum", (replica,)] == pytest.approx(0.2 * number)
        bucket = shown["vllm:e2e_request_latency_seconds_bucket", (("le", "0.25"), replica)]
        assert bucket == (1 if number == 1 else 0)
    families = [family.name for family in text_string_to_metric_families(merged)]
    assert len(families) == len(set(families)) == len(all_rows()), "each family once, or Prometheus refuses the page"
