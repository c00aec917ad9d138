"""The prompts station: read, clean, split, store."""

from __future__ import annotations

from draftline.errors import InputError
from draftline.evaluation.suites import configured_texts, humaneval_texts, is_test_split
from draftline.prompts.clean import CleanedPrompts, clean_prompts, describe_report
from draftline.prompts.source import read_source
from draftline.spec.models import HELD_OUT
from draftline.steps.context import StepContext, StepOutput


def run(context: StepContext) -> StepOutput:
    """Write one JSONL file a split.

    Prompts that overlap an evaluation suite of the spec are removed, and
    those that overlap HumanEval always: its problems are at hand, and a later
    run may measure on them.

    Raises:
        InputError: the source or a suite cannot be read, or nothing is left of the prompts.
        StorageError: the workspace failed.
    """
    spec = context.spec.prompts
    source = read_source(spec)
    cleaned = clean_prompts(
        source.lines(),
        spec,
        system_prompt=source.system_prompt,
        protected=[humaneval_texts(), *configured_texts(context.spec.evaluation)],
        tick=lambda done: context.report(done, 0, "prompts"),
    )
    _require_held_out(context, cleaned)
    files = {}
    for split, prompts in cleaned.splits.items():
        files[split] = f"{split}.jsonl"
        body = "".join(prompt.to_line() + "\n" for prompt in prompts)
        context.store.put(f"{context.prefix}/{files[split]}", body.encode())
    counts = {split: len(prompts) for split, prompts in cleaned.splits.items()}
    context.report(sum(counts.values()), sum(counts.values()), "prompts")
    return StepOutput(
        outputs={
            "files": files,
            "counts": counts,
            "report": dict(cleaned.report),
            "examples": {reason: list(numbers) for reason, numbers in cleaned.examples.items()},
        },
        metrics={"prompts_kept": float(cleaned.report["kept"])},
        note=describe_report(cleaned.report).splitlines()[0],
    )


def _require_held_out(context: StepContext, cleaned: CleanedPrompts) -> None:
    """Say now, not after the training, that there is nothing to evaluate on."""
    if not cleaned.splits["test"] and is_test_split(HELD_OUT, context.spec.evaluation):
        raise InputError(
            f"none of the {cleaned.report['kept']} usable prompts falls into the held-out split",
            expected=f"about {context.spec.prompts.holdout_fraction:.0%} of them",
            remedy="Give more prompts, or raise prompts.holdout_fraction",
        )
    if context.spec.draft.enable_confidence_head and not cleaned.splits["calibration"]:
        raise InputError(
            f"none of the {cleaned.report['kept']} usable prompts falls into the calibration split",
            expected=f"about {context.spec.prompts.calibration_fraction:.0%} of them",
            remedy="Give more prompts, or raise prompts.calibration_fraction",
        )
