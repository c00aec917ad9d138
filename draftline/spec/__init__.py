"""Run specs: the model, the recipes, reading and overriding."""

from draftline.spec.load import build_spec, derive, dump_spec, load_spec, parse_overrides, parse_spec
from draftline.spec.models import (
    CacheSpec,
    CalibrationSpec,
    DraftSpec,
    DriftSpec,
    EvaluationSpec,
    GateSpec,
    LossSpec,
    PromptsSpec,
    ResponsesSpec,
    RunSpec,
    SamplingSpec,
    ServingSpec,
    TargetSpec,
    TokensSpec,
    TrainSpec,
)
from draftline.spec.recipes import RECIPES, recipe

__all__ = [
    "RECIPES",
    "CacheSpec",
    "CalibrationSpec",
    "DraftSpec",
    "DriftSpec",
    "EvaluationSpec",
    "GateSpec",
    "LossSpec",
    "PromptsSpec",
    "ResponsesSpec",
    "RunSpec",
    "SamplingSpec",
    "ServingSpec",
    "TargetSpec",
    "TokensSpec",
    "TrainSpec",
    "build_spec",
    "derive",
    "dump_spec",
    "load_spec",
    "parse_overrides",
    "parse_spec",
    "recipe",
]
