"""Hand-made results in the shapes of the stations, and a workspace that holds them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from draftline.report.card import PLOTS, render_card
from draftline.report.collect import collect, metrics_document, summary
from draftline.spec import RunSpec
from draftline.steps import Ledger, StepContext, StepResult
from draftline.storage.base import ObjectStore

CONFIG = b'{"architectures": ["DSparkDraft"]}'
CALIBRATION = b'{"temperatures": [1.1, 1.2, 1.3]}'


def weights_bytes(text: str) -> bytes:
    """A tiny safetensors file that differs by ``text``."""
    data = text.encode()
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


def confidence(strength: float) -> dict[str, Any]:
    """Confidence measures for seven positions."""
    points = [{"predicted": 0.05 + 0.1 * k, "observed": (0.05 + 0.1 * k) ** strength, "count": 20} for k in range(10)]
    return {
        "ece": [abs(strength - 1) / 5 + 0.01 * k for k in range(7)],
        "brier": [0.18 - 0.01 * k for k in range(7)],
        "auc": [0.85, 0.84, 0.83, 0.82, 0.8, 0.79, None],
        "reliability": [points] * 7,
    }


def at_temperature(temperature: float, accepted_length: float, domains: Mapping[str, float]) -> dict[str, Any]:
    """What is measured at one temperature."""
    figures = {"num_prompts": 9, "num_turns": 9, "num_tokens": 720, "bytes_per_call": 4.1 * accepted_length}
    return {
        "temperature": temperature,
        **figures,
        "num_prompts": 64,
        "accepted_length": accepted_length,
        "domains": {name: {**figures, "accepted_length": value} for name, value in domains.items()},
        "confidence": {"before": confidence(1.5), "after": confidence(1.05)},
        "threshold_sweep": [
            {
                "threshold": 0.1 * k,
                "acceptance_rate": 0.3 + 0.07 * k if k < 8 else None,
                "verified_length": 7.0 - 0.8 * k,
                "accepted_length": accepted_length * (1 - 0.05 * k),
            }
            for k in range(9)
        ],
    }


def evaluation_outputs(suite: str, *, accepted_length: float = 2.6, speedup: float = 1.7) -> dict[str, Any]:
    """Evaluation outputs of one suite, all rules of the default gate met."""
    survival = [0.72 * 0.8**k for k in range(7)]
    domains = {"billing": 2.8, "delivery": 2.5, "account": 2.4} if suite == "held-out" else {"code": 2.1}
    sampled = {name: 0.9 * value for name, value in domains.items()}
    return {
        "suite": suite,
        "num_prompts": 64,
        "num_turns": 64,
        "num_left_out": 0,
        "num_tokens": 8123,
        "temperature": 0.0,
        "accepted_length": accepted_length,
        "bytes_per_call": 10.7,
        "acceptance_by_position": [0.72, *([0.8] * 6)],
        "survival_by_position": survival,
        "tokens_per_s": {"speculative": 61.2, "plain": 36.0, "transformers": 21.5},
        "speedup_over_plain": speedup,
        "speedup_over_transformers": 2.85,
        "by_concurrency": [
            {"concurrency": 8, "tokens_per_s": {"speculative": 180.0, "plain": 150.0}, "speedup_over_plain": 1.2}
        ],
        "lossless": {"verdict": "lossless", "num_prompts": 50, "num_equal": 50, "first_difference": None},
        "ece": 0.031,
        "domains": domains,
        "by_temperature": [
            at_temperature(0.0, accepted_length, domains),
            at_temperature(1.0, 0.9 * accepted_length, sampled),
        ],
    }


def calibration_outputs() -> dict[str, Any]:
    """Calibration outputs for seven positions."""
    reliability: list[list[dict[str, float]]] = []
    before: list[list[dict[str, float]]] = []
    for position in range(7):
        centres = [0.05 + 0.1 * k for k in range(10)]
        counts = [20 + 30 * abs(k - 5) for k in range(10)]
        after = [min(1.0, max(0.0, c + 0.03 * math.sin(3 * c + position))) for c in centres]
        raw = [c**1.5 for c in centres]
        rows = zip(centres, after, raw, counts, strict=True)
        reliability.append([])
        before.append([])
        for centre, observed, uncalibrated, count in rows:
            reliability[-1].append({"predicted": centre, "observed": observed, "count": count})
            before[-1].append({"predicted": centre, "observed": uncalibrated, "count": count})
    return {
        "file": "calibration.json",
        "ece_before": [0.09 + 0.01 * k for k in range(7)],
        "ece_after": [0.02 + 0.002 * k for k in range(7)],
        "auc": [0.84 - 0.01 * k for k in range(7)],
        "brier": [0.16 - 0.01 * k for k in range(7)],
        "brier_before": [0.2 - 0.01 * k for k in range(7)],
        "reliability": reliability,
        "reliability_before": before,
        "method": "bias",
        "candidates": {
            name: {"ece": [e] * 7, "brier": [b] * 7, "log_loss": [0.5] * 7, "auc": [0.8] * 6 + [None]}
            for name, e, b in (
                ("raw", 0.12, 0.2),
                ("sts", 0.06, 0.17),
                ("bias", 0.02, 0.16),
                ("isotonic", 0.022, 0.161),
            )
        },
        "rule": "the simplest of four",
        "held_out": {"num_requests": 32, "num_folds": 5},
        "cost_table": {
            "requests": [1, 8],
            "tokens": [1, 8],
            "verify_ms": [[16.0, 21.0], [24.0, 40.0]],
            "draft_requests": [1, 8],
            "draft_ms": [2.5, 6.0],
        },
    }


def history_lines(steps: int = 200) -> list[dict[str, float]]:
    """A training log with validation every 50 steps."""
    lines = []
    for step in range(1, steps + 1):
        level = 1.2 + 4.0 * math.exp(-step / 40) + 0.08 * math.sin(step * 1.7)
        line = {"step": step, "loss": level, "ce": level * 2, "tv": level / 4, "accepted_length": 3.6 - level / 2}
        if step % 50 == 0:
            line |= {"validation_loss": level + 0.15, "validation_accepted_length": 3.5 - level / 2}
        lines.append(line)
    return lines


def result(
    station: str, key: str, inputs: Mapping[str, str], outputs: Mapping[str, Any], *, item: str = "", **metrics: float
) -> StepResult:
    """A step result."""
    return StepResult(station, key, item, dict(inputs), dict(outputs), metrics)


def trained(
    store: ObjectStore,
    *,
    weights: bytes | None = None,
    suites: Mapping[str, Mapping[str, Any]] | None = None,
    tag: str = "1",
) -> dict[str, StepResult]:
    """Commit the results of a whole run up to evaluation; returns them by input label."""
    ledger = Ledger(store)
    weights = weights_bytes("weights of version one") if weights is None else weights
    prompts = result(
        "prompts",
        "a" * 19 + tag,
        {},
        {
            "files": {name: f"{name}.jsonl" for name in ("train", "validation", "calibration", "test")},
            "counts": {"train": 500, "validation": 24, "calibration": 36, "test": 60},
            "report": {"read": 640, "malformed": 3, "near_duplicate": 17, "kept": 620},
        },
    )
    cache = result("hidden-states", "b" * 19 + tag, {"prompts": prompts.key}, {})
    draft = result(
        "draft",
        "c" * 19 + tag,
        {"hidden-states": cache.key},
        {
            "files": {
                "config.json": hashlib.sha256(CONFIG).hexdigest(),
                "model.safetensors": hashlib.sha256(weights).hexdigest(),
            },
            "draft_vocab_size": 8192,
            "target_layer_ids": [2, 8, 15, 21, 27],
            "num_parameters": 11_234_567,
            "history": "history.jsonl",
        },
        train_loss=1.31,
        validation_accepted_length=2.7,
    )
    store.put(f"{draft.prefix}/draft/config.json", CONFIG)
    store.put(f"{draft.prefix}/draft/model.safetensors", weights)
    store.put(f"{draft.prefix}/history.jsonl", "".join(json.dumps(line) + "\n" for line in history_lines()).encode())
    calibration = result(
        "calibration",
        "d" * 19 + tag,
        {"prompts": prompts.key, "draft": draft.key},
        calibration_outputs(),
        ece_before=0.12,
        ece_after=0.026,
    )
    store.put(f"{calibration.prefix}/calibration.json", CALIBRATION)
    results = {"draft": draft, "calibration": calibration}
    chosen = suites or {name: evaluation_outputs(name) for name in ("held-out", "humaneval")}
    upstream = {"prompts": prompts.key, "draft": draft.key, "calibration": calibration.key}
    for place, (suite, outputs) in enumerate(chosen.items()):
        key = f"{place}" * 19 + tag
        results[f"evaluation:{suite}"] = result("evaluation", key, upstream, outputs, item=suite)
    for committed in (prompts, cache, *results.values()):
        ledger.commit(committed)
    return results


def reported(store: ObjectStore, results: Mapping[str, StepResult], *, key: str) -> StepResult:
    """Commit a report with the true card and figures, but without drawing the plots (they take a second)."""
    data = collect(context("report", store, results, key=key))
    files = {
        "card.md": render_card(data).encode(),
        "metrics.json": json.dumps(metrics_document(data)).encode(),
        "report.html": b"<!doctype html>",
        **{name: b"\x89PNG " + name.encode() for name in PLOTS},
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    report = result("report", key, {}, {"files": digests, "summary": summary(data)})
    for name, content in files.items():
        store.put(f"{report.prefix}/{name}", content)
    return Ledger(store).commit(report)


def context(
    station: str,
    store: ObjectStore,
    inputs: Mapping[str, StepResult],
    *,
    key: str = "e" * 20,
    spec: RunSpec | None = None,
) -> StepContext:
    """The context a station's function is given."""
    return StepContext(station, key, spec or RunSpec(), store, inputs)
