"""The gate step: judge the registered version and move the aliases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components.judging import Judgement, judge_version, record_judgement
from components.promotion import ChampionChanged, Move, actor, apply, make_challenger, settle, summarise_verdict
from components.registry import connect, require_version, version_by_alias
from draftline.registry_layout import ALIAS_CHALLENGER, ALIAS_CHAMPION
from draftline.steps import StepContext, StepOutput

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ATTEMPTS = 3
"""Another run may promote while this one judges; then it judges against that champion."""


def run(context: StepContext) -> StepOutput:
    """Judge, record the verdict with the version, move the aliases.

    Passed: the champion becomes ``previous`` and this version ``champion``.
    Not passed: this version becomes ``challenger``, nothing else changes, and
    the step still succeeds (a verdict is a result, not a failure). Run again,
    it ends in the same state: a version is never compared with itself.

    Raises:
        PlatformError: no MLflow server answers.
        RegistryError: the registry refused something.
        FormatError: a file of the version, or the champion's ``metrics.json``, is damaged or not the one registered.
        StorageError: the workspace failed.
    """
    client = connect()
    registered = context.inputs["register"].outputs
    name, version = str(registered["model_name"]), str(registered["version"])
    settle(client, name, actor())
    for attempt in range(_ATTEMPTS):
        try:
            judgement, alias = _judge_and_move(client, context, name, version)
            break
        except ChampionChanged:
            if attempt == _ATTEMPTS - 1:
                raise
    passed = judgement.verdict.passed
    context.report(1, 1, "verdicts", note=f"{'passed' if passed else 'not passed'}: {alias}")
    outputs = {**judgement.verdict.to_document(), "alias": alias}
    return StepOutput(outputs=outputs, metrics={"gate_passed": float(passed)})


def _judge_and_move(client: MlflowClient, context: StepContext, name: str, version: str) -> tuple[Judgement, str]:
    champion = version_by_alias(client, name, ALIAS_CHAMPION)
    source = None if champion is None else str(champion.version)
    judgement = judge_version(require_version(client, name, version), champion, context.spec)
    record_judgement(client, judgement)
    if judgement.verdict.passed:
        summary = summarise_verdict(judgement.verdict)
        apply(client, Move("gate", name, source, version, "the gate passed it", actor(), gate=summary))
    elif source != version:
        make_challenger(client, name, version)
    # A champion that no longer meets a tightened policy stays until another takes its place: the verdict says so.
    alias = ALIAS_CHAMPION if judgement.verdict.passed or source == version else ALIAS_CHALLENGER
    return judgement, alias
