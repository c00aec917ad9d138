"""Forward and backward of a block draft: packed blocks against samples padded to the longest, under dense masks.

Usage: ``python -m benchmarks.attention [--quick]``

The padded layout is the one of the tests, which the packed one equals to round-off: every sample padded to the
longest context, every slot masked over all context and all slots of its sample. Weights are random; only times and
query-key pairs are of interest.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.timing import alternating_medians_ms, with_allocator_settings
from draftline.draft.attention import BlockLayout
from draftline.draft.config import DraftConfig
from draftline.draft.model import DraftInputs, DSparkDraft
from draftline.spec import recipe
from tests.draft.padded import padded_forward


@dataclass(frozen=True)
class Case:
    """Shapes of a step.

    Attributes:
        name: For the table.
        num_samples: Samples of the step.
        tokens: Shortest and longest sample, the lengths between evenly drawn.
        num_anchors: Of each sample.
        hidden: Hidden size; heads of 64.
        heads: Query and key heads.
    """

    name: str
    num_samples: int
    tokens: tuple[int, int]
    num_anchors: int
    hidden: int
    heads: tuple[int, int]


CASES = (
    Case("the demo's step", 16, (150, 350), 32, 576, (9, 3)),
    Case("one long sample", 1, (4096, 4096), 64, 576, (9, 3)),
    Case("long and short together", 4, (500, 4096), 64, 576, (9, 3)),
    Case("the reference's anchors", 1, (4096, 4096), 512, 576, (9, 3)),
)
QUICK = (Case("quick", 2, (30, 60), 4, 64, (2, 1)),)


def main() -> None:
    """Print milliseconds of both layouts and the ratio, for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small case, to see that it runs")
    arguments = parser.parse_args()
    with_allocator_settings()
    for case in QUICK if arguments.quick else CASES:
        _measure(case, 1 if arguments.quick else arguments.repeats)


def _measure(case: Case, repeats: int) -> None:
    config = _config(case)
    inputs = _inputs(case, config)
    layout = inputs.layout
    embedding = torch.randn(config.vocab_size, case.hidden, generator=torch.Generator().manual_seed(1))
    draft = DSparkDraft(config, max(case.tokens) + config.block_size)
    draft.initialise(torch.Generator().manual_seed(0), torch.ones(case.hidden))

    def packed() -> None:
        draft(inputs, embedding).hidden_MD.square().sum().backward()

    def padded() -> None:
        padded_forward(draft, inputs, embedding).hidden_MD.square().sum().backward()

    times = alternating_medians_ms({"packed": packed, "padded": padded}, repeats)
    block = config.block_size
    pairs = sum(
        block * b.num_blocks * (b.num_keys + block * b.num_blocks) for buckets in layout.buckets_S for b in buckets
    )
    slots = case.num_anchors * block
    whole = case.num_samples * slots * (max(layout.context_lengths_S) + slots)
    print(
        f"{case.name:26} packed {times['packed']:7.0f} ms   padded {times['padded']:7.0f} ms   "
        f"{times['padded'] / times['packed']:5.2f} x as fast   pairs: {layout.num_pairs / 1e6:.2f} M exist, "
        f"packed {pairs / 1e6:.2f} M, padded {whole / 1e6:.2f} M"
    )


def _config(case: Case) -> DraftConfig:
    spec = recipe("smollm2-135m").draft
    return DraftConfig(
        vocab_size=1000,
        draft_vocab_size=1000,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3,
        num_layers=2,
        num_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        block_size=spec.block_size,
        target_layer_ids=(0, 1, 2),
        num_target_layers=4,
        mask_token_id=0,
        markov_rank=0,
        markov_head="vanilla",
        enable_confidence_head=False,
        confidence_with_markov=False,
    )


def _inputs(case: Case, config: DraftConfig) -> DraftInputs:
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    lengths = np.linspace(*case.tokens, case.num_samples).astype(int)
    anchors = [sorted(random.integers(n // 4, n, case.num_anchors).tolist()) for n in lengths]
    layout = BlockLayout.of_anchors(config.block_size, anchors)
    slots = layout.block_anchors()[:, None] + torch.arange(config.block_size)
    ids = torch.randint(0, config.vocab_size, (slots.numel(),), generator=generator)
    taps = torch.randn(layout.num_context, len(config.target_layer_ids) * case.hidden, generator=generator)
    return DraftInputs(taps, ids, ids, slots.flatten(), layout)


if __name__ == "__main__":
    main()
