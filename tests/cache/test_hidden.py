"""Hidden-state shards: every sample comes back, whatever it shares; damage and bad numbers are refused."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from draftline.cache.codecs import CODECS
from draftline.cache.container import read_header
from draftline.cache.hidden import (
    HiddenIndex,
    SegmentRows,
    as_stored,
    decode_samples,
    encode_hidden_states,
    law_positions,
    split_samples,
)
from draftline.cache.prefixes import plan_prefixes
from draftline.cache.sample import CachedSample
from draftline.cache.shards import decode_shard, encode_shard
from draftline.errors import FormatError, TargetError
from tests.cache.made import HIDDEN, LAYERS, Sample, make_shard, numbered_samples, states


def random_samples(seed: int) -> list[Sample]:
    """Few letters, so that much is shared, with masks that disagree on what is shared."""
    source = random.Random(seed)
    samples = []
    for _ in range(source.randint(1, 9)):
        size = source.randint(1, 40)
        opening = source.choice([[], [1] * 10, [1] * 20, [2] * 15])
        ids = (opening + source.choices([3, 4], k=size))[: source.randint(1, 45)]
        samples.append((ids, source.choices([0, 1], k=len(ids))))
    return samples


def assert_equal(a: CachedSample, b: CachedSample) -> None:
    assert a.sample_id == b.sample_id
    for name in ("input_ids_T", "loss_mask_T", "taps_TLD", "last_hidden_TD", "log_normaliser_T"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name


@pytest.mark.parametrize("seed", range(20))
def test_every_sample_comes_back(seed: int) -> None:
    samples = random_samples(seed)
    for (ids, mask), found in zip(samples, decode_samples(make_shard(samples), origin="x"), strict=True):
        taps, hidden = states(ids)
        needed = torch.from_numpy(law_positions(np.array(mask, dtype=bool)))
        assert found.input_ids_T.tolist() == ids and found.input_ids_T.dtype == torch.int64
        assert found.loss_mask_T.tolist() == [bool(m) for m in mask]
        assert torch.equal(found.taps_TLD, taps)
        assert torch.equal(found.last_hidden_TD, torch.where(needed[:, None], hidden, 0))
        assert torch.equal(found.log_normaliser_T, torch.where(needed, hidden.sum(-1), 0))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("codec", ["bf16", "fp8"])
def test_sharing_changes_no_bit_of_a_sample(codec: str, seed: int) -> None:
    samples = random_samples(seed)
    shared, apart = (decode_samples(make_shard(samples, codec, dedupe=d), origin="x") for d in (True, False))
    for a, b in zip(shared, apart, strict=True):
        assert_equal(a, b)


def test_sharing_makes_the_shard_smaller() -> None:
    samples = numbered_samples(20, opening=300)
    shared, apart = (make_shard(samples, "bf16", dedupe=d) for d in (True, False))
    rows = [read_header(data, origin="x").metadata["num_rows"] for data in (shared, apart)]
    tokens = sum(len(ids) for ids, _ in samples)
    assert rows == [tokens - 19 * 300, tokens]
    assert len(shared) / len(apart) < 0.09


@pytest.mark.parametrize("codec", CODECS)
def test_shards_repeat_to_the_byte_and_are_safetensors(codec: str) -> None:
    samples = numbered_samples(5)
    data = make_shard(samples, codec)
    assert make_shard(samples, codec) == data
    tensors = load_safetensors(data)
    header = read_header(data, origin="x")
    assert list(header.tensors)[-1] == "records" and header.size_bytes == len(data)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: e.shape for n, e in header.tensors.items()}
    for name, value in decode_shard(data, origin="x").tensors.items():
        assert torch.equal(value, tensors[name]), name
    assert ("tap_scale" in tensors) == (codec == "int4")


def test_a_law_is_stored_at_produced_tokens_and_before_them() -> None:
    mask = np.array([0, 0, 1, 1, 0, 0, 1, 0], dtype=bool)
    assert law_positions(mask).tolist() == [False, True, True, True, False, True, True, False]
    ids = list(range(8))
    prompt_only = make_shard([(ids, [0] * 8)])
    produced = make_shard([(ids, [0] * 4 + [1] * 4)])
    assert len(produced) - len(prompt_only) == 5 * (4 * HIDDEN + 4)
    sample = decode_samples(prompt_only, origin="x")[0]
    assert sample.last_hidden_TD.shape == (8, HIDDEN) and not sample.last_hidden_TD.any()


def test_every_codec_rounds_as_it_says() -> None:
    samples = numbered_samples(12)
    exact = decode_samples(make_shard(samples, "fp32"), origin="x")
    for codec, bound in (("bf16", 0.003), ("fp8", 0.03), ("int4", 0.12)):
        for a, b in zip(exact, decode_samples(make_shard(samples, codec), origin="x"), strict=True):
            error = (a.taps_TLD - b.taps_TLD.float()).pow(2).mean().sqrt() / a.taps_TLD.pow(2).mean().sqrt()
            assert error < bound
            needed = b.last_hidden_TD.any(-1)
            assert torch.equal(as_stored(a.last_hidden_TD[needed], codec), b.last_hidden_TD[needed].float())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2e37])
@pytest.mark.parametrize("where", ["taps_NLD", "last_hidden_KD", "log_normaliser_K"])
def test_bad_numbers_are_refused_by_sample(codec: str, bad: float, where: str) -> None:
    tokens = decode_shard(
        encode_shard(
            {
                "input_ids": torch.tensor([1, 2, 3, 4], dtype=torch.int32),
                "loss_mask": torch.ones(4, dtype=torch.uint8),
                "cu_seqlens": torch.tensor([0, 2, 4]),
            },
            {"kind": "tokens", "ids": ["good", "bad"], "target": "t"},
        ),
        origin="x",
    )
    plan = plan_prefixes(split_samples(tokens)[0])
    rows = [SegmentRows(torch.zeros(2, 1, 8), torch.zeros(2, 8), torch.zeros(2)) for _ in range(2)]
    assert encode_hidden_states(tokens, plan, rows, (0,), codec)
    getattr(rows[1], where)[1, ...] = bad
    with pytest.raises(TargetError, match="'bad' cannot be stored"):
        encode_hidden_states(tokens, plan, rows, (0,), codec)


def test_a_record_is_its_range_and_its_digest() -> None:
    data = make_shard(numbered_samples(4), "int4")
    header = read_header(data, origin="x")
    head = data[: header.head_bytes]
    index = HiddenIndex.of(head, origin="x")
    whole = decode_samples(data, origin="x")
    end = header.head_bytes
    for segment in range(len(index.is_shared)):
        start, size = index.record_range(segment)
        assert start == end
        end = start + size
        record = data[start:end]
        index.check_record(segment, record)
        for damaged in (record[:-1], record + b"\0", bytes([record[0] ^ 1]) + record[1:], b""):
            with pytest.raises(FormatError, match=f"record {segment} of x is damaged"):
                index.check_record(segment, damaged)
    assert end == len(data)
    assert index.is_shared.tolist() == [True, False, False, False, False]
    for place, sample in enumerate(whole):
        ranges = {segment: index.record_range(segment) for segment in index.segments(place)}
        assert_equal(index.sample(place, {s: data[a : a + n] for s, (a, n) in ranges.items()}), sample)
    for length in range(0, header.head_bytes, 7):
        with pytest.raises(FormatError):
            HiddenIndex.of(data[:length], origin="x")


def rewritten(data: bytes, **changes: object) -> bytes:
    """The shard with other metadata."""
    metadata = dict(read_header(data, origin="x").metadata) | changes
    text = json.dumps({k: v for k, v in metadata.items() if v is not None})
    return save_safetensors(load_safetensors(data), {"draftline": text})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "old format .* Run the hidden-states step again"),
        ({"version": 3}, "unknown format.*Upgrade"),
        ({"kind": "tokens", "version": 1}, "another kind"),
        ({"kind": "pictures"}, "not a Draftline shard"),
        ({"codec": "fp4"}, "unknown codec"),
        ({"codec": "bf16"}, "does not fit its own index"),
        ({"hidden_size": HIDDEN + 1}, "does not fit its own index"),
        ({"tap_ids": list(range(LAYERS + 1))}, "does not fit its own index"),
        ({"tap_ids": None}, "lack 'tap_ids'"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    data = make_shard(numbered_samples(2))
    HiddenIndex.of(rewritten(data), origin="x")
    with pytest.raises(FormatError, match=message):
        HiddenIndex.of(rewritten(data, **changes), origin="x")
