"""How soon a place frees: the time that a refused client is told to wait.

A place frees when an answer ends, so on average every ``tokens of an answer /
tokens per second of the engine`` seconds. Both are running means over what
the engine did last. Clients that were just refused will all come back, each
for a place of its own, so each is told a later time than the one before.
"""

from __future__ import annotations

import math
from collections import deque

MAX_RETRY_AFTER_S = 60
"""Nobody waits longer for a guess."""

_SMOOTHING = 0.1
_FIRST_GUESS_S = 1.0


class Turnover:
    """Running means of one engine; not thread-safe, the caller holds a lock."""

    def __init__(self) -> None:
        self._tokens_per_s = 0.0
        self._answer_tokens = 0.0
        self._num_answers = 0
        self._returning_s: deque[float] = deque()

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """The engine produced ``num_tokens`` for all sequences together in one step."""
        if seconds > 0:
            rate = num_tokens / seconds
            self._tokens_per_s += (_SMOOTHING if self._tokens_per_s else 1.0) * (rate - self._tokens_per_s)

    def record_finished(self, num_tokens: int) -> None:
        """A sequence ended after ``num_tokens``, for whatever reason."""
        self._num_answers += 1
        weight = max(_SMOOTHING, 1 / self._num_answers)
        self._answer_tokens += weight * (num_tokens - self._answer_tokens)

    def seconds_per_place(self, running_limits: float) -> float:
        """Mean time between two places that free.

        Args:
            running_limits: Mean token limit of the sequences in flight, which stands in for the length of an
                answer as long as none has ended.
        """
        if not self._tokens_per_s:
            return _FIRST_GUESS_S
        tokens = self._answer_tokens if self._num_answers else running_limits / 2
        return max(tokens, 1.0) / self._tokens_per_s

    def retry_after_s(self, now_s: float, running_limits: float) -> int:
        """What the client that is refused now should wait, in whole seconds from 1 on.

        Args:
            now_s: Monotonic clock.
            running_limits: See :meth:`seconds_per_place`.
        """
        while self._returning_s and self._returning_s[0] <= now_s:
            self._returning_s.popleft()
        wait_s = (len(self._returning_s) + 1) * self.seconds_per_place(running_limits)
        whole_s = min(max(math.ceil(wait_s), 1), MAX_RETRY_AFTER_S)
        # At the cap all are told the same, and counting more of them changes nothing.
        if whole_s < MAX_RETRY_AFTER_S:
            self._returning_s.append(now_s + wait_s)
        return whole_s
