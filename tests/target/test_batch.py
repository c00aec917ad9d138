"""One flattened step: every token once, each seeing exactly its own request's past."""

from __future__ import annotations

import random

import pytest
import torch

from draftline.target.batch import Chunk, StepBatch, build_batch

NUM_POSITIONS = 100


def make(chunks: list[Chunk], long_chunk: int = 33) -> StepBatch:
    return build_batch(chunks, NUM_POSITIONS, torch.float32, long_chunk=long_chunk)


def test_tokens_positions_and_cache_places() -> None:
    batch = make([Chunk(0, 5, [7, 8]), Chunk(1, 0, [9])])
    assert batch.token_ids_N.tolist() == [7, 8, 9]
    assert batch.positions_N.tolist() == [5, 6, 0]
    assert batch.cache_index_N.tolist() == [5, 6, NUM_POSITIONS]


def test_a_long_prompt_gets_its_own_rectangle() -> None:
    batch = make([Chunk(0, 3, [1]), Chunk(1, 0, list(range(40))), Chunk(2, 9, [1, 2])])
    shapes = sorted((s.num_slots, s.gather_RQ.shape[1], s.length) for s in batch.segments)
    assert shapes == [(1, 40, 40), (3, 2, 11)]


@pytest.mark.parametrize("seed", range(20))
def test_every_token_sees_its_own_past_and_nothing_else(seed: int) -> None:
    source = random.Random(seed)
    slots = sorted(source.sample(range(6), source.randint(1, 6)))
    chunks = [
        Chunk(slot, source.randint(0, 12), [source.randrange(9) for _ in range(source.randint(1, 9))]) for slot in slots
    ]
    batch = make(chunks, long_chunk=source.choice([1, 4, 33]))
    owner = [(chunk.slot, chunk.start + i) for chunk in chunks for i in range(len(chunk.token_ids))]
    covered: list[int] = []
    for segment in batch.segments:
        queries = segment.gather_RQ.shape[1]
        for cell, token in zip(segment.scatter_M.tolist(), segment.tokens_M.tolist(), strict=True):
            row, column = divmod(cell, queries)
            slot, position = owner[token]
            assert segment.first_slot + row == slot
            assert int(segment.gather_RQ[row, column]) == token
            visible = torch.nonzero(segment.mask_RQT[row, 0, column] == 0).flatten().tolist()
            assert visible == list(range(position + 1))
            covered.append(token)
        # Rows without a query still see something, so that no softmax is over nothing.
        assert (segment.mask_RQT == 0).any(-1).all()
    assert sorted(covered) == list(range(len(owner)))
