"""The prefix filter finds exactly what comparing all pairs finds."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftline.prompts.similarity import (
    ContainmentIndex,
    NearDuplicateIndex,
    RarityOrder,
    Shingler,
    normalise,
    without_boilerplate,
)

WORDS = ["the", "my", "order", "parcel", "late", "refund", "where", "is", "please", "not"]
texts = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join), min_size=1, max_size=25)
thresholds = st.floats(min_value=0.05, max_value=0.99)


def jaccard(one: array[int], other: array[int]) -> float:
    a, b = set(one), set(other)
    return len(a & b) / len(a | b)


@settings(deadline=None)
@given(texts, thresholds)
def test_same_decisions_as_comparing_all_pairs(corpus: list[str], threshold: float) -> None:
    shingler = Shingler()
    sets = [shingler.shingle([text]) for text in corpus]
    index = NearDuplicateIndex(threshold, RarityOrder(sets))
    kept: list[array[int]] = []
    for shingles in sets:
        expected = all(jaccard(shingles, other) <= threshold for other in kept)
        assert index.add_if_new(shingles) == expected
        if expected:
            kept.append(shingles)


@pytest.mark.parametrize(("threshold", "kept"), [(0.5, True), (0.49, False)])
def test_only_similarity_above_the_threshold_counts(threshold: float, kept: bool) -> None:
    """Two of four trigrams are shared: the similarity is exactly 0.5."""
    shingler = Shingler()
    sets = [shingler.shingle([text]) for text in ("a b c d e", "b c d e f")]
    index = NearDuplicateIndex(threshold, RarityOrder(sets))
    assert index.add_if_new(sets[0])
    assert index.add_if_new(sets[1]) is kept


@settings(deadline=None)
@given(texts, texts, thresholds)
def test_containment_same_as_comparing_all_pairs(protected: list[str], corpus: list[str], threshold: float) -> None:
    shingler = Shingler()
    guarded = [shingler.shingle([text]) for text in protected]
    index = ContainmentIndex(threshold, guarded)
    for text in corpus:
        own = set(shingler.shingle([text]))
        expected = any(
            len(own & set(other)) / len(other) >= threshold if len(other) >= 8 else own == set(other)
            for other in guarded
        )
        assert index.contains_any(array("q", sorted(own))) == expected


def test_quoted_problem_is_found_within_other_words() -> None:
    problem = "Return the list of all prefixes of the given string, from the shortest to the longest one."
    shingler = Shingler()
    index = ContainmentIndex(0.8, [shingler.shingle([problem])])
    assert index.contains_any(shingler.shingle([f"Dear assistant, I am stuck. {problem.upper()} Thanks a lot!"]))
    assert not index.contains_any(shingler.shingle(["Return my parcel to the sender, and list all the prefixes."]))


def test_words_ignore_case_punctuation_and_unicode_form() -> None:
    shingler = Shingler()
    assert shingler.shingle(["Wo ist mein Cafe\u0301?"]) == shingler.shingle(["wo ist, mein CAF\u00c9"])
    assert normalise("  Stra\u00dfe\t1 ") == "strasse 1"


def test_unspaced_scripts_are_compared_by_character() -> None:
    shingler = Shingler()
    one, other = shingler.shingle(["我的订单还没有送到请帮忙"]), shingler.shingle(["我的订单还没有送到请帮我"])
    assert 0.7 < jaccard(one, other) < 1.0


def test_texts_without_words_differ() -> None:
    shingler = Shingler()
    assert shingler.shingle(["?!"]) != shingler.shingle(["..."])


def test_templated_prompts_need_few_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of 5,000 prompts with the same opening and closing are 12 million; the filter leaves next to none."""
    generator = random.Random(0)
    vocabulary = [f"word{n}" for n in range(3000)]
    shingler = Shingler()
    sets = []
    for _ in range(5000):
        middle = " ".join(generator.choices(vocabulary, k=30))
        sets.append(shingler.shingle([f"Hello, I have a question about my order. {middle} Thanks for your help!"]))
    compared = 0
    is_near = NearDuplicateIndex._is_near

    def counting(index: NearDuplicateIndex, own: set[int], other: array[int]) -> bool:
        nonlocal compared
        compared += 1
        return is_near(index, own, other)

    monkeypatch.setattr(NearDuplicateIndex, "_is_near", counting)
    index = NearDuplicateIndex(0.8, RarityOrder(sets))
    assert sum(index.add_if_new(shingles) for shingles in sets) == 5000
    assert not index.add_if_new(sets[0])
    assert 0 < compared < 5000


def test_instructions_that_a_suite_repeats_are_not_its_problems() -> None:
    wrapper = "Please reason step by step and put your final answer within a box at the very end"
    words = ("few", "trains", "leave", "one", "town", "for", "another", "and", "meet", "at", "noon")
    problems = [" ".join(f"{word}{number}" for word in words) for number in range(20)]
    shingler = Shingler()
    wrapped = [shingler.shingle([f"{problem} {wrapper}"]) for problem in problems]
    bare, other = shingler.shingle([problems[3]]), shingler.shingle([f"What is a monad? {wrapper}"])
    assert not ContainmentIndex(0.8, wrapped).contains_any(bare)
    index = ContainmentIndex(0.8, without_boilerplate(wrapped))
    assert index.contains_any(bare) and not index.contains_any(other)
    # Of few texts nothing can be told, and what would lose nearly everything stays whole.
    assert without_boilerplate(wrapped[:19]) == wrapped[:19]
    same = [shingler.shingle([wrapper])] * 20
    assert without_boilerplate(same) == same
