"""Eagle3: distillation along chains of the draft's own hidden states (training-time test)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from draftline.cache.reader import CachedSample
from draftline.cache.source import SampleSource
from draftline.draft.checkpoint import DraftModel, export_state, to_files
from draftline.draft.dpace import DPace
from draftline.draft.eagle3 import Eagle3Draft
from draftline.draft.loss import LossOptions, LossTerms, distillation_loss
from draftline.spec import RunSpec
from draftline.target.load import Target
from draftline.training.architecture import draft_config
from draftline.training.batches import draw_anchors
from draftline.training.block_objective import VALIDATION_ANCHORS
from draftline.training.eagle3_batches import Eagle3Batch, build_eagle3_batch
from draftline.training.frozen import FrozenEnds, measure_features
from draftline.training.objective import StepTerms, Sums
from draftline.training.survival import survival_figures, survival_sums


class Eagle3Objective:
    """See :class:`draftline.training.objective.Objective`.

    Step k of a chain counts ``draft.ttt_decay ** k``. The paper's and the
    reference's loss is the cross-entropy to the target's whole law: set
    ``train.loss`` to kl 1, ce 0, tv 0, which has the same gradient.

    Args:
        spec: The run spec.
        target: The frozen target (embeddings and LM head are used).
        counts: Token counts for the draft vocabulary, likeliest first.
    """

    def __init__(self, spec: RunSpec, target: Target, counts: Sequence[tuple[int, int]]) -> None:
        self._spec = spec
        self._config = draft_config(spec, target)
        self._ends = FrozenEnds(spec, target, counts)
        self._model = self._new_model()
        self._model.initialise(torch.Generator().manual_seed(spec.seed), self._ends.norm_scale_D)

    @property
    def model(self) -> Eagle3Draft:
        """The draft."""
        return self._model

    def initialise(self, source: SampleSource) -> None:
        """Standardise the taps."""
        self._model.feature_scale.copy_(measure_features(self._config, source))

    def build_batch(self, samples: Sequence[CachedSample], positions: Sequence[int]) -> Eagle3Batch:
        """Chains at anchors that depend on the seed and the sample's place."""
        return self._batch(samples, positions, self._spec.train.anchors_per_sample)

    def validation_batch(self, samples: Sequence[CachedSample], positions: Sequence[int]) -> Eagle3Batch:
        """As :meth:`build_batch`, with a number of anchors that no training option changes."""
        return self._batch(samples, positions, VALIDATION_ANCHORS)

    def terms(self, batch: Eagle3Batch) -> StepTerms:
        """Terms of the distillation loss, summed over steps."""
        terms = self._distil(batch, is_training=True)
        sums = {
            "ce": terms.ce_sum,
            "tv": terms.tv_sum,
            "kl": terms.kl_sum,
            "weight": terms.weight_sum,
            "accept": terms.accept_N.sum(),
            "slots": terms.accept_N.new_tensor(float(len(batch.valid_N))),
        }
        return StepTerms(terms.objective, Sums({name: value.detach() for name, value in sums.items()}))

    def validate(self, batch: Eagle3Batch) -> Sums:
        """Held-out loss and teacher-forced greedy accepted length, summed over chains.

        A chain counts as far as it is both trained and drafted.
        """
        terms = self._distil(batch, is_training=False)
        match = torch.zeros(batch.inputs.chain_ids_SAB.numel())
        match[batch.valid_N] = (terms.is_greedy_match_N & self._ends.can_propose_best(batch.targets)).float()
        drafted = match.view(-1, self._config.ttt_length)[:, : self._config.block_size]
        return Sums(
            {
                "ce": terms.ce_sum,
                "tv": terms.tv_sum,
                "kl": terms.kl_sum,
                "weight": terms.weight_sum,
                **survival_sums(drafted),
            }
        )

    def figures(self, sums: Sums) -> dict[str, float]:
        """Loss and its terms per unit of weight; mean chance that a drafted token survives."""
        return {
            "loss": self._loss_of(sums),
            "ce": sums.ratio("ce"),
            "tv": sums.ratio("tv"),
            **({"kl": sums.ratio("kl")} if self._spec.train.loss.kl else {}),
            "acceptance": sums.scalar("accept") / max(sums.scalar("slots"), 1.0),
        }

    def validation_figures(self, sums: Sums) -> dict[str, float]:
        """Held-out loss, accepted length, and acceptance by position."""
        return {"validation_loss": self._loss_of(sums), **survival_figures(sums)}

    def export(self, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        """``config.json`` and ``model.safetensors``."""
        whole = self._new_model()
        whole.load_state_dict(dict(state))
        return to_files(DraftModel(self._config, export_state(whole, self._ends.vocab_W)))

    # -- parts --------------------------------------------------------------------------------------------------

    def _new_model(self) -> Eagle3Draft:
        return Eagle3Draft(self._config, self._spec.tokens.max_length + self._config.ttt_length)

    def _batch(self, samples: Sequence[CachedSample], positions: Sequence[int], num_anchors: int) -> Eagle3Batch:
        anchors = [
            draw_anchors(s.loss_mask_T.numpy(), num_anchors, (self._spec.seed, p))
            for s, p in zip(samples, positions, strict=True)
        ]
        return build_eagle3_batch(samples, anchors, self._config, self._ends.columns_V)

    def _distil(self, batch: Eagle3Batch, *, is_training: bool) -> LossTerms:
        """Terms of a batch; a validation's always with the fixed decay, so that runs can be compared."""
        loss = self._spec.train.loss
        hidden = self._model(batch.inputs, self._ends.embedding_VD)
        has_dpace = is_training and loss.position_weights == "dpace"
        options = LossOptions(
            ce=loss.ce,
            tv=loss.tv,
            kl=loss.kl,
            dpace=DPace(batch.valid_N // self._config.ttt_length, loss.dpace_alpha) if has_dpace else None,
            softcap=self._config.logit_softcap,
            count_matches=not is_training,
        )
        rows = hidden.flatten(0, 2)[batch.valid_N]
        return distillation_loss(rows, None, None, self._ends.head_WD, batch.targets, options)

    def _loss_of(self, sums: Sums) -> float:
        loss = self._spec.train.loss
        return loss.ce * sums.ratio("ce") + loss.tv * sums.ratio("tv") + loss.kl * sums.ratio("kl")
