"""Captured features are ``transformers``' hidden states, repeatable to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftline.cache.shards import Shard, decode_shard
from draftline.capture.capture import capture_shard
from draftline.spec import TargetSpec
from draftline.target.load import Target, load_target
from tests.counted_forward import count_rows
from tests.training.cases import Conversation, conversations, token_shard


@pytest.fixture(scope="module")
def samples(loaded_target: Target) -> list[Conversation]:
    """Some begin alike, one is a beginning of another, one is a repetition, one is a single token."""
    made = conversations(loaded_target, 3)
    name, ids, mask = made[1]
    return [
        *made[:2],
        (f"{name}-again", ids, mask),
        (f"{name}-part", ids[:9], mask[:9]),
        ("one", ids[:1], mask[:1]),
        made[2],
        ("other", list(reversed(ids)), mask),
    ]


@pytest.fixture(scope="module")
def tokens(samples: list[Conversation], loaded_target: Target) -> Shard:
    return decode_shard(token_shard(samples, loaded_target.fingerprint), origin="tokens")


def test_features_are_the_hidden_states_of_transformers(
    loaded_target: Target, tiny_target: Path, samples: list[Conversation], tokens: Shard
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    shard = decode_shard(capture_shard(loaded_target, tokens, (-1, 0, 2), "fp32"), origin="captured")
    assert shard.metadata == {
        "version": 1,
        "kind": "hidden-states",
        "ids": [name for name, _, _ in samples],
        "target": loaded_target.fingerprint,
        "tap_ids": [-1, 0, 2],
        "codec": "fp32",
    }
    for name in ("input_ids", "loss_mask", "cu_seqlens"):
        assert torch.equal(shard.tensors[name], tokens.tensors[name])
    close = {"atol": 3e-4, "rtol": 1e-4}
    for index, (_, ids, _) in enumerate(samples):
        start, end = shard.bounds(index)
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        states = output.hidden_states
        for place, layer in enumerate((-1, 0, 2)):
            torch.testing.assert_close(shard.tensors["taps"][start:end, place], states[layer + 1][0], **close)
        # The last entry of transformers' hidden states is after the final norm, and so is ours.
        torch.testing.assert_close(shard.tensors["last_hidden"][start:end], states[-1][0], **close)
        torch.testing.assert_close(shard.tensors["log_normaliser"][start:end], output.logits[0].logsumexp(-1), **close)


@pytest.mark.parametrize("codec", ["bf16", "fp32"])
def test_capture_repeats_to_the_byte(tiny_target: Path, tokens: Shard, codec: str) -> None:
    """Even by a target that has captured longer things before."""
    fresh, used = (load_target(TargetSpec(source=str(tiny_target)), dtype="fp32") for _ in range(2))
    data = capture_shard(fresh, tokens, (0, 1), codec)
    longer = ("long", tokens.tensors["input_ids"].tolist(), tokens.tensors["loss_mask"].tolist())
    capture_shard(used, decode_shard(token_shard([longer], used.fingerprint), origin="x"), (1,), codec)
    assert capture_shard(used, tokens, (0, 1), codec) == data


def test_the_codec_rounds_and_nothing_else(loaded_target: Target, tokens: Shard) -> None:
    exact = decode_shard(capture_shard(loaded_target, tokens, (0, 1), "fp32"), origin="x").tensors
    small = decode_shard(capture_shard(loaded_target, tokens, (0, 1), "bf16"), origin="x").tensors
    for name in ("taps", "last_hidden"):
        assert small[name].dtype == torch.bfloat16
        assert torch.equal(small[name], exact[name].bfloat16())
    assert torch.equal(small["log_normaliser"], exact["log_normaliser"])
    assert small["log_normaliser"].dtype == torch.float32


def test_shared_beginnings_are_not_computed_again(
    loaded_target: Target, samples: list[Conversation], tokens: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    processed = count_rows(loaded_target, monkeypatch)
    capture_shard(loaded_target, tokens, (0,), "fp32")
    assert processed[2:5] == [1, 1, 1], "a repetition and beginnings need their last token only"
    assert processed[0] == len(samples[0][1]) and processed[1] < len(samples[1][1])
