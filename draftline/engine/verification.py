"""The verification of one engine step: from the target's hidden states to each request's new tokens.

Whatever the number of requests, tensors go to the device once and come back
once (twice where alternatives were asked for).

Dimension letters: N rows (tokens whose logits decide something), V vocabulary,
R requests, B drafted slots of the longest block, S sampled requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draftline.decoding.verify import (
    DraftedBlocks,
    DraftLaws,
    SamplingLaw,
    law_of,
    verify_greedy,
    verify_sampled,
)
from draftline.draft.proposer import Proposal
from draftline.engine.requests import SamplingParams, TopLogprobs

Score = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Deciding:
    """A request whose next tokens come out of a step.

    Attributes:
        sampling: How it is decoded.
        random: Its randomness; one number a draft and one more are taken where it is sampled.
        drafted_ids: Drafts that were verified.
        proposal_row: Its row of the proposal; ``None`` when nothing was drafted for it.
    """

    sampling: SamplingParams
    random: np.random.Generator
    drafted_ids: Sequence[int]
    proposal_row: int | None


@dataclass(frozen=True)
class Verdict:
    """What a step gives one request.

    Attributes:
        num_accepted: Accepted drafts.
        token_ids: Those, and the token that follows them.
        logprobs: The target's log-probability of each (temperature 1, nothing cut off); empty unless asked for.
        top_logprobs: Alternatives at each place, likeliest first; empty unless asked for.
    """

    num_accepted: int
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]


@dataclass(frozen=True)
class _DraftSide:
    """What the drafts are from.

    Attributes:
        proposal: The blocks.
        draft_to_target_W: Target id of every draft column.
    """

    proposal: Proposal | None
    draft_to_target_W: Tensor | None

    def laws(self, requests: Sequence[Deciding], device: torch.device) -> DraftLaws | None:
        """Laws of the requests' drafts; ``None`` when there are no drafts."""
        proposal = self.proposal
        if proposal is None or not any(request.drafted_ids for request in requests):
            return None
        assert proposal.law_RBW is not None or proposal.is_certain
        rows = torch.tensor([request.proposal_row or 0 for request in requests], device=device)
        return DraftLaws(rows, proposal.columns_RB.to(device), proposal.law_RBW, self.draft_to_target_W)


def verify_step(
    logits_NV: Tensor,
    deciding: Sequence[Deciding],
    proposal: Proposal | None,
    draft_to_target_W: Tensor | None,
    score: Score,
) -> list[Verdict]:
    """Verify all requests of a step together.

    Args:
        logits_NV: The target's logits, for every request after its anchor and after each of its drafts.
        deciding: The requests, in the order of the rows.
        proposal: What their drafts are from.
        draft_to_target_W: Target id of every draft column; ``None`` when they are equal.
        score: The likeliest token and the log-sum-exp of every row, by the target's best means.
    """
    if not deciding:
        return []
    blocks = _blocks(deciding, logits_NV.device)
    best_N, normaliser_N = _score(logits_NV, deciding, score)
    draft = _DraftSide(proposal, draft_to_target_W)
    accepted_R, following_R = _decide(logits_NV, best_N, deciding, blocks, draft)
    ids_RB1 = torch.nn.functional.pad(blocks.ids_RB, (0, 1)).scatter_(1, accepted_R[:, None], following_R[:, None])
    parts = [accepted_R[:, None], ids_RB1]
    alternatives: list[list[TopLogprobs]] = [[] for _ in deciding]
    if normaliser_N is not None:
        rows_RB1 = DraftedBlocks(blocks.first_row_R, ids_RB1, blocks.counts_R).rows_RB(len(logits_NV))
        parts.append(logits_NV[rows_RB1, ids_RB1].float() - normaliser_N[rows_RB1])
        alternatives = _alternatives(logits_NV, normaliser_N, deciding)
    # Doubles hold token ids and log-probabilities alike, so one transfer brings everything.
    packed = torch.cat([part.double() for part in parts], 1).tolist()
    width = ids_RB1.shape[1]
    verdicts = []
    for request, values, top in zip(deciding, packed, alternatives, strict=True):
        end = int(values[0]) + 1
        assert end <= len(request.drafted_ids) + 1
        logprobs = values[1 + width : 1 + width + end] if request.sampling.has_logprobs else []
        verdicts.append(Verdict(end - 1, [int(token) for token in values[1 : 1 + end]], logprobs, top[:end]))
    return verdicts


