"""Cleaning and splitting of whole files."""

from __future__ import annotations

import json
import random

import pytest

from draftline.errors import InputError
from draftline.prompts import CleanedPrompts, Prompt, clean_prompts, describe_report
from draftline.prompts.clean import REPORT_KEYS, SPLITS
from draftline.spec import PromptsSpec

SPEC = PromptsSpec(source="tickets.jsonl")


def line(*turns: str, **extra: object) -> bytes:
    return json.dumps({"turns": list(turns), **extra}).encode()


def questions(count: int, seed: int = 0) -> list[bytes]:
    generator = random.Random(seed)
    words = [f"w{n}" for n in range(500)]
    return [line(" ".join(generator.choices(words, k=12))) for _ in range(count)]


def everything(cleaned: CleanedPrompts) -> list[Prompt]:
    return [prompt for split in SPLITS for prompt in cleaned.splits[split]]


def sides(cleaned: CleanedPrompts) -> dict[str, str]:
    return {prompt.turns[0]: split for split in SPLITS for prompt in cleaned.splits[split]}


MESSY = [
    b"\xef\xbb\xbf" + line("How do I get a refund for my last invoice please?"),
    b"{not json",
    b"",
    line("HOW do i get   a refund for my last invoice please?"),
    line("How do I get a refund for my last invoice, please, now?"),
    line("a" * 100_000),
    b'{"turns": ["caf\xe9"]}',
    line("   "),
    line("Kindly write for me: return the sum of all even numbers in the list xs as an integer, thanks"),
    line("Where is my parcel? It was due on Monday."),
]
PROTECTED = ["Return the sum of all even numbers in the list xs as an integer."]


def test_every_kind_of_bad_line_is_counted_with_its_line_number() -> None:
    spec = SPEC.model_copy(update={"near_duplicate_threshold": 0.6, "holdout_fraction": 0.0})
    cleaned = clean_prompts(MESSY, spec, protected=[PROTECTED])
    assert cleaned.report == {
        "read": 9,
        "malformed": 1,
        "not_utf8": 1,
        "empty": 1,
        "too_long": 1,
        "duplicate": 1,
        "near_duplicate": 1,
        "overlaps_evaluation": 1,
        "over_limit": 0,
        "kept": 2,
    }
    assert cleaned.examples == {
        "malformed": (2,),
        "duplicate": (4,),
        "near_duplicate": (5,),
        "too_long": (6,),
        "not_utf8": (7,),
        "empty": (8,),
        "overlaps_evaluation": (9,),
    }
    text = describe_report(cleaned.report, cleaned.examples)
    assert text.startswith("2 of 9 prompts kept")
    assert "1 dropped: not UTF-8 (line 7)" in text


def test_counts_add_up() -> None:
    cleaned = clean_prompts(MESSY + questions(300), SPEC.model_copy(update={"limit": 40}), protected=[PROTECTED])
    assert set(cleaned.report) == set(REPORT_KEYS)
    assert cleaned.report["read"] == sum(count for name, count in cleaned.report.items() if name != "read")
    assert cleaned.report["kept"] == len(everything(cleaned)) == 40


def test_first_five_line_numbers_are_shown() -> None:
    cleaned = clean_prompts([b"x"] * 9 + questions(30), SPEC)
    assert cleaned.examples["malformed"] == (1, 2, 3, 4, 5)
    assert "9 dropped: not a JSON object of a known shape (lines 1, 2, 3, 4, 5, ...)" in describe_report(
        cleaned.report, cleaned.examples
    )


def test_threshold_one_keeps_all_but_exact_copies() -> None:
    spec = SPEC.model_copy(update={"near_duplicate_threshold": 1.0, "holdout_fraction": 0.0})
    # Same trigrams, other order of sentences: not an exact copy.
    lines = [line("one two three one two three"), line("one two three one two three one two three")]
    assert clean_prompts(lines, spec).report["kept"] == 2


def test_nothing_usable_is_an_error_with_the_counts() -> None:
    with pytest.raises(InputError, match=r"no prompt of tickets\.jsonl can be used.*2 dropped: not a JSON object"):
        clean_prompts([b"[", b"nothing", b""], SPEC)
    with pytest.raises(InputError, match="0 of 0 prompts kept"):
        clean_prompts([], SPEC)


