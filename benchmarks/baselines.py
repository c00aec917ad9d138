"""DSpark against everything else that drafts: same data, same budget, same prompts, one table.

Usage: ``python -m benchmarks.baselines [--workspace .draftline/workspace] [--output DIR]``

No speculation, prompt lookup, a stand-alone draft model, DFlash, Eagle3 and
DSpark. The trained ones share prompts, answers, hidden states, draft
vocabulary, depth, optimiser and number of steps (a stand-alone model has two
layers instead of one and no feature projection). What a run in this workspace
has done already (``make demo``) is taken from it. All verify whole blocks; the
last row lets DSpark's confidence decide, as the endpoint does.

``--set KEY=VALUE`` changes the recipe, for example ``--set train.steps=30``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console

from benchmarks.standalone_draft import train_standalone
from benchmarks.stations import TRAINING, run_stations
from benchmarks.timing import with_allocator_settings
from draftline.cache.manifest import Manifest
from draftline.cache.reader import CacheReader
from draftline.calibration.survival import Calibration
from draftline.draft.checkpoint import DraftModel
from draftline.draft.prompt_lookup import PromptLookup
from draftline.draft.standalone import StandaloneDraft
from draftline.draft.stored import stored_draft
from draftline.engine.engine import Engine, EngineLimits
from draftline.evaluation.baselines import PLAIN, BaselineSettings, EngineFactory, measure_baselines
from draftline.evaluation.suites import load_suite
from draftline.evaluation.turns import tokenised
from draftline.prompts.spread import even_spread
from draftline.scheduling.policies import FixedPolicy, LengthPolicy, OffPolicy, policy_from_spec
from draftline.spec import RECIPES, RunSpec, TargetSpec, derive, recipe
from draftline.spec.models import HELD_OUT
from draftline.steps import StepResult
from draftline.storage import open_store
from draftline.storage.base import ObjectStore
from draftline.target.load import Target, load_target
from draftline.training.frozen import FrozenEnds

STANDALONE_LAYERS = 2
_WITHOUT_HEADS = {
    "draft.markov_rank": 0,
    "draft.enable_confidence_head": False,
    "draft.confidence_with_markov": False,
    "serving.policy": "fixed",
}
TRAINED = {
    "DFlash": {"draft.algorithm": "dflash", **_WITHOUT_HEADS},
    "Eagle3": {"draft.algorithm": "eagle3", **_WITHOUT_HEADS},
    "DSpark": {},
}


@dataclass(frozen=True)
class Contenders:
    """Everything that decodes in the comparison.

    Attributes:
        spec: The run spec; the serving policy and the block size are used.
        drafts: Trained drafts by name.
        calibration: Of the DSpark draft.
        standalone: Folder of the stand-alone model.
        vocab_W: The draft vocabulary, ``None`` for the whole.
    """

    spec: RunSpec
    drafts: Mapping[str, DraftModel]
    calibration: Calibration
    standalone: Path
    vocab_W: torch.Tensor | None

    def engines(self, target: Target) -> dict[str, EngineFactory]:
        """A factory of fresh engines by contender."""
        block = self.spec.draft.block_size
        small = load_target(TargetSpec(source=str(self.standalone)), dtype=_name_of(target.dtype))

        def plain(slots: int, context: int) -> Engine:
            return Engine(target, EngineLimits(slots, context), OffPolicy(), keep_traces=True)

        def lookup(slots: int, context: int) -> Engine:
            engine = Engine(target, EngineLimits(slots, context), FixedPolicy(), keep_traces=True)
            engine.swap_proposer(lambda room: PromptLookup(room, block))
            return engine

        def standalone(slots: int, context: int) -> Engine:
            engine = Engine(target, EngineLimits(slots, context), FixedPolicy(), keep_traces=True)
            engine.swap_proposer(lambda room: StandaloneDraft(small, target, room, block, self.vocab_W))
            return engine

        def drafted(draft: DraftModel, policy: LengthPolicy) -> EngineFactory:
            def make(slots: int, context: int) -> Engine:
                limits = EngineLimits(slots, context)
                engine = Engine(target, limits, policy, calibration=self.calibration, keep_traces=True)
                engine.swap_draft(draft)
                return engine

            return make

        found: dict[str, EngineFactory] = {PLAIN: plain, "prompt lookup": lookup, "stand-alone model": standalone}
        found.update({name: drafted(draft, FixedPolicy()) for name, draft in self.drafts.items()})
        served = policy_from_spec(self.spec.serving)
        found[f"DSpark, {self.spec.serving.policy}"] = drafted(self.drafts["DSpark"], served)
        return found


def main() -> None:
    """Train what is missing, measure, print and write the table."""
    with_allocator_settings()
    arguments = _arguments()
    overrides = dict(text.split("=", 1) for text in arguments.set)
    spec = derive(recipe(arguments.recipe), {key: yaml.safe_load(value) for key, value in overrides.items()})
    store = open_store(arguments.workspace, create=True)
    console = Console()
    with tempfile.TemporaryDirectory(prefix="draftline-baselines-") as scratch:
        done, contenders = _train(spec, store, Path(scratch))
        target = load_target(spec.target)
        suite = load_suite(HELD_OUT, spec.evaluation, store, done["prompts"])
        prompts = even_spread([tokenised(target, prompt) for prompt in suite], arguments.prompts)
        settings = BaselineSettings(
            max_new_tokens=spec.evaluation.max_new_tokens,
            max_context=min(spec.serving.max_context, target.max_context),
            timing_prompts=arguments.timed,
            lossless_prompts=arguments.lossless,
        )
        exact = target if target.dtype == torch.float32 else load_target(spec.target, dtype="fp32")
        table = measure_baselines(
            target,
            contenders.engines(target),
            prompts,
            settings,
            exact=(exact, contenders.engines(exact)),
            on_progress=lambda what, count: console.print(f"{what}: {count:.0f} prompts", style="dim"),
        )
    print(
        f"{arguments.recipe}, {_name_of(target.dtype)}, {torch.get_num_threads()} threads, {spec.train.steps} steps, "
        f"{len(prompts)} held-out prompts, {table.num_timed} timed\n"
    )
    print(table.to_markdown())
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "baselines.md").write_text(table.to_markdown(), encoding="utf-8")
        (arguments.output / "baselines.json").write_text(json.dumps(table.to_json(), indent=1), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", default=".draftline/workspace", help="a directory or s3://bucket/prefix")
    parser.add_argument("--recipe", default="smollm2-135m", choices=sorted(RECIPES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts of the acceptance runs, 0 for all")
    parser.add_argument("--timed", type=int, default=8, help="prompts timed on every contender")
    parser.add_argument("--lossless", type=int, default=16, help="prompts whose greedy answers are compared")
    parser.add_argument("--output", type=Path, help="folder for baselines.md and baselines.json")
    return parser.parse_args()


def _train(spec: RunSpec, store: ObjectStore, scratch: Path) -> tuple[dict[str, StepResult], Contenders]:
    drafts: dict[str, DraftModel] = {}
    done: dict[str, StepResult] = {}
    for name, overrides in TRAINED.items():
        done = run_stations(derive(spec, overrides), store)
        drafts[name] = stored_draft(store, done["draft"])
    # DSpark came last: the calibration is its own.
    done = run_stations(spec, store, (*TRAINING, "calibration"))
    stored = done["calibration"]
    calibration = Calibration.from_json(store.get(f"{stored.prefix}/{stored.outputs['file']}").decode())
    target = load_target(spec.target, dtype="fp32")
    hidden = done["hidden-states"]
    counts = json.loads(store.get(f"{hidden.prefix}/{hidden.outputs['counts']}"))
    ends = FrozenEnds(spec, target, counts)
    manifest = Manifest.from_json(hidden.outputs, kind="hidden-states")
    source = CacheReader(store, hidden.prefix, manifest, "train", spec.seed)
    try:
        folder = train_standalone(target, source, spec.train, ends, STANDALONE_LAYERS, scratch / "standalone")
    finally:
        source.close()
    return done, Contenders(spec, drafts, calibration, folder, ends.vocab_W)


def _name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


if __name__ == "__main__":
    # One Ray for each job, on loopback alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    main()
