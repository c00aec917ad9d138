"""The Grafana dashboard: every expression parses and reads what a live scrape has; panels lie side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.metric_table import CAPTURE, MODEL_LABEL, REPLICA_LABEL, MetricRow, all_rows
from tests.serving.servers import MODEL, serve_scripted

FILE = Path("charts/draftline/dashboards/draftline.json")
KINDS = {"row", "timeseries", "stat"}
FROM_PROMETHEUS = {"namespace"}
"""Labels that scraping adds."""

NOT_SHOWN = {"draftline:draft_probes", "draftline:step_time_ratio", "vllm:prompt_tokens"} | {
    row.name for row in CAPTURE
}
"""Metrics without a panel: a detail of the scheduler, what other panels show from counters, and those of traffic
capture, which only servers that capture have."""

VARIABLES = {"$__rate_interval": "5m", "$namespace": ".*", "$model": ".*"}


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return document


def expressions(board: dict[str, Any]) -> list[str]:
    """Of panels and annotations, with Grafana's variables filled in."""
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    found += [annotation["expr"] for annotation in board["annotations"]["list"]]
    for name, value in VARIABLES.items():
        found = [expression.replace(name, value) for expression in found]
    return found


def nodes(expression: Any) -> Iterator[Any]:
    """All parts of a parsed expression."""
    yield expression
    children = [getattr(expression, name, None) for name in ("lhs", "rhs", "expr", "param", "vector_selector")]
    for child in [*children, *getattr(expression, "args", ())]:
        if isinstance(child, promql_parser.Expr):
            yield from nodes(child)


def selectors(text: str) -> list[Any]:
    return [n for n in nodes(promql_parser.parse(text)) if isinstance(n, promql_parser.VectorSelector)]


def unknown(text: str, series: dict[str, MetricRow]) -> set[str]:
    """Metrics and labels of an expression that no scrape has."""
    names = {selector.name for selector in selectors(text)}
    labels = {MODEL_LABEL, REPLICA_LABEL, *FROM_PROMETHEUS}
    for name in names & set(series):
        labels |= set(series[name].labels) | ({"le"} if name.endswith("_bucket") else set())
    asked = {matcher.name for selector in selectors(text) for matcher in selector.matchers.matchers}
    for node in nodes(promql_parser.parse(text)):
        modifier = getattr(node, "modifier", None)
        asked |= set(getattr(modifier, "labels", None) or ()) if modifier is not None else set()
    return (names - set(series)) | (asked - labels)


@pytest.fixture(scope="module")
def live() -> dict[str, MetricRow]:
    """Series that a live scrape declares, each with its row of the table."""
    with serve_scripted() as server:
        server.client().completions.create(model=MODEL, prompt="hello", max_tokens=9)
        families = list(text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text))
    names = {family.name for family in families}
    return {series: row for row in all_rows() if row.name in names for series in row.series}


def test_every_expression_reads_what_a_live_scrape_has(board: dict[str, Any], live: dict[str, MetricRow]) -> None:
    found = expressions(board)
    assert len(found) > 40
    for expression in found:
        assert selectors(expression), expression
        assert unknown(expression, live) == set(), expression


def test_a_wrong_name_or_label_is_found(live: dict[str, MetricRow]) -> None:
    assert unknown('sum(rate(vllm:generated_tokens_total{namespace=~".*"}[5m]))', live) == {
        "vllm:generated_tokens_total"
    }
    assert unknown('draftline:slo_ratio{modelname="x"}', live) == {"modelname"}
    assert unknown("sum by (reason) (vllm:request_success_total)", live) == {"reason"}
    assert unknown("1 + sum by (finished_reason) (vllm:request_success_total)", live) == set()
    with pytest.raises(ValueError):
        promql_parser.parse("sum(rate(x[5m])")


def test_every_metric_has_a_panel_or_a_reason(board: dict[str, Any]) -> None:
    shown = {selector.name for expression in expressions(board) for selector in selectors(expression)}
    left_out = {row.name for row in all_rows() if not shown & set(row.series)}
    assert left_out == NOT_SHOWN


def test_the_document_is_a_dashboard(board: dict[str, Any]) -> None:
    assert (board["uid"], board["schemaVersion"]) == ("draftline", 41)
    names = [variable["name"] for variable in board["templating"]["list"]]
    used = set(re.findall(r"\$\{?([a-z]+)", FILE.read_text(encoding="utf-8"))) - {"__rate_interval"}
    assert names == ["datasource", "namespace", "model"] and used == set(names)
    assert not set(re.findall(r"\$[\w{}]+", " ".join(expressions(board)))), "a variable that nothing fills in"
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in KINDS and panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith(".")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert [target["refId"] for target in panel["targets"]] == [chr(65 + i) for i in range(len(panel["targets"]))]
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert len(set(legends)) == len(legends)
        for override in panel["fieldConfig"]["overrides"]:
            assert override["matcher"]["options"] in legends, "an override of a series that is not there"


def test_no_two_panels_overlap(board: dict[str, Any]) -> None:
    boxes = [panel["gridPos"] for panel in board["panels"]]
    for box in boxes:
        assert box["x"] >= 0 and box["x"] + box["w"] <= 24 and box["h"] > 0
    for a, b in combinations(boxes, 2):
        is_beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        is_below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert is_beside or is_below, (a, b)
