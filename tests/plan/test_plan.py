"""Bytes as they are written, operations as they are counted by hand, money as it is multiplied."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from draftline.errors import SpecError
from draftline.planner import (
    PROFILES,
    Assumptions,
    Corpus,
    HardwareProfile,
    Prices,
    Serving,
    TargetFacts,
    Throughput,
    hardware_profile,
    make_plan,
    target_facts,
)
from draftline.planner.cache import REFERENCE, bytes_per_token, cache_bytes
from draftline.planner.operations import DraftFacts, target_forward, training_step
from draftline.planner.targets import AttentionFacts
from draftline.spec import RunSpec, TargetSpec, derive, recipe

TINY = TargetFacts(
    "tiny",
    "llama",
    hidden_size=4,
    num_layers=2,
    intermediate_size=6,
    num_heads=2,
    vocab_size=10,
    tie_embeddings=True,
    attention=(AttentionFacts(2, 1, 2),),
)
QWEN = target_facts(TargetSpec(source="Qwen/Qwen3-4B"))
ASSUMED = Assumptions(Corpus(1000, 100.0), HardwareProfile("gpu", 1.0, 0.5, 0.25, 0.1))


@pytest.mark.parametrize(
    ("name", "token_bytes", "terabytes"),
    [("qwen3-4b", 30_726, 38.1), ("qwen3-8b", 49_158, 61.0), ("qwen3-14b", 61_446, 76.2), ("gemma4-12b", 46_086, 57.1)],
)
def test_the_references_layout_has_the_published_size(name: str, token_bytes: int, terabytes: float) -> None:
    spec = recipe(name)
    hidden = target_facts(spec.target).hidden_size
    taps = len(spec.draft.target_layer_ids or ())
    assert bytes_per_token(REFERENCE, taps, hidden) == token_bytes
    assert cache_bytes(REFERENCE, 1_300_000, 1.24e9, token_bytes) / 1e12 == pytest.approx(terabytes, abs=0.06)


def test_forward_operations_are_those_of_its_matrices() -> None:
    # A layer: q and o 4 x 4, k and v 4 x 2, feed-forward 3 x (4 x 6); the head 10 x 4.
    weights = 2 * (2 * 16 + 2 * 8 + 3 * 24)
    attention = 4 * 2 * (2 * 2) * 50
    assert target_forward(TINY, 7, 100, head_share=0) == 7 * (2 * weights + attention)
    assert target_forward(TINY, 7, 100, head_share=1) == 7 * (2 * (weights + 40) + attention)


@pytest.mark.parametrize(("length", "window"), [(100, 10), (100, 100), (8, 20)])
def test_a_window_is_counted_pair_by_pair(length: int, window: int) -> None:
    windowed = replace(TINY, attention=(AttentionFacts(2, 1, 2, window),))
    # With a query's own position counted half, as in a sum over continuous positions.
    pairs = sum(min(position + 0.5, window) for position in range(length))
    got = target_forward(windowed, length, length, head_share=0) - 2 * length * TINY.num_layer_weights
    assert got == pytest.approx(4 * 2 * 4 * pairs, rel=0.01)


def test_training_operations_are_those_of_its_matrices() -> None:
    draft = DraftFacts(num_layers=3, num_taps=2, block_size=5, vocab_size=8, markov_rank=2, anchors_per_sample=7)
    slots = 35
    a_layer = 2 * 16 + 2 * 8 + 3 * 24
    forward = 2 * slots * 3 * a_layer + 2 * 100 * (2 * 16 + 3 * 16) + 4 * 3 * 4 * (50 + 5) * slots
    assert training_step(TINY, draft, 100) == 3 * forward + 3 * 2 * slots * 8 * 4 + 3 * 2 * slots * 8 * 2


def test_eagle3s_operations_are_those_of_its_matrices() -> None:
    draft = DraftFacts(
        num_layers=1, num_taps=2, block_size=5, vocab_size=8, markov_rank=0, anchors_per_sample=7, ttt_length=3
    )
    # Three steps of one layer over all positions: q, k and v read 2 x 4.
    a_layer = 8 * 4 + 4 * 4 + 2 * 8 * 2 + 3 * 24
    forward = 2 * 300 * a_layer + 2 * 100 * (2 * 16) + 4 * 4 * (50 + 3) * 300
    assert training_step(TINY, draft, 100) == 3 * forward + 3 * 2 * 300 * 8 * 4


def test_hours_and_money_follow_from_operations() -> None:
    spec = derive(RunSpec(), {"train.steps": 100, "train.samples_per_step": 20})
    made = make_plan(spec, TINY, ASSUMED)
    responses, capture, draft = made.work
    assert made.epochs == 2
    assert capture.gpu_hours == pytest.approx(capture.operations / (1e12 * 0.5 * 3600))
    assert responses.gpu_hours == pytest.approx(5 * capture.gpu_hours)
    assert draft.gpu_hours == pytest.approx(draft.operations / (1e12 * 0.25 * 3600))
    assert made.total_cost == pytest.approx(made.gpu_hours * 2.5 + made.cache_cost)
    stored = cache_bytes("bf16", 1000, 1e5, bytes_per_token("bf16", made.num_taps, TINY.hidden_size))
    assert made.cache_cost == pytest.approx(stored / 1e9 * 0.023)
    # Eight GPUs at 1.5 times the work are worth what 5.33 were.
    assert made.saving_per_day == pytest.approx((8 - 8 / 1.5) * 24 * 2.5)
    assert made.payback_days == pytest.approx(made.total_cost / made.saving_per_day)


def test_measured_throughput_replaces_the_count() -> None:
    made = make_plan(RunSpec(), TINY, replace(ASSUMED, measured=Throughput(capture=50.0)))
    _, capture, draft = made.work
    assert capture.gpu_hours == pytest.approx(1000 * 100 / 50 / 3600)
    assert capture.operations == 0 and "measured" in capture.basis
    assert draft.operations > 0


def test_only_answers_are_generated_and_only_they_have_a_law() -> None:
    spec = recipe("qwen3-4b")
    whole, half = (make_plan(spec, QWEN, replace(ASSUMED, corpus=Corpus(1000, 100.0, s))) for s in (1.0, 0.5))
    assert half.work[0].gpu_hours == pytest.approx(whole.work[0].gpu_hours / 2)
    assert half.work[1].gpu_hours < whole.work[1].gpu_hours
    sizes = {line.codec: line.token_bytes for line in whole.cache}
    assert {line.codec: sizes[line.codec] - line.token_bytes for line in half.cache} == {
        "bf16": pytest.approx((2 * 2560 + 4) / 2),
        # Laws are stored in rotated groups of 64 codes of a byte and a scale of two.
        "fp8": pytest.approx((2560 + 2 * 40 + 4) / 2),
        "int4": pytest.approx((2560 + 2 * 40 + 4) / 2),
        REFERENCE: 0,
    }


def test_codecs_take_half_and_less_than_a_third() -> None:
    shares = {line.codec: line.share for line in make_plan(recipe("qwen3-4b"), QWEN, ASSUMED).cache}
    assert shares["bf16"] == pytest.approx(1, abs=0.01)
    assert shares["fp8"] == pytest.approx(0.5, abs=0.01)
    assert 0.25 < shares["int4"] < 0.32


def test_a_draft_that_saves_nothing_never_pays() -> None:
    for serving in (Serving(8, 1.0), Serving(8, 0.9), Serving(0, 2.0)):
        assert make_plan(RunSpec(), TINY, replace(ASSUMED, serving=serving)).payback_days is None


def test_a_larger_vocabulary_or_more_anchors_cost_more_training() -> None:
    def training(**overrides: Any) -> float:
        return make_plan(derive(RunSpec(), overrides), TINY, ASSUMED).work[-1].gpu_hours

    base = training()
    assert training(**{"draft.vocab_size": 9}) < training(**{"draft.vocab_size": 20})
    assert training(**{"train.anchors_per_sample": 64}) > base
    # A sample of 100 tokens has no more than 100 anchors.
    assert training(**{"train.anchors_per_sample": 100}) == training(**{"train.anchors_per_sample": 512})


@pytest.mark.parametrize(
    "wrong",
    [
        {"corpus": Corpus(0, 100)},
        {"corpus": Corpus(10, 0)},
        {"corpus": Corpus(10, float("nan"))},
        {"corpus": Corpus(10, 100, 1.5)},
        {"corpus": Corpus(10, 100, 0)},
        {"prices": Prices(gpu_hour=-1)},
        {"prices": Prices(storage_gb_month=float("inf"))},
        {"serving": Serving(speedup=0)},
        {"serving": Serving(num_gpus=-1)},
        {"measured": Throughput(train=-5)},
    ],
)
def test_impossible_assumptions_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="cannot plan with"):
        make_plan(RunSpec(), TINY, replace(ASSUMED, **wrong))


def test_hardware_is_named_or_described() -> None:
    assert hardware_profile("h100") is PROFILES["h100"]
    with pytest.raises(SpecError, match="Did you mean 'h100'"):
        hardware_profile("h1000")
    for wrong in ({"peak_tflops": 0.0}, {"train_utilisation": 1.5}, {"decode_utilisation": 0.0}):
        with pytest.raises(SpecError, match="impossible"):
            replace(PROFILES["h100"], **wrong)


def test_a_stream_keeps_nothing_and_captures_every_epoch() -> None:
    stored = make_plan(derive(RunSpec(), {"train.epochs": 3}), TINY, ASSUMED)
    streamed = make_plan(derive(RunSpec(), {"train.epochs": 2.5, "cache.mode": "stream"}), TINY, ASSUMED)
    assert stored.epochs == 3 and streamed.epochs == 2.5
    assert (stored.codec, streamed.codec, streamed.cache_cost) == ("bf16", None, 0)
    assert streamed.work[1].gpu_hours == pytest.approx(3 * stored.work[1].gpu_hours)
    assert streamed.total_cost == pytest.approx(sum(line.cost for line in streamed.work))
    assert [line.codec for line in streamed.cache] == [line.codec for line in stored.cache]


def test_the_spec_decides_taps_and_codec() -> None:
    facts = target_facts(TargetSpec())
    spec = derive(RunSpec(), {"cache.codec": "fp32", "draft.num_taps": 3})
    made = make_plan(spec, facts, ASSUMED)
    assert made.num_taps == 3
    assert [line.codec for line in made.cache if line.codec == made.codec] == ["fp32"]
    assert "fp32" not in {line.codec for line in make_plan(RunSpec(), facts, ASSUMED).cache}
