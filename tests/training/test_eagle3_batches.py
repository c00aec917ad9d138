"""A step's chains, one by one against the plain rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from draftline.draft.config import DraftConfig
from draftline.training.eagle3_batches import Eagle3Batch, build_eagle3_batch
from tests.draft.test_families import EAGLE3
from tests.training.test_batches import MASK, sample

CONFIG: DraftConfig = replace(EAGLE3, target_layer_ids=(0, 2, 3), ttt_length=3, block_size=3, ttt_decay=0.5)
COLUMNS = torch.arange(20) - 3
COLUMNS[COLUMNS < 0] = -1


def build(*anchors: list[int], lengths: tuple[int, ...] = (11, 9)) -> Eagle3Batch:
    samples = [sample(number + 1, length) for number, length in enumerate(lengths)]
    return build_eagle3_batch(samples, [np.array(each) for each in anchors], CONFIG, COLUMNS)


def test_every_step_by_the_plain_rule() -> None:
    anchors = ([2, 3, 9], [2, 2, 3])
    batch = build(*anchors)
    inputs, targets = batch.inputs, batch.targets
    assert batch.sample_ids == ("s1", "s2")
    assert inputs.taps_SCX.shape == (2, 9, 72) and inputs.anchors_SA.tolist() == [list(a) for a in anchors]
    found = {}
    assert targets.row_N is not None
    for place, n in enumerate(batch.valid_N.tolist()):
        row = targets.row_N[place]
        found[n] = (
            targets.hidden_UD[row].tolist(),
            float(targets.log_normaliser_U[row]),
            int(targets.labels_N[place]),
            float(targets.weights_N[place]),
        )
    expected = {}
    for s, one in enumerate((sample(1), sample(2, 9))):
        ids, mask = one.input_ids_T.tolist(), one.loss_mask_T.tolist()
        used = min(9, len(ids) - 1)
        assert torch.equal(inputs.taps_SCX[s, :used], one.taps_TLD[:used].reshape(used, 72))
        assert inputs.taps_SCX[s, used:].abs().max(dim=-1).values.tolist() == [0.0] * (9 - used)
        assert inputs.next_ids_SC[s, :used].tolist() == ids[1 : used + 1]
        for a, anchor in enumerate(anchors[s]):
            for k in range(3):
                at = anchor + k
                assert inputs.chain_ids_SAB[s, a, k] == ids[min(at, len(ids) - 1)]
                # Every token from the anchor to the predicted one was produced.
                if at + 1 < len(ids) and all(mask[anchor : at + 2]):
                    label = int(COLUMNS[ids[at + 1]])
                    law = (one.last_hidden_TD[at].tolist(), float(one.log_normaliser_T[at]))
                    expected[(s * 3 + a) * 3 + k] = (*law, label, 0.5**k)
    assert found == expected
    assert len(targets.hidden_UD) < len(batch.valid_N), "overlapping chains share the target's law"


def test_nothing_counts_without_an_anchor_or_before_any_row() -> None:
    # 0 is what a sample without produced tokens is given, and here also a produced first token.
    batch = build([0, 0], lengths=(2,))
    assert len(batch.valid_N) == 0 and len(batch.targets.labels_N) == 0
    assert batch.inputs.taps_SCX.shape == (1, 1, 72)
    produced = replace(sample(1), loss_mask_T=torch.ones(11, dtype=torch.bool))
    batch = build_eagle3_batch([produced], [np.array([0, 1])], CONFIG, COLUMNS)
    assert batch.valid_N.tolist() == [3, 4, 5]
    assert not MASK[0]
