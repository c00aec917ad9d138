"""Near-duplicate search: Jaccard similarity of word trigrams, exact, by prefix filter.

Two sets with similarity above t share at least one element among the first
``n - ceil(t n) + 1`` of each, under any one global order; with rare elements
first, that prefix meets few others (Chaudhuri et al. 2006; Bayardo et al.
2007, "Scaling up all pairs similarity search"). So nothing is approximated,
and 100,000 prompts take seconds.
"""

from __future__ import annotations

import math
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence

TRIGRAM = 3
MIN_CONTAINED_SHINGLES = 8
MIN_BOILERPLATE_TEXTS = 20

# Scripts without spaces between words: each character counts as a word.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_BUCKETS = 1 << 20


def normalise(text: str) -> str:
    """The form in which two texts count as the same: NFC, case folded, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


class Shingler:
    """Turns texts into sets of word trigrams, as sorted 64-bit integers.

    Numbers are comparable only among one shingler's results.
    """

    def __init__(self) -> None:
        self._word_ids: dict[str, int] = {}

    def shingle(self, texts: Iterable[str]) -> array[int]:
        """Distinct trigrams of all texts together; a shorter text is one shingle.

        Hashes of integer tuples are not salted, and a collision among 64 bits
        would at worst merge two trigrams of one text.
        """
        found: set[int] = set()
        for text in texts:
            plain = normalise(text)
            words = _WORD.findall(plain) or [plain]
            ids = [self._word_ids.setdefault(word, len(self._word_ids)) for word in words]
            if len(ids) < TRIGRAM:
                found.add(hash(tuple(ids)))
            else:
                found.update(map(hash, zip(ids, ids[1:], ids[2:], strict=False)))
        return array("q", sorted(found))


class RarityOrder:
    """A global order of shingles, the rare ones first.

    Counts go into a fixed table: a clash of two shingles only makes the
    filter a little weaker, never wrong.
    """

    def __init__(self, corpus: Iterable[array[int]]) -> None:
        self._counts = array("I", bytes(4 * _BUCKETS))
        for shingles in corpus:
            for shingle in shingles:
                self._counts[shingle % _BUCKETS] += 1

    def sort(self, shingles: array[int]) -> list[int]:
        """Shingles, rarest first."""
        counts = self._counts
        return sorted(shingles, key=lambda shingle: (counts[shingle % _BUCKETS], shingle))


class NearDuplicateIndex:
    """The prompts kept so far; answers whether a new one is nearly one of them."""

    def __init__(self, threshold: float, order: RarityOrder) -> None:
        self._threshold = threshold
        self._order = order
        self._kept: list[array[int]] = []
        self._holders: dict[int, list[int]] = defaultdict(list)

    def add_if_new(self, shingles: array[int]) -> bool:
        """Keep the set unless its similarity to a kept one is above the threshold."""
        prefix = self._order.sort(shingles)[: _prefix_length(len(shingles), self._threshold)]
        candidates = {index for shingle in prefix for index in self._holders.get(shingle, ())}
        own = set(shingles)
        if any(self._is_near(own, self._kept[index]) for index in candidates):
            return False
        for shingle in prefix:
            self._holders[shingle].append(len(self._kept))
        self._kept.append(shingles)
        return True

    def _is_near(self, own: set[int], other: Sequence[int]) -> bool:
        small, large = sorted((len(own), len(other)))
        if small <= self._threshold * large:
            return False
        shared = len(own.intersection(other))
        return shared > self._threshold * (len(own) + len(other) - shared)


def without_boilerplate(texts: Sequence[array[int]]) -> list[array[int]]:
    """Texts of one suite without the shingles that more than half of them share.

    Those are the suite's instructions ("reason step by step", an answer
    format), not its problems: with them counted, a problem that is quoted
    bare would look like a small part of the protected text. Sets of fewer
    than :data:`MIN_BOILERPLATE_TEXTS` say too little about what is common,
    and a text of which too little would be left stays whole.
    """
    if len(texts) < MIN_BOILERPLATE_TEXTS:
        return list(texts)
    counts: dict[int, int] = defaultdict(int)
    for shingles in texts:
        for shingle in shingles:
            counts[shingle] += 1
    own = [array("q", (s for s in shingles if counts[s] * 2 <= len(texts))) for shingles in texts]
    return [kept if len(kept) >= MIN_CONTAINED_SHINGLES else whole for kept, whole in zip(own, texts, strict=True)]


class ContainmentIndex:
    """Texts that must not be trained on; answers whether a prompt contains one of them.

    Containment (the share of the protected text's trigrams found in the
    prompt) rather than Jaccard: a benchmark problem wrapped in other
    instructions is still that problem. It is never below the Jaccard
    similarity, so near-duplicates are found too.
    """

    def __init__(self, threshold: float, protected: Iterable[array[int]]) -> None:
        self._threshold = threshold
        self._texts = list(protected)
        order = RarityOrder(self._texts)
        self._holders: dict[int, list[int]] = defaultdict(list)
        for index, shingles in enumerate(self._texts):
            for shingle in order.sort(shingles)[: _prefix_length(len(shingles), threshold)]:
                self._holders[shingle].append(index)

    def contains_any(self, shingles: array[int]) -> bool:
        """Whether a protected text lies (nearly) within this one."""
        candidates = {index for shingle in shingles for index in self._holders.get(shingle, ())}
        own = set(shingles)
        return any(self._is_within(self._texts[index], own) for index in candidates)

    def _is_within(self, protected: array[int], own: set[int]) -> bool:
        if len(protected) < MIN_CONTAINED_SHINGLES:
            # Too little text to call a quotation: only the same few words count.
            return own == set(protected)
        return len(own.intersection(protected)) >= self._threshold * len(protected)


def _prefix_length(size: int, threshold: float) -> int:
    # The small slack keeps the filter safe against rounding of threshold * size.
    return size - math.ceil(threshold * size - 1e-9) + 1
