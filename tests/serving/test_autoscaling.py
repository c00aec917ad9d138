"""The decision: sums of work, monotone, no flapping; the policy in Serve's hands."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import pytest
from hypothesis import given
from hypothesis import strategies as st

import serving.autoscaling
from serving.autoscaling import (
    KV_TARGET,
    SCALE_IN_FILL,
    SCALE_OUT_FILL,
    Fleet,
    ReplicaReport,
    WorkPolicy,
    decide,
    reports_from,
    requests_within,
)

_REPORTS = st.builds(
    ReplicaReport,
    running=st.floats(0, 100),
    waiting=st.floats(0, 100),
    kv_cache_usage=st.floats(0, 1),
    slo_requests=st.just(8.0),
    slo_ratio=st.floats(0, 5),
)


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Any state of a deployment: replicas that start, that have not reported, that are to stop."""
    reports = draw(st.lists(_REPORTS, max_size=6))
    num_running = len(reports) + draw(st.integers(0, 2))
    return Fleet(reports, num_running, draw(st.integers(1, 10)), draw(st.floats(0, 50)))


def full(num: int, fill: float = 1.0, slots: float = 8.0) -> list[ReplicaReport]:
    return [ReplicaReport(running=fill * slots, slo_requests=slots) for _ in range(num)]


@given(fleets(), st.data())
def test_more_work_never_means_fewer_replicas(fleet: Fleet, data: st.DataObject) -> None:
    assert decide(replace(fleet, num_queued=fleet.num_queued + 3)).num_replicas >= decide(fleet).num_replicas
    if not fleet.reports:
        return
    index = data.draw(st.integers(0, len(fleet.reports) - 1))
    name = data.draw(st.sampled_from(["running", "waiting", "kv_cache_usage", "slo_ratio"]))
    busier = replace(fleet.reports[index], **{name: getattr(fleet.reports[index], name) + data.draw(st.floats(0, 9))})
    reports = [busier if i == index else report for i, report in enumerate(fleet.reports)]
    assert decide(replace(fleet, reports=reports)).num_replicas >= decide(fleet).num_replicas


@given(fleets())
def test_a_new_replica_that_reports_nothing_to_do_changes_nothing(fleet: Fleet) -> None:
    if not fleet.reports or fleet.num_running > len(fleet.reports):
        return
    joined = replace(
        fleet, reports=[*fleet.reports, ReplicaReport(slo_requests=8.0)], num_running=fleet.num_running + 1
    )
    before, after = decide(fleet), decide(joined)
    assert (after.by_requests, after.by_cache, after.by_latency) == (
        pytest.approx(before.by_requests),
        pytest.approx(before.by_cache),
        pytest.approx(before.by_latency),
    )
    assert after.num_replicas >= before.num_replicas, "growth alone is less limited with more replicas"


@given(fleets())
def test_what_is_decided_stands_when_it_is_decided_again(fleet: Fleet) -> None:
    """The fixed point: with the wish granted and the same work, the next wish is the same."""
    wish = decide(fleet).num_replicas
    again = decide(replace(fleet, num_wanted=wish)).num_replicas
    assert again == wish


@given(fleets())
def test_nothing_is_given_up_while_a_replica_has_not_reported(fleet: Fleet) -> None:
    silent = replace(fleet, num_running=len(fleet.reports) + 1)
    assert decide(silent).num_replicas >= silent.num_wanted


def test_a_replica_is_given_up_only_if_the_others_have_room() -> None:
    def wish(work: float) -> int:
        return decide(Fleet([ReplicaReport(running=work / 2, slo_requests=8.0)] * 2, 2, 2)).num_replicas

    assert wish(8 * SCALE_IN_FILL) == 1
    assert wish(8 * SCALE_IN_FILL + 0.2) == 2, "one replica would hold it, but barely"
    assert wish(16.0 * SCALE_OUT_FILL - 0.1) == 2 and wish(16.0 * SCALE_OUT_FILL + 0.1) == 3


def test_each_term_is_a_sum() -> None:
    assert decide(Fleet(full(1, 3.0), 4, 1)).num_replicas == 3
    assert decide(Fleet([ReplicaReport(kv_cache_usage=0.9, slo_requests=8.0)] * 2, 2, 2)).num_replicas == math.ceil(
        1.8 / KV_TARGET
    )
    slow = ReplicaReport(running=2, slo_ratio=1.4, slo_requests=8.0)
    assert decide(Fleet([slow, slow], 2, 1)).num_replicas == 1, "slow tokens alone ask for nothing"
    assert decide(Fleet([replace(slow, waiting=0.1), slow], 2, 1)).num_replicas == 3
    assert decide(Fleet(full(1), 1, 1, num_queued=8.0)).num_replicas == 2


def test_growth_is_limited_and_an_idle_fleet_keeps_one() -> None:
    assert decide(Fleet(full(2, 50.0), 2, 2)).num_replicas == 4
    assert decide(Fleet(full(5, 0.0), 5, 5)).num_replicas == 1
    assert decide(Fleet([], 0, 3)).num_replicas == 3
    assert decide(Fleet([], 0, 1, num_queued=5.0)).num_replicas == 1


def test_replicas_of_several_kinds_count_by_what_they_hold() -> None:
    reports = [ReplicaReport(running=12, slo_requests=12.0), ReplicaReport(running=4, slo_requests=4.0)]
    assert decide(Fleet(reports, 2, 2)).num_replicas == 2


@pytest.mark.parametrize("target_ms", [0.5, 23.0, 40.0, 41.0, 1000.0])
@pytest.mark.parametrize("most", [1, 7, 64])
def test_r_slo_is_the_largest_that_fits(target_ms: float, most: int) -> None:
    def step_ms(requests: int) -> float:
        return 20.0 + 1.5 * requests

    fitting = [r for r in range(1, most + 1) if step_ms(r) <= target_ms]
    assert requests_within(step_ms, target_ms, most) == max(fitting, default=1)


def test_a_replica_without_statistics_is_no_report() -> None:
    metrics = {"running": {"a": 3.0}, "waiting": {"a": 1.0}, "running_requests": {"a": 4.0, "b": 0.0}}
    assert reports_from(metrics, 16) == [ReplicaReport(running=3.0, waiting=1.0, slo_requests=16.0)]
    assert reports_from({}, 16) == []


def test_the_policy_reads_what_serve_hands_over() -> None:
    context = SimpleNamespace(
        aggregated_metrics={"running": {"a": 8.0}, "waiting": {"a": 4.0}, "slo_requests": {"a": 4.0}},
        current_num_replicas=2,
        target_num_replicas=2,
        total_queued_requests=0.0,
    )
    assert WorkPolicy(max_requests=8)(context) == (3, {})


def test_the_module_travels_by_value() -> None:
    tree = ast.parse(Path(serving.autoscaling.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= sys.stdlib_module_names
    cloudpickle.register_pickle_by_value(serving.autoscaling)
    try:
        parcel = cloudpickle.dumps(WorkPolicy)
    finally:
        cloudpickle.unregister_pickle_by_value(serving.autoscaling)
    code = (
        "import sys; sys.modules['serving'] = None; import cloudpickle;"
        "print(cloudpickle.loads(sys.stdin.buffer.read())(max_requests=4)._max_requests)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=parcel, capture_output=True, check=True)
    assert done.stdout.strip() == b"4"