@pytest.mark.parametrize(
    ("lines", "remedy"),
    [
        ([b"nonsense"], "one JSON object a line"),
        ([b"\xff\xfe{"], "Save the file as UTF-8"),
        ([line("a" * 9000), line("b" * 9000), b"["], r"Raise prompts\.max_turn_chars"),
        ([line(PROTECTED[0])], "your own traffic"),
    ],
)
def test_remedy_fits_the_commonest_reason(lines: list[bytes], remedy: str) -> None:
    with pytest.raises(InputError, match=remedy):
        clean_prompts(lines, SPEC, protected=[PROTECTED])


def test_nothing_to_train_on_is_an_error() -> None:
    side = sides(clean_prompts(questions(200), SPEC))
    held = [raw for raw in questions(200) if side[json.loads(raw)["turns"][0]] == "test"]
    with pytest.raises(InputError, match="fall into the held-out splits"):
        clean_prompts(held[:3], SPEC)


def test_splits_have_about_their_fractions() -> None:
    """Binomial with n = 4000: six standard deviations is below 1e-8 for each bound."""
    cleaned = clean_prompts(questions(4000), SPEC)
    for split, fraction in (("test", 0.10), ("validation", 0.04), ("calibration", 0.06)):
        expected, deviation = 4000 * fraction, (4000 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(cleaned.splits[split]) - expected) < 6 * deviation


def test_prompt_never_changes_side() -> None:
    few, many = clean_prompts(questions(300), SPEC), clean_prompts(questions(900, seed=1) + questions(300), SPEC)
    before, after = sides(few), sides(many)
    assert all(after[text] == side for text, side in before.items())
    # Other fractions beside it do not move the held-out split either.
    wider = sides(clean_prompts(questions(300), SPEC.model_copy(update={"calibration_fraction": 0.3})))
    assert {t for t, s in wider.items() if s == "test"} == {t for t, s in before.items() if s == "test"}


def test_side_depends_on_the_first_turn_alone() -> None:
    lines = questions(200)
    longer = [line(json.loads(raw)["turns"][0].upper(), f"follow-up {n}") for n, raw in enumerate(lines)]
    one, other = sides(clean_prompts(lines, SPEC)), sides(clean_prompts(longer, SPEC))
    assert {text.upper(): side for text, side in one.items()} == other


def test_limit_takes_the_same_prompts_whatever_the_file_order() -> None:
    spec = SPEC.model_copy(update={"limit": 50})
    lines = questions(300)
    forward, backward = clean_prompts(lines, spec), clean_prompts(lines[::-1], spec)
    assert sides(forward) == sides(backward)
    assert set(sides(clean_prompts(lines, SPEC.model_copy(update={"limit": 80})))) > set(sides(forward))


def test_ids_are_unique_and_given_ones_kept() -> None:
    spec = SPEC.model_copy(update={"holdout_fraction": 0.0, "validation_fraction": 0.0, "calibration_fraction": 0.0})
    lines = [line("first question here", id="a"), line("second one, other words", id="a"), line("a third text")]
    ids = [prompt.id for prompt in clean_prompts(lines, spec).splits["train"]]
    assert ids[0] == "a"
    assert len(set(ids)) == 3
    assert ids[2].startswith("p-")
    alone = clean_prompts(lines[2:], spec).splits["train"][0].id
    assert alone == ids[2]


def test_system_prompt_precedence() -> None:
    lines = [line("first question here", system="line's"), line("second one, other words")]

    def systems(spec: PromptsSpec, workload: str | None) -> set[str | None]:
        return {prompt.system for prompt in everything(clean_prompts(lines, spec, system_prompt=workload))}

    bare = SPEC.model_copy(update={"holdout_fraction": 0.0, "validation_fraction": 0.0, "calibration_fraction": 0.0})
    assert systems(bare, None) == {"line's", None}
    assert systems(bare, "workload's") == {"line's", "workload's"}
    assert systems(bare.model_copy(update={"system_prompt": "spec's"}), "workload's") == {"spec's"}
