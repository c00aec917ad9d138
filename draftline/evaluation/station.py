"""The evaluation station's work for one suite."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from draftline.calibration.survival import Calibration
from draftline.draft.stored import stored_draft
from draftline.engine.policy import OffPolicy, policy_from_spec
from draftline.errors import InputError
from draftline.evaluation.measure import (
    Acceptance,
    Bench,
    EvaluationPrompt,
    Losslessness,
    Report,
    Timing,
    compare_greedy,
    measure_acceptance,
    measure_speed,
)
from draftline.evaluation.prompt import SuitePrompt
from draftline.evaluation.suites import load_suite
from draftline.prompts.spread import even_spread
from draftline.responses.generate import prompt_ids
from draftline.spec.models import HELD_OUT
from draftline.steps.context import StepContext, StepOutput
from draftline.target.load import Target, load_target


def evaluate(context: StepContext) -> StepOutput:
    """Measure the suite ``context.item``.

    Raises:
        InputError: the suite is unknown, empty, or no prompt fits the context.
        FormatError: the draft or the calibration is damaged.
    """
    spec = context.spec.evaluation
    target = load_target(context.spec.target)
    draft = stored_draft(context.store, context.inputs["draft"])
    calibration_step = context.inputs["calibration"]
    calibration = Calibration.from_json(
        context.store.get(f"{calibration_step.prefix}/{calibration_step.outputs['file']}").decode()
    )
    policy = policy_from_spec(context.spec.serving)
    bench = Bench(
        target,
        draft,
        calibration,
        policy if policy.wants_draft else OffPolicy(),
        spec.max_new_tokens,
        spec.timing_temperature,
        context.spec.seed,
    )
    suite = load_suite(context.item, spec, context.store, context.inputs["prompts"])
    prompts = _tokenised(target, suite, context.spec.serving.max_context - spec.max_new_tokens)
    # Files are often sorted by topic: an even spread sees all of them, the head would see the first.
    chosen = even_spread(prompts, spec.max_prompts)
    timed = even_spread(chosen, spec.timing_prompts)
    is_proven = context.item == HELD_OUT and spec.lossless_prompts > 0
    proven = even_spread(prompts, spec.lossless_prompts) if is_proven else []
    total = float(len(chosen) + 3 * len(timed) + len(proven))

    def report(base: float, note: str, weight: float = 1.0) -> Report:
        return lambda done: context.report(base + weight * done, total, "prompts", note)

    acceptance = measure_acceptance(bench, chosen, report(0, "accepted length"))
    timing = measure_speed(bench, timed, min(spec.hf_prompts, len(timed)), report(len(chosen), "speed", 3.0))
    lossless = Losslessness("not-checked")
    if proven:
        exact = (
            bench
            if str(target.dtype) == "torch.float32"
            else replace(bench, target=load_target(context.spec.target, dtype="fp32"))
        )
        lossless = compare_greedy(
            exact, proven, spec.lossless_tokens, report(len(chosen) + 3 * len(timed), "losslessness in fp32")
        )
    return _output(context.item, len(chosen), acceptance, timing, lossless)


def _tokenised(target: Target, suite: list[SuitePrompt], limit: int) -> list[EvaluationPrompt]:
    prompts = []
    for prompt in suite:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        ids = prompt_ids(target, [*messages, {"role": "user", "content": prompt.turns[0]}])
        if len(ids) <= limit:
            prompts.append(EvaluationPrompt(prompt.id, prompt.domain, ids))
    if not prompts:
        raise InputError("no prompt of the suite fits the context", remedy="Raise serving.max_context")
    return prompts


def _output(suite: str, num_prompts: int, acceptance: Acceptance, timing: Timing, lossless: Losslessness) -> StepOutput:
    ece = None if math.isnan(acceptance.ece) else acceptance.ece
    outputs = {
        "suite": suite,
        "num_prompts": num_prompts,
        "num_tokens": acceptance.num_tokens,
        "accepted_length": acceptance.accepted_length,
        "acceptance_by_position": acceptance.by_position,
        "survival_by_position": acceptance.survival,
        "tokens_per_s": timing.tokens_per_s,
        "speedup_over_plain": timing.speedup_over_plain,
        "speedup_over_transformers": timing.speedup_over_transformers,
        "serving_accepted_length": timing.serving_accepted_length,
        "lossless": asdict(lossless),
        "ece": ece,
        "domains": acceptance.domains,
    }
    metrics = {
        name: float(value)
        for name, value in outputs.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return StepOutput(outputs, metrics)
