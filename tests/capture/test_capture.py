"""Captured features are ``transformers``' hidden states, repeatable to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from draftline.cache.codecs import CODECS
from draftline.cache.hidden import decode_samples, law_positions
from draftline.cache.shards import Shard, decode_shard
from draftline.capture.capture import capture_shard
from draftline.errors import TargetError
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
    data = capture_shard(loaded_target, tokens, (-1, 0, 2), "fp32")
    shard = decode_shard(data, origin="captured")
    assert shard.metadata == {
        "version": 2,
        "kind": "hidden-states",
        "ids": [name for name, _, _ in samples],
        "target": loaded_target.fingerprint,
        "tap_ids": [-1, 0, 2],
        "codec": "fp32",
        "hidden_size": loaded_target.config.hidden_size,
        "num_rows": int(shard.tensors["cu_rows"][-1]),
    }
    for name in ("input_ids", "loss_mask", "cu_seqlens"):
        assert torch.equal(shard.tensors[name], tokens.tensors[name])
    close = {"atol": 3e-4, "rtol": 1e-4}
    for (_, ids, mask), found in zip(samples, decode_samples(data, origin="captured"), strict=True):
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        states = output.hidden_states
        for place, layer in enumerate((-1, 0, 2)):
            torch.testing.assert_close(found.taps_TLD[:, place], states[layer + 1][0], **close)
        law = torch.from_numpy(law_positions(np.array(mask, dtype=bool)))
        # The last entry of transformers' hidden states is after the final norm, and so is ours.
        torch.testing.assert_close(found.last_hidden_TD[law], states[-1][0][law], **close)
        torch.testing.assert_close(found.log_normaliser_T[law], output.logits[0].logsumexp(-1)[law], **close)
        assert not found.last_hidden_TD[~law].any() and not found.log_normaliser_T[~law].any()


@pytest.mark.parametrize("codec", CODECS)
def test_capture_repeats_to_the_byte(tiny_target: Path, tokens: Shard, codec: str) -> None:
    """Even by a target that has captured longer things before."""
    fresh, used = (load_target(TargetSpec(source=str(tiny_target)), dtype="fp32") for _ in range(2))
    data = capture_shard(fresh, tokens, (0, 1), codec)
    longer = ("long", tokens.tensors["input_ids"].tolist(), tokens.tensors["loss_mask"].tolist())
    capture_shard(used, decode_shard(token_shard([longer], used.fingerprint), origin="x"), (1,), codec)
    assert capture_shard(used, tokens, (0, 1), codec) == data


def test_the_codec_rounds_and_nothing_else(loaded_target: Target, tokens: Shard) -> None:
    exact = decode_samples(capture_shard(loaded_target, tokens, (0, 1), "fp32"), origin="x")
    small = decode_samples(capture_shard(loaded_target, tokens, (0, 1), "bf16"), origin="x")
    for a, b in zip(exact, small, strict=True):
        assert torch.equal(b.taps_TLD, a.taps_TLD.bfloat16())
        assert torch.equal(b.last_hidden_TD, a.last_hidden_TD.bfloat16())


@pytest.mark.parametrize("codec", CODECS)
def test_stored_laws_sum_to_one(loaded_target: Target, tokens: Shard, codec: str) -> None:
    """However coarsely the hidden state is stored: its normaliser is its own."""
    head = loaded_target.lm_head_VD.float()
    for sample in decode_samples(capture_shard(loaded_target, tokens, (0,), codec), origin="x"):
        law = sample.last_hidden_TD.any(-1)
        logits = sample.last_hidden_TD[law].float() @ head.t()
        mass = (logits - sample.log_normaliser_T[law, None]).exp().sum(-1)
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-5, rtol=0)


def test_normalisers_know_the_cap_of_the_logits(tiny_target: Path, tokens: Shard) -> None:
    target = load_target(TargetSpec(source=str(tiny_target)), dtype="fp32")
    target.config = replace(target.config, logit_softcap=2.0)
    for sample in decode_samples(capture_shard(target, tokens, (0,), "fp32"), origin="x"):
        law = sample.last_hidden_TD.any(-1)
        expected = target.model.logits(sample.last_hidden_TD[law]).logsumexp(-1)
        torch.testing.assert_close(sample.log_normaliser_T[law], expected)


@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_sharing_changes_the_size_and_no_sample(loaded_target: Target, tokens: Shard, codec: str) -> None:
    shared, apart = (capture_shard(loaded_target, tokens, (0, 1), codec, dedupe=d) for d in (True, False))
    assert len(shared) < len(apart)
    for a, b in zip(decode_samples(shared, origin="x"), decode_samples(apart, origin="x"), strict=True):
        assert torch.equal(a.last_hidden_TD, b.last_hidden_TD)
        assert torch.equal(a.log_normaliser_T, b.log_normaliser_T)
        if codec == "bf16":
            # The scales of int4's channels are medians over what is stored.
            assert torch.equal(a.taps_TLD, b.taps_TLD)


def test_numbers_that_cannot_be_stored_name_the_sample(tiny_target: Path, tokens: Shard) -> None:
    target = load_target(TargetSpec(source=str(tiny_target)), dtype="fp32")
    single = int(tokens.tensors["input_ids"][-1])
    target.weights["model.embed_tokens.weight"][single] = float("nan")
    with pytest.raises(TargetError, match=r"sample '.*' cannot be stored"):
        capture_shard(target, tokens, (-1,), "bf16")


def test_beginnings_are_computed_once(
    loaded_target: Target, samples: list[Conversation], tokens: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    processed = count_rows(loaded_target, monkeypatch)
    capture_shard(loaded_target, tokens, (0,), "fp32")
    distinct = {tuple(ids[:end]) for _, ids, _ in samples for end in range(1, len(ids) + 1)}
    assert sum(processed) == len(distinct) < sum(len(ids) for _, ids, _ in samples)