def _blocks(deciding: Sequence[Deciding], device: torch.device) -> DraftedBlocks:
    longest = max(len(request.drafted_ids) for request in deciding)
    table = np.zeros((len(deciding), 2 + longest), dtype=np.int64)
    first_row = 0
    for row, request in zip(table, deciding, strict=True):
        count = len(request.drafted_ids)
        row[0], row[1] = first_row, count
        row[2 : 2 + count] = request.drafted_ids
        first_row += count + 1
    on_device = torch.from_numpy(table).to(device)
    return DraftedBlocks(on_device[:, 0], on_device[:, 2:], on_device[:, 1])


def _score(logits_NV: Tensor, deciding: Sequence[Deciding], score: Score) -> tuple[Tensor | None, Tensor | None]:
    """Likeliest token and log-sum-exp of every row, where a request asks for them."""
    if any(request.sampling.has_logprobs for request in deciding):
        return score(logits_NV)
    is_greedy = any(request.sampling.temperature == 0 for request in deciding)
    return (logits_NV.argmax(-1) if is_greedy else None), None


def _decide(
    logits_NV: Tensor,
    best_N: Tensor | None,
    deciding: Sequence[Deciding],
    blocks: DraftedBlocks,
    draft_side: _DraftSide,
) -> tuple[Tensor, Tensor]:
    """Accepted drafts and following token, ``[R]`` each: greedy requests and sampled ones, each kind at once."""
    sampled = [place for place, request in enumerate(deciding) if request.sampling.temperature > 0]
    if not sampled:
        assert best_N is not None
        return verify_greedy(best_N, blocks)
    requests = [deciding[place] for place in sampled]
    draft = draft_side.laws(requests, logits_NV.device)
    if len(sampled) == len(deciding):
        return _decide_sampled(logits_NV, requests, blocks, draft)
    index_S = torch.tensor(sampled, device=logits_NV.device)
    rows = _rows_of(deciding, sampled)
    own = _blocks(requests, logits_NV.device)
    found = _decide_sampled(logits_NV[torch.tensor(rows, device=logits_NV.device)], requests, own, draft)
    assert best_N is not None
    accepted_R, following_R = verify_greedy(best_N, blocks)
    return accepted_R.index_copy_(0, index_S, found[0]), following_R.index_copy_(0, index_S, found[1])


def _decide_sampled(
    logits_NV: Tensor, requests: Sequence[Deciding], blocks: DraftedBlocks, draft: DraftLaws | None
) -> tuple[Tensor, Tensor]:
    laws: list[SamplingLaw] = []
    uniforms = np.zeros((len(requests), blocks.ids_RB.shape[1] + 1))
    for row, request in zip(uniforms, requests, strict=True):
        sampling, count = request.sampling, len(request.drafted_ids)
        laws += [SamplingLaw(sampling.temperature, sampling.top_p, sampling.top_k)] * (count + 1)
        numbers = request.random.random(count + 1)
        row[:count], row[-1] = numbers[:count], numbers[count]
    on_device = torch.from_numpy(uniforms).to(logits_NV.device)
    return verify_sampled(law_of(logits_NV, laws), blocks, draft, on_device[:, :-1], on_device[:, -1])


def _rows_of(deciding: Sequence[Deciding], places: Sequence[int]) -> list[int]:
    """Rows of some of the requests."""
    first = np.cumsum([0, *(len(request.drafted_ids) + 1 for request in deciding)]).tolist()
    return [row for place in places for row in range(first[place], first[place + 1])]


def _alternatives(logits_NV: Tensor, normaliser_N: Tensor, deciding: Sequence[Deciding]) -> list[list[TopLogprobs]]:
    """The likeliest tokens at each row of the requests that want them."""
    places = [place for place, request in enumerate(deciding) if _num_alternatives(request) > 0]
    found: list[list[TopLogprobs]] = [[] for _ in deciding]
    if not places:
        return found
    index_N = torch.tensor(_rows_of(deciding, places), device=logits_NV.device)
    most = min(max(_num_alternatives(deciding[place]) for place in places), logits_NV.shape[-1])
    values, ids = logits_NV[index_N].float().topk(most, dim=-1)
    values -= normaliser_N[index_N, None]
    pairs = iter(torch.stack([ids.double(), values.double()], -1).tolist())
    for place in places:
        for _ in range(len(deciding[place].drafted_ids) + 1):
            row = next(pairs)[: _num_alternatives(deciding[place])]
            found[place].append(tuple((int(token), logprob) for token, logprob in row))
    return found


def _num_alternatives(request: Deciding) -> int:
    return request.sampling.num_top_logprobs if request.sampling.has_logprobs else 0
