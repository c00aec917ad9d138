"""Prompt lookup and a stand-alone model as drafts: what they propose, and that the output stays the target's."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare

from draftline.draft.prompt_lookup import PromptLookup
from draftline.draft.proposer import EngineRoom, ProcessedTokens, ProposerFactory
from draftline.draft.standalone import StandaloneDraft
from draftline.engine.checks import MAX_BLOCK_SIZE
from draftline.engine.engine import Engine, EngineLimits
from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.errors import TargetError
from draftline.scheduling.policies import FixedPolicy
from draftline.target.load import Target
from tests.counted_forward import count_rows
from tests.engine.runs import Answer, answer, greedy, make_engine, questions
from tests.engine.test_law import ALARM, NUM_REQUESTS, PROMPT, VOCAB, expected, target
from tests.servers.tiny_target import toy_target

__all__ = ["expected", "target"]  # the law's fixtures


def learn(lookup: PromptLookup, slot: int, letters: str, start: int = 0, room: int = 40) -> None:
    positions = torch.arange(start, start + len(letters))
    ids = torch.tensor([ord(letter) for letter in letters], dtype=torch.long)
    lookup.append(ProcessedTokens(ids, positions, slot * room + positions, torch.empty(len(letters), 0, 1)))


def look_up(lookup: PromptLookup, slot: int, anchor: str, start: int) -> str:
    proposal = lookup.propose([slot], [ord(anchor)], [start], [0.0], None)
    assert proposal.lengths_R is not None
    return "".join(map(chr, proposal.token_ids_RB[0, : proposal.lengths_R[0]].tolist()))


def plain_continuation(text: str, max_ngram: int, count: int) -> str:
    """The definition: what followed the latest earlier place of the longest suffix that has one."""
    for size in range(min(max_ngram, len(text) - 1), 0, -1):
        place = text.rfind(text[-size:], 0, len(text) - 1)
        if place >= 0:
            return text[place + size : place + size + count]
    return ""


@pytest.mark.parametrize(
    ("so_far", "count", "found"),
    [
        ("abcabdab", 2, "da"),  # "ab" occurs twice before: the later place counts
        ("xabcyabc", 3, "yab"),  # three tokens match: what followed them, into the suffix itself
        ("abab", 4, "ab"),  # no more than the text holds
        ("abcd", 3, ""),
        ("aaa", 2, "a"),
        ("a", 2, ""),
        ("zbxb", 2, "xb"),  # only a single token matches
    ],
)
def test_a_lookup_continues_as_the_text_did(so_far: str, count: int, found: str) -> None:
    lookup = PromptLookup(EngineRoom(1, 40), count)
    learn(lookup, 0, so_far[:-1])
    assert look_up(lookup, 0, so_far[-1], len(so_far) - 1) == found == plain_continuation(so_far, 3, count)


def test_lookups_stay_those_of_the_text_while_slots_grow_move_and_are_used_again() -> None:
    source = random.Random(4)
    lookup, texts = PromptLookup(EngineRoom(4, 40), 4), [""] * 4
    found = 0
    for _ in range(3000):
        slot = source.randrange(4)
        if source.random() < 0.1:
            other = source.randrange(4)
            length = source.randrange(len(texts[slot]) + 1)
            if other != slot:
                lookup.move(slot, other, length)
            texts[other] = texts[slot][:length]
        room = 39 - len(texts[slot])
        added = "".join(source.choice("abc") for _ in range(min(room, source.randrange(1, 6))))
        learn(lookup, slot, added, len(texts[slot]))
        texts[slot] += added
        if source.random() < 0.5:
            continue
        anchor = source.choice("abc")
        expected = plain_continuation(texts[slot] + anchor, 3, 4)
        assert look_up(lookup, slot, anchor, len(texts[slot])) == expected
        found += len(expected) == 4
        if len(texts[slot]) > 34:
            texts[slot] = texts[slot][: source.randrange(8)]
    assert found > 300


def speculate(target: Target, make: ProposerFactory, slots: int, prefill_tokens: int = 512) -> Engine:
    engine = Engine(target, EngineLimits(slots, 160, prefill_tokens), FixedPolicy())
    engine.swap_proposer(make)
    return engine


@pytest.mark.parametrize("kind", ["lookup", "itself", "another", "pruned"])
@pytest.mark.parametrize(("slots", "prefill_tokens"), [(1, 512), (3, 9), (8, 20)])
def test_no_proposer_changes_a_token(loaded_target: Target, kind: str, slots: int, prefill_tokens: int) -> None:
    # Some requests twice, so that slots are taken over with their prefix.
    prompts = questions(loaded_target, 6)
    requests = greedy([*prompts, *prompts[:3]])
    plain: dict[str, Answer] = {r.request_id: answer(make_engine(loaded_target), [r])[r.request_id] for r in requests}
    other = replace(loaded_target, weights=_weights(loaded_target, 0.02))
    model = loaded_target if kind == "itself" else other

    def make(room: EngineRoom) -> PromptLookup | StandaloneDraft:
        if kind == "lookup":
            return PromptLookup(room, 4)
        vocab = torch.arange(100, loaded_target.vocab_size) if kind == "pruned" else None
        return StandaloneDraft(model, loaded_target, room, 4, vocab)

    found = answer(speculate(loaded_target, make, slots, prefill_tokens), requests)
    for name, one in found.items():
        assert one.token_ids == plain[name].token_ids, name
    accepted = sum(one.stats.num_accepted_tokens for one in found.values())
    drafted = sum(one.stats.num_draft_tokens for one in found.values())
    if kind == "itself":
        # A model that drafts for itself is always right: its state survives slots that move, end and are taken over.
        assert accepted == drafted > 0
    else:
        assert 0 < accepted < drafted


def test_accepted_drafts_are_not_processed_again(loaded_target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(loaded_target, weights=_weights(loaded_target, 0.0))
    engine = speculate(loaded_target, lambda room: StandaloneDraft(model, loaded_target, room, 4), 1)
    request = greedy(questions(loaded_target, 1), 26)[0]
    rows = count_rows(model, monkeypatch)
    answer(engine, [request])
    # The first token, then five steps of five. Each processes the anchor and three drafts; the prompt comes before the
    # first, and the fourth draft of a block before the next.
    assert sum(rows) == len(request.prompt_ids) + 5 * 4 + 4


@pytest.mark.parametrize("kind", ["lookup", "another", "pruned"])
def test_sampled_output_follows_the_targets_law(target: Target, expected: np.ndarray, kind: str) -> None:
    """A right engine raises the alarm for one choice of seeds in 1,000; the seeds are fixed."""
    other = toy_target(vocab_size=VOCAB, spread=0.9, seed=5)

    def make(room: EngineRoom) -> PromptLookup | StandaloneDraft:
        if kind == "lookup":
            return PromptLookup(room, 2)
        return StandaloneDraft(other, target, room, 2, torch.tensor([0, 2, 3, 5]) if kind == "pruned" else None)

    engine = Engine(target, EngineLimits(100, 16), FixedPolicy())
    engine.swap_proposer(make)
    requests = [EngineRequest(str(i), PROMPT, SamplingParams(5, 1.0, seed=i)) for i in range(NUM_REQUESTS)]
    answers = answer(engine, requests)
    counts = np.zeros((VOCAB, VOCAB))
    for one in answers.values():
        counts[one.token_ids[1], one.token_ids[2]] += 1
    assert chisquare(counts.ravel(), expected.ravel() * NUM_REQUESTS).pvalue > ALARM
    accepted = sum(one.stats.num_accepted_tokens for one in answers.values())
    drafted = sum(one.stats.num_draft_tokens for one in answers.values())
    assert 0 < accepted < drafted


def test_a_model_with_another_vocabulary_is_refused(loaded_target: Target) -> None:
    with pytest.raises(TargetError, match="another vocabulary"):
        StandaloneDraft(toy_target(), loaded_target, EngineRoom(1, 8))


def test_a_block_without_room_is_refused(loaded_target: Target) -> None:
    engine = make_engine(loaded_target)
    with pytest.raises(TargetError, match="no room"):
        engine.swap_proposer(lambda room: PromptLookup(room, MAX_BLOCK_SIZE + 1))


def _weights(target: Target, noise: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = load_file(target.folder / "model.safetensors")
    return {name: w.float() + noise * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
