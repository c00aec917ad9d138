"""What an import loads, observed in fresh interpreters.

import-linter holds the directions of imports, late ones included; here it is
about what happens at import: a step that needs no tensors must not wait for
torch, and the command line must answer ``--help`` at once.
"""

from __future__ import annotations

import pytest

from tests.architecture.modules import HEAVY, heavy_after_importing, modules_of

FRAMEWORKS = {"ray", "kfp", "mlflow", "kubernetes", "vllm", "fastapi"}

TENSOR_MODULES = {
    "draftline.cache.codecs",
    "draftline.cache.fetch",
    "draftline.cache.hidden",
    "draftline.cache.reader",
    "draftline.cache.sample",
    "draftline.cache.shards",
    "draftline.cache.source",
    "draftline.cache.stream",
    "draftline.calibration.profile",
    "draftline.calibration.station",
    "draftline.capture.capture",
    "draftline.decoding.verify",
    "draftline.draft.attention",
    "draftline.draft.bigrams",
    "draftline.draft.build",
    "draftline.draft.checkpoint",
    "draftline.draft.eagle3",
    "draftline.draft.eagle3_runner",
    "draftline.draft.dpace",
    "draftline.draft.compare",
    "draftline.draft.convert",
    "draftline.draft.dialects.deepspec",
    "draftline.draft.dialects.files",
    "draftline.draft.dialects.model",
    "draftline.draft.dialects.nested",
    "draftline.draft.dialects.registry",
    "draftline.draft.dialects.speculators",
    "draftline.draft.heads",
    "draftline.draft.layers",
    "draftline.draft.loss",
    "draftline.draft.loss_chunks",
    "draftline.draft.model",
    "draftline.draft.prompt_lookup",
    "draftline.draft.proposer",
    "draftline.draft.runner",
    "draftline.draft.standalone",
    "draftline.draft.serve",
    "draftline.draft.serving_layer",
    "draftline.draft.serving_vocabulary",
    "draftline.draft.stored",
    "draftline.draft.vocab",
    "draftline.engine.build",
    "draftline.engine.engine",
    "draftline.engine.drafts",
    "draftline.engine.verification",
    "draftline.evaluation.acceptance",
    "draftline.evaluation.baselines",
    "draftline.evaluation.measure",
    "draftline.evaluation.station",
    "draftline.evaluation.throughput",
    "draftline.evaluation.turns",
    "draftline.native.library",
    "draftline.responses.generate",
    "draftline.target.batch",
    "draftline.target.forward",
    "draftline.target.general",
    "draftline.target.kv_cache",
    "draftline.target.lean",
    "draftline.target.linear",
    "draftline.target.load",
    "draftline.target.packed_layers",
    "draftline.tokens.station",
    "draftline.training.architecture",
    "draftline.training.batches",
    "draftline.training.block_objective",
    "draftline.training.build",
    "draftline.training.checkpoints",
    "draftline.training.eagle3_batches",
    "draftline.training.eagle3_objective",
    "draftline.training.frozen",
    "draftline.training.loop",
    "draftline.training.meter",
    "draftline.training.objective",
    "draftline.training.optimizers",
    "draftline.training.parallel",
    "draftline.training.survival",
    "draftline.training.workers",
}
"""The core's modules that need torch. All others form the torch-free ring, where a new module starts."""

CORE = modules_of("draftline")
RING = [name for name in CORE if name not in TENSOR_MODULES]
STORAGE = [name for name in RING if name.startswith("draftline.storage")]
REPORT = [name for name in RING if name.startswith("draftline.report")]
LIGHT = [name for name in RING if name not in {*STORAGE, *REPORT}]
COMPONENTS = modules_of("components")
COMPONENT_FILES = [name for name in COMPONENTS if name.endswith(".component")]


def test_every_listed_tensor_module_exists() -> None:
    assert set(CORE) >= TENSOR_MODULES


@pytest.mark.slow
def test_the_core_loads_no_framework() -> None:
    assert heavy_after_importing(CORE) & FRAMEWORKS == set()


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        pytest.param(LIGHT, set(), id="torch-free ring"),
        pytest.param(STORAGE, {"boto3"}, id="storage"),
        pytest.param(REPORT, {"matplotlib"}, id="report"),
        pytest.param([n for n in COMPONENTS if n not in COMPONENT_FILES], set(), id="component steps"),
        pytest.param(COMPONENT_FILES, {"kfp", "kubernetes"}, id="component files"),
        pytest.param(["pipelines.cli"], set(), id="command line"),
        pytest.param(modules_of("pipelines"), {"kfp", "kubernetes"}, id="pipelines"),
        pytest.param(modules_of("ray_jobs"), {"ray", "torch"}, id="Ray jobs", marks=pytest.mark.slow),
    ],
)
def test_importing_loads_no_more_than_it_must(names: list[str], allowed: set[str]) -> None:
    assert names
    assert heavy_after_importing(names) <= allowed


@pytest.mark.parametrize("name", ["boto3", "kubernetes"])
def test_the_probe_sees_what_gets_loaded(name: str) -> None:
    assert name.partition(".")[0] in HEAVY
    assert name.partition(".")[0] in heavy_after_importing(["draftline.errors", name])
