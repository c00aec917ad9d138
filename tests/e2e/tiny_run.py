"""The spec of a whole run on the tiny target."""

from __future__ import annotations

from pathlib import Path

from draftline.spec import RunSpec, build_spec


def tiny_spec(name: str, target: Path, prompts: Path, workspace: str) -> RunSpec:
    """A run of about a minute; the gate asks for losslessness and little else."""
    return build_spec(
        {
            "name": name,
            "workspace": workspace,
            "target": {"source": str(target), "dtype": "fp32"},
            "prompts": {"source": str(prompts), "near_duplicate_threshold": 1.0, "holdout_fraction": 0.2},
            "responses": {"max_new_tokens": 16, "shard_prompts": 32, "threads_per_worker": 1},
            "tokens": {"max_length": 128, "shard_tokens": 512},
            "cache": {"codec": "fp32"},
            "draft": {"num_taps": 2, "vocab_size": 200, "markov_rank": 8, "block_size": 4},
            "train": {
                "steps": 40,
                "samples_per_step": 8,
                "anchors_per_sample": 8,
                "threads_per_worker": 1,
                "checkpoint_every_steps": 20,
                "validate_every_steps": 20,
            },
            "calibration": {"max_prompts": 4, "max_new_tokens": 16, "profile_cost": False},
            "evaluation": {
                "max_prompts": 6,
                "max_new_tokens": 16,
                "timing_prompts": 2,
                "hf_prompts": 1,
                "lossless_prompts": 6,
                "lossless_tokens": 16,
            },
            "gate": {"min_accepted_length": 1.0, "min_speedup": 0.0, "max_ece": 1.0},
            # A step of the tiny target costs less than drafting: a policy that knows costs would rightly not draft.
            "serving": {"model_name": name, "max_requests": 4, "policy": "threshold"},
        }
    )
