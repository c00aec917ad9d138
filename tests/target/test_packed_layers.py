"""The kernels' forward equals torch's, and verifying a block gives the bits of plain decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from draftline.native.build import find_compiler
from draftline.spec import TargetSpec
from draftline.target import lean
from draftline.target.batch import Chunk, build_batch
from draftline.target.lean import LeanModel
from draftline.target.load import load_target
from tests.target.test_lean import SIZES, VOCAB, save_model

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

IDS = torch.randint(0, VOCAB, (3, 60), generator=torch.Generator().manual_seed(5)).tolist()
POSITIONS = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model(LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16), path)
    return path


@pytest.fixture(scope="module")
def packed(folder: Path) -> LeanModel:
    model = load_target(TargetSpec(source=str(folder)), dtype="fp32").model
    assert model.has_packed_layers
    return model


def decode(model: LeanModel, cuts: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Logits ``[3, 60, V]`` and taps of three requests, fed in steps of (row, size)."""
    cache = model.new_cache(3, POSITIONS)
    done = [0, 0, 0]
    logits, taps = torch.full((3, 60, VOCAB), float("nan")), torch.full((3, 60, 2, 48), float("nan"))
    for cut in cuts:
        chunks = [Chunk(row, done[row], IDS[row][done[row] : done[row] + size]) for row, size in cut]
        output = model.forward(build_batch(chunks, POSITIONS, torch.float32), cache, (-1, 1))
        offset = 0
        rows = model.logits(output.hidden_ND)
        for row, size in cut:
            logits[row, done[row] : done[row] + size] = rows[offset : offset + size]
            taps[row, done[row] : done[row] + size] = output.taps_NLD[offset : offset + size]
            offset, done[row] = offset + size, done[row] + size
    return logits, taps


ONE_BY_ONE = [[(row, 1)] for row in range(3) for _ in range(60)]
AT_ONCE = [[(row, 60) for row in range(3)]]
RAGGED = [[(0, 7), (2, 40)], [(0, 8), (1, 1), (2, 20)], [(1, 59)], *[[(0, 9)]] * 5]


@pytest.mark.parametrize("cuts", [AT_ONCE, RAGGED], ids=["at once", "ragged"])
def test_every_cutting_into_steps_gives_the_same_bits(packed: LeanModel, cuts: list[list[tuple[int, int]]]) -> None:
    logits, taps = decode(packed, ONE_BY_ONE)
    other_logits, other_taps = decode(packed, cuts)
    assert not logits.isnan().any() and torch.equal(logits, other_logits) and torch.equal(taps, other_taps)


def test_the_kernels_forward_equals_torchs(folder: Path, packed: LeanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "kernels_for", lambda *_: None)
    plain = load_target(TargetSpec(source=str(folder)), dtype="fp32").model
    assert not plain.has_packed_layers
    for found, expected in zip(decode(packed, RAGGED), decode(plain, RAGGED), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_the_number_of_threads_changes_no_bit(packed: LeanModel) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = decode(packed, RAGGED)
        torch.set_num_threads(3)
        shared = decode(packed, RAGGED)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_step_for_another_cache_is_refused(packed: LeanModel) -> None:
    cache = packed.new_cache(2, POSITIONS)
    for chunk, positions in [(Chunk(2, 0, [1]), POSITIONS), (Chunk(0, 95, [1, 2]), POSITIONS), (Chunk(0, 0, [1]), 64)]:
        with pytest.raises(ValueError, match="the cache has"):
            packed.forward(build_batch([chunk], positions, torch.float32), cache)


def test_a_step_without_tokens_is_empty(packed: LeanModel) -> None:
    output = packed.forward(build_batch([], POSITIONS, torch.float32), packed.new_cache(1, POSITIONS), (0,))
    assert output.hidden_ND.shape == (0, 48) and output.taps_NLD.shape == (0, 1, 48)
