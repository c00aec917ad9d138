"""Requests and the fate of their drafts; numpy only.

A draft's conditional confidence is drawn as a logit: the mean of its domain at
its position, what is particular to the request, what is particular to the
passage (it persists from block to block) and to the token. The draft is then
accepted with just that probability, so confidences are calibrated and tell as
much as the spread says; :attr:`Traffic.confidence_offset` and
``confidence_noise`` make the reported ones worse than that.

Domain means are solved for the published accepted lengths of whole blocks of 7
(DSpark paper, table 1, Qwen3-8B at temperature 1: the mean of three suites each).
With the spread below the AUC of the survivals is 0.8 to 0.9; the paper reports
0.81 to 0.91.

Dimension letters: M drafting requests, B positions of a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ACCEPTED_LENGTHS: Mapping[str, float] = {"chat": 3.50, "code": 5.28, "math": 5.65, "sharegpt": 3.4}
"""``sharegpt`` is what vLLM's blog gives for DeepSeek-V4, see :mod:`draftline.simulation.machines`."""
_REQUEST_SPREAD = 0.5
_PASSAGE_SPREAD = 0.8
_TOKEN_SPREAD = 1.3
_PASSAGE_MEMORY = 0.6
_FALL_PER_POSITION = 0.05
"""Conditional logits fall along a block: later drafts have seen less."""


@dataclass(frozen=True)
class Traffic:
    """Who asks for what.

    Attributes:
        shares: Of the domains among requests.
        mean_prompt_tokens: Lengths are log-normal about it.
        mean_output_tokens: The same.
        length_spread: Standard deviation of the logarithm of lengths.
        confidence_offset: Added to the reported logits.
        confidence_noise: Standard deviation of what is added to them.
        seed: Of everything random. A request's fate depends on it and on the
            request's number alone, so policies meet the same requests.
    """

    shares: Mapping[str, float] = field(default_factory=lambda: {"chat": 0.5, "code": 0.25, "math": 0.25})
    mean_prompt_tokens: float = 256.0
    mean_output_tokens: float = 512.0
    length_spread: float = 0.6
    confidence_offset: float = 0.0
    confidence_noise: float = 0.0
    seed: int = 0

    def request(self, number: int) -> RequestFacts:
        """The request of a number."""
        random = np.random.default_rng([self.seed, number])
        names, weights = list(self.shares), np.array(list(self.shares.values()))
        domain = names[int(random.choice(len(names), p=weights / weights.sum()))]
        prompt, output = (
            max(1, round(mean * float(np.exp(self.length_spread * random.normal() - self.length_spread**2 / 2))))
            for mean in (self.mean_prompt_tokens, self.mean_output_tokens)
        )
        level = domain_logit(ACCEPTED_LENGTHS[domain]) + _REQUEST_SPREAD * float(random.normal())
        return RequestFacts(number, domain, prompt, output, level)


TRAFFIC: Mapping[str, Traffic] = {
    "mix": Traffic(),
    "chat": Traffic({"chat": 1.0}),
    "sharegpt": Traffic({"sharegpt": 1.0}, mean_prompt_tokens=1.0, length_spread=0.01),
}
"""By name. ``sharegpt`` asks for 512 tokens each and reads no prompts: published step costs contain them."""


@dataclass(frozen=True)
class RequestFacts:
    """One request.

    Attributes:
        number: Of it.
        domain: Its kind.
        prompt_tokens: To be read.
        output_tokens: To be written.
        level: Its mean conditional logit at the first position.
    """

    number: int
    domain: str
    prompt_tokens: int
    output_tokens: int
    level: float


class Drafts:
    """Draws blocks of many requests at once.

    Args:
        traffic: Spread and errors.
        num_rows: Requests at a time; a row's passage persists until :meth:`reset`.
        block_size: B.
    """

    def __init__(self, traffic: Traffic, num_rows: int, block_size: int) -> None:
        self._traffic = traffic
        self._random = np.random.default_rng([traffic.seed, 2**31])
        self._passage_N = np.zeros(num_rows)
        self._level_N = np.zeros(num_rows)
        self._block_size = block_size

    def reset(self, row: int, level: float) -> None:
        """A new request takes the row."""
        self._level_N[row] = level
        self._passage_N[row] = self._random.normal()

    def draw(self, rows_M: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
        """Reported conditional logits ``[M, B]``, and drafts that the target would accept of whole blocks."""
        kept = _PASSAGE_MEMORY
        fresh_M = self._random.normal(size=len(rows_M))
        passage_M = kept * self._passage_N[rows_M] + np.sqrt(1 - kept**2) * fresh_M
        self._passage_N[rows_M] = passage_M
        shape = (len(rows_M), self._block_size)
        own_M = self._level_N[rows_M] + _PASSAGE_SPREAD * passage_M
        logits_MB = own_M[:, None] - _FALL_PER_POSITION * np.arange(self._block_size)
        logits_MB = logits_MB + _TOKEN_SPREAD * self._random.normal(size=shape)
        is_accepted_MB = self._random.random(shape) < 1 / (1 + np.exp(-logits_MB))
        accepted_M = np.where(is_accepted_MB.all(axis=1), self._block_size, is_accepted_MB.argmin(axis=1))
        reported_MB = logits_MB + self._traffic.confidence_offset
        if self._traffic.confidence_noise:
            reported_MB = reported_MB + self._traffic.confidence_noise * self._random.normal(size=shape)
        return reported_MB, accepted_M.astype(np.int64)


@lru_cache(maxsize=64)
def domain_logit(accepted_length: float, block_size: int = 7) -> float:
    """Mean logit whose whole blocks are accepted to a length, bonus token included; by bisection on a fixed sample."""
    random = np.random.default_rng(7)
    shared = np.hypot(_REQUEST_SPREAD, _PASSAGE_SPREAD) * random.normal(size=(4000, 1))
    noise = shared + _TOKEN_SPREAD * random.normal(size=(4000, block_size))
    noise = noise - _FALL_PER_POSITION * np.arange(block_size)
    low, high = -8.0, 12.0
    for _ in range(40):
        middle = (low + high) / 2
        length = 1 + (1 / (1 + np.exp(-(middle + noise)))).cumprod(axis=1).sum(axis=1).mean()
        low, high = (middle, high) if length < accepted_length else (low, middle)
    return (low + high) / 2
