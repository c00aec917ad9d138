"""Rotary scalings equal Hugging Face's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from draftline.target.lean import RotaryTable, inverse_frequencies
from draftline.target.rope import RopeScaling

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 8.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
]


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: f"{rope['rope_type']}-{len(rope)}")
def test_frequencies_equal_transformers(rope: dict[str, Any]) -> None:
    parameters = {"rope_theta": 500000.0, **rope}
    config = LlamaConfig(hidden_size=128, num_attention_heads=2, head_dim=64, rope_parameters=parameters)
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    found = inverse_frequencies(64, 500000.0, RopeScaling.from_hf(parameters))
    assert factor == 1.0
    # Two orders of the same few fp32 operations.
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=0)
    assert not torch.allclose(found, inverse_frequencies(64, 500000.0, None), rtol=1e-3)


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: f"{rope['rope_type']}-{len(rope)}")
def test_scalings_round_trip(rope: dict[str, Any]) -> None:
    scaling = RopeScaling.from_hf(rope)
    assert scaling is not None
    assert scaling.to_hf() == rope


def test_the_default_is_none_and_the_unknown_is_named() -> None:
    assert RopeScaling.from_hf({"rope_theta": 1.0, "rope_type": "default"}) is None
    assert RopeScaling.from_hf({}) is None
    with pytest.raises(ValueError, match="yarn"):
        RopeScaling.from_hf({"type": "yarn", "factor": 2.0})
    with pytest.raises(KeyError, match="low_freq_factor"):
        RopeScaling.from_hf({"rope_type": "llama3", "factor": 8.0})


def test_what_does_not_rotate_stays() -> None:
    table = RotaryTable(8, 10000.0, 5, torch.float32, RopeScaling("proportional", partial_rotary_factor=0.5))
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0))
    rotated = table.rotate(x, *table.at(torch.tensor([3])))
    # Pairs are (i, i + 4): the first two of four rotate.
    kept = [2, 3, 6, 7]
    assert torch.equal(rotated[..., kept], x[..., kept])
    assert not torch.allclose(rotated[..., [0, 1]], x[..., [0, 1]])
