"""Cost tables of machines that are not here, against arithmetic by hand and against what was published."""

from __future__ import annotations

import pytest

from draftline.errors import SpecError
from draftline.planner.targets import KNOWN_CONFIGS, TargetFacts
from draftline.simulation.machines import (
    MACHINES,
    PUBLISHED_ACCEPTED_LENGTH,
    PUBLISHED_CONCURRENCIES,
    PUBLISHED_TOKENS_PER_S,
    Roofline,
    machine_costs,
)

QWEN3_8B = Roofline(TargetFacts.from_config("Qwen/Qwen3-8B", KNOWN_CONFIGS["Qwen/Qwen3-8B"]))


def test_one_token_is_bound_by_reading_the_weights() -> None:
    """7.57e9 weights without the embedding's 0.62e9, two bytes each, at 80 % of 3.35 TB/s; 1 ms beside it."""
    assert QWEN3_8B.kv_bytes_per_token == 36 * 2 * 8 * 128 * 2
    weights_ms = 1000 * 2 * 7.57e9 / (0.8 * 3.35e12)
    context_ms = 1000 * 1024 * QWEN3_8B.kv_bytes_per_token / (0.8 * 3.35e12)
    assert QWEN3_8B.verify_ms(1, 1, 1024) == pytest.approx(weights_ms + context_ms + 1.0, rel=0.01)


def test_many_tokens_are_bound_by_products_and_requests_by_their_context() -> None:
    slope_ms = (QWEN3_8B.verify_ms(64, 4096, 0) - QWEN3_8B.verify_ms(64, 2048, 0)) / 2048
    assert slope_ms == pytest.approx(1000 * 2 * 7.57e9 / (0.6 * 989e12), rel=0.01)
    more_requests_ms = QWEN3_8B.verify_ms(128, 512, 1000) - QWEN3_8B.verify_ms(64, 512, 1000)
    assert more_requests_ms == pytest.approx(1000 * 64 * 1000 * QWEN3_8B.kv_bytes_per_token / (0.8 * 3.35e12))


def test_four_gpus_read_four_times_as_fast_and_pay_for_reducing() -> None:
    four = Roofline(QWEN3_8B.target, 4)
    reduces_ms = 2 * 36 * 0.012
    assert four.verify_ms(1, 1, 0) == pytest.approx((QWEN3_8B.verify_ms(1, 1, 0) - 1) / 4 + 1 + reduces_ms, rel=0.01)


@pytest.mark.parametrize("name", MACHINES)
def test_tables_hold_for_all_loads(name: str) -> None:
    costs = machine_costs(name)
    assert costs.verify_cost(1, 1) > 2
    assert costs.verify_cost(1000, 1000) < costs.verify_cost(8000, 1000)
    assert costs.draft_cost(1) < costs.verify_cost(1, 1) / 2


def test_published_costs_give_the_published_throughputs() -> None:
    costs = machine_costs("deepseek-v4-mi350")
    for place, users in enumerate(PUBLISHED_CONCURRENCIES):
        plain_ms = costs.verify_cost(users, users)
        assert 1000 * users / plain_ms == pytest.approx(PUBLISHED_TOKENS_PER_S["off"][place], rel=1e-6)
        whole_ms = costs.verify_cost(8 * users, users) + costs.draft_cost(users)
        tokens = 1000 * users * PUBLISHED_ACCEPTED_LENGTH / whole_ms
        assert tokens == pytest.approx(PUBLISHED_TOKENS_PER_S["fixed 7"][place], rel=2e-3)


def test_an_unknown_machine_is_named() -> None:
    with pytest.raises(SpecError, match=r"no machine 'tpu'.*qwen3-8b-h100"):
        machine_costs("tpu")
