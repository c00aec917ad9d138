"""The evaluation station's work for one suite."""

from __future__ import annotations

from dataclasses import asdict, replace

from draftline.calibration.survival import Calibration
from draftline.draft.stored import stored_draft
from draftline.errors import InputError
from draftline.evaluation.acceptance import Acceptance, Report
from draftline.evaluation.measure import (
    Bench,
    Losslessness,
    Timing,
    compare_greedy,
    measure_acceptance,
    measure_speed,
)
from draftline.evaluation.suites import load_suite
from draftline.evaluation.throughput import ROUNDS, Load, measure_load
from draftline.evaluation.turns import EvaluationPrompt, tokenised
from draftline.prompts.spread import even_spread
from draftline.scheduling.policies import OffPolicy, policy_from_spec
from draftline.spec.models import HELD_OUT
from draftline.steps.context import StepContext, StepOutput
from draftline.target.load import load_target


def evaluate(context: StepContext) -> StepOutput:
    """Measure the suite ``context.item``.

    Raises:
        InputError: the suite is unknown, empty, or no prompt fits the context.
        FormatError: the draft or the calibration is damaged.
    """
    spec = context.spec.evaluation
    bench = _bench(context)
    suite = load_suite(context.item, spec, context.store, context.inputs["prompts"])
    fitting = _fitting(bench, [tokenised(bench.target, prompt) for prompt in suite])
    chosen = even_spread(fitting, spec.max_prompts)
    by_temperature = [
        (temperature, chosen if place == 0 else even_spread(chosen, spec.sampled_prompts))
        for place, temperature in enumerate(spec.temperatures)
    ]
    is_proven = context.item == HELD_OUT and spec.lossless_prompts > 0
    proven = even_spread(fitting, spec.lossless_prompts) if is_proven else []
    num_turns = [sum(prompt.num_turns for prompt in prompts) for _, prompts in by_temperature]
    num_timed = min(spec.timing_prompts, num_turns[0])
    loads = sorted({number for number in spec.concurrencies if number > 1})
    total = float(sum(num_turns) + 3 * num_timed + len(proven) + ROUNDS * sum(loads))

    def report(base: float, note: str, weight: float = 1.0) -> Report:
        return lambda done: context.report(base + weight * done, total, "prompts", note)

    found = []
    for place, (temperature, prompts) in enumerate(by_temperature):
        note = f"accepted length at temperature {temperature:g}"
        found.append(measure_acceptance(bench, prompts, temperature, report(sum(num_turns[:place]), note)))
    # Timed turns have the answers before them fixed, so that every way of decoding does the same work.
    in_order = sorted(found[0].turns, key=lambda turn: (turn.number, turn.turn))
    timed = even_spread([turn.as_prompt() for turn in in_order], spec.timing_prompts)
    num_hf = min(spec.hf_prompts, len(timed))
    done = sum(num_turns)
    timing = measure_speed(bench, timed, spec.timing_temperature, num_hf, report(done, "speed", 3.0))
    lossless = Losslessness("not-checked")
    if proven:
        exact = _in_fp32(bench, context)
        lossless = compare_greedy(
            exact, proven, spec.lossless_tokens, report(done + 3 * num_timed, "losslessness in fp32")
        )
    done += 3 * num_timed + len(proven)
    under_load = []
    for number in loads:
        told = report(done, f"speed with {number} requests together", float(number))
        under_load.append(measure_load(bench, timed, number, spec.timing_temperature, told))
        done += ROUNDS * number
    return _output(context.item, len(suite) - len(fitting), found, timing, lossless, under_load)


def _bench(context: StepContext) -> Bench:
    spec = context.spec
    target = load_target(spec.target)
    draft = stored_draft(context.store, context.inputs["draft"])
    calibration_step = context.inputs["calibration"]
    calibration = Calibration.from_json(
        context.store.get(f"{calibration_step.prefix}/{calibration_step.outputs['file']}").decode()
    )
    policy = policy_from_spec(spec.serving)
    return Bench(
        target,
        draft,
        calibration,
        policy if policy.wants_draft else OffPolicy(),
        spec.evaluation.max_new_tokens,
        min(spec.serving.max_context, target.max_context),
        spec.seed,
    )


def _in_fp32(bench: Bench, context: StepContext) -> Bench:
    if str(bench.target.dtype) == "torch.float32":
        return bench
    return replace(bench, target=load_target(context.spec.target, dtype="fp32"))


def _fitting(bench: Bench, prompts: list[EvaluationPrompt]) -> list[EvaluationPrompt]:
    """Prompts whose first turn leaves room for an answer."""
    fitting = [prompt for prompt in prompts if len(prompt.ids) + bench.max_new_tokens <= bench.max_context]
    if not fitting:
        raise InputError(
            "no prompt of the suite fits the context",
            got=f"{len(prompts)} prompts, the shortest of {min(len(p.ids) for p in prompts)} tokens",
            expected=f"at most {bench.max_context} with {bench.max_new_tokens} tokens of answer",
            remedy="Raise serving.max_context, or lower evaluation.max_new_tokens",
        )
    return fitting


def _output(
    suite: str,
    num_left_out: int,
    found: list[Acceptance],
    timing: Timing,
    lossless: Losslessness,
    under_load: list[Load],
) -> StepOutput:
    headline = found[0]
    outputs = {
        "suite": suite,
        "num_left_out": num_left_out,
        **headline.total.to_json(),
        "temperature": headline.temperature,
        "tokens_per_s": timing.tokens_per_s,
        "speedup_over_plain": timing.speedup_over_plain,
        "speedup_over_transformers": timing.speedup_over_transformers,
        "serving_accepted_length": timing.serving_accepted_length,
        "by_concurrency": [asdict(load) for load in under_load],
        "lossless": asdict(lossless),
        "ece": headline.ece,
        "domains": {name: figures.accepted_length for name, figures in headline.domains.items()},
        "by_temperature": [one.to_json() for one in found],
    }
    metrics = {
        name: float(value)
        for name, value in outputs.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    for one in found[1:]:
        metrics[f"accepted_length_at_{one.temperature:g}"] = one.total.accepted_length
        metrics[f"bytes_per_call_at_{one.temperature:g}"] = one.total.bytes_per_call
    for load in under_load:
        metrics[f"speedup_over_plain_with_{load.concurrency}"] = load.speedup_over_plain
    return StepOutput(outputs, metrics)
