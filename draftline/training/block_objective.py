"""Block drafts, DSpark and DFlash: distillation at the slots of random anchors (paper section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from draftline.cache.reader import CachedSample
from draftline.cache.source import SampleSource
from draftline.draft.bigrams import MAX_TABLE_TOKENS, bigram_logits, low_rank
from draftline.draft.checkpoint import DraftModel, export_state, to_files
from draftline.draft.dpace import DPace
from draftline.draft.loss import LossOptions, LossTerms, confidence_loss, distillation_loss
from draftline.draft.model import DraftHidden, DSparkDraft
from draftline.spec import LossSpec, RunSpec
from draftline.target.load import Target
from draftline.training.architecture import draft_config
from draftline.training.batches import DraftBatch, build_draft_batch, draw_anchors, position_weights
from draftline.training.frozen import FrozenEnds, measure_features
from draftline.training.objective import StepTerms, Sums
from draftline.training.survival import survival_figures, survival_sums

VALIDATION_ANCHORS = 16


class BlockObjective:
    """See :class:`draftline.training.objective.Objective`.

    Args:
        spec: The run spec.
        target: The frozen target (embeddings and LM head are used).
        counts: Token counts for the draft vocabulary, likeliest first.
    """

    def __init__(self, spec: RunSpec, target: Target, counts: Sequence[tuple[int, int]]) -> None:
        self._spec = spec
        self._target = target
        self._config = draft_config(spec, target)
        self._ends = FrozenEnds(spec, target, counts)
        self._model = self._new_model()
        self._model.initialise(torch.Generator().manual_seed(spec.seed), self._ends.norm_scale_D)

    @property
    def model(self) -> DSparkDraft:
        """The draft."""
        return self._model

    def initialise(self, source: SampleSource) -> None:
        """Standardise the taps, and give the sequential head the target's own bigrams."""
        self._model.feature_scale.copy_(measure_features(self._config, source))
        self._start_from_bigrams()

    def build_batch(self, samples: Sequence[CachedSample], positions: Sequence[int]) -> DraftBatch:
        """Blocks at anchors that depend on the seed and the sample's place."""
        return self._batch(samples, positions, self._spec.train.anchors_per_sample)

    def validation_batch(self, samples: Sequence[CachedSample], positions: Sequence[int]) -> DraftBatch:
        """As :meth:`build_batch`, with a number of anchors that no training option changes."""
        return self._batch(samples, positions, VALIDATION_ANCHORS)

    def terms(self, batch: DraftBatch) -> StepTerms:
        """Cross-entropy, total variation, KL, and the confidence head's BCE."""
        loss = self._spec.train.loss
        out = self._model(batch.inputs, self._ends.embedding_VD)
        terms = self._distil(out, batch, loss, is_training=True)
        objective = terms.objective
        confidence = objective.new_zeros(())
        if out.confidence_M is not None:
            logits = out.confidence_M[batch.valid_N]
            weights = batch.targets.weights_N
            if loss.position_weights == "dpace":
                # Sums are then divided by blocks: a whole block's weights are made to sum to 1.
                weights = weights / position_weights(self._config.block_size, loss.position_decay).sum()
            confidence = confidence_loss(logits, terms.accept_N, weights)
            objective = objective + loss.confidence * confidence
        sums = {
            "ce": terms.ce_sum,
            "tv": terms.tv_sum,
            "kl": terms.kl_sum,
            "confidence": confidence,
            "weight": terms.weight_sum,
            "accept": terms.accept_N.sum(),
            "slots": terms.accept_N.new_tensor(float(len(batch.valid_N))),
        }
        return StepTerms(objective, Sums({name: value.detach() for name, value in sums.items()}))

    def validate(self, batch: DraftBatch) -> Sums:
        """Held-out loss and teacher-forced greedy accepted length, summed over blocks."""
        out = self._model(batch.inputs, self._ends.embedding_VD)
        terms = self._distil(out, batch, self._spec.train.loss, is_training=False)
        match = torch.zeros(len(out.hidden_MD))
        match[batch.valid_N] = (terms.is_greedy_match_N & self._ends.can_propose_best(batch.targets)).float()
        return Sums(
            {
                "ce": terms.ce_sum,
                "tv": terms.tv_sum,
                "kl": terms.kl_sum,
                "weight": terms.weight_sum,
                **survival_sums(match.view(-1, self._config.block_size)),
            }
        )

    def figures(self, sums: Sums) -> dict[str, float]:
        """Loss and its terms per unit of weight; mean chance that a drafted token survives."""
        loss = self._spec.train.loss
        ce, tv, kl, confidence = (sums.ratio(name) for name in ("ce", "tv", "kl", "confidence"))
        return {
            "loss": loss.ce * ce + loss.tv * tv + loss.kl * kl + loss.confidence * confidence,
            "ce": ce,
            "tv": tv,
            **({"kl": kl} if loss.kl else {}),
            "confidence": confidence,
            "acceptance": sums.scalar("accept") / max(sums.scalar("slots"), 1.0),
        }

    def validation_figures(self, sums: Sums) -> dict[str, float]:
        """Held-out loss (without the confidence head's), accepted length, and acceptance by position."""
        loss = self._spec.train.loss
        numerator = loss.ce * sums.scalar("ce") + loss.tv * sums.scalar("tv") + loss.kl * sums.scalar("kl")
        return {
            "validation_loss": numerator / max(sums.scalar("weight"), 1e-9),
            **survival_figures(sums),
        }

    def export(self, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        """``config.json`` and ``model.safetensors``."""
        whole = self._new_model()
        whole.load_state_dict(dict(state))
        return to_files(DraftModel(self._config, export_state(whole, self._ends.vocab_W)))

    # -- parts --------------------------------------------------------------------------------------------------

    def _new_model(self) -> DSparkDraft:
        return DSparkDraft(self._config, self._spec.tokens.max_length + self._config.block_size)

    def _batch(self, samples: Sequence[CachedSample], positions: Sequence[int], num_anchors: int) -> DraftBatch:
        anchors = [
            draw_anchors(s.loss_mask_T.numpy(), num_anchors, (self._spec.seed, p))
            for s, p in zip(samples, positions, strict=True)
        ]
        return build_draft_batch(
            samples, anchors, self._config, self._ends.columns_V, self._spec.train.loss.position_decay
        )

    def _distil(self, out: DraftHidden, batch: DraftBatch, loss: LossSpec, *, is_training: bool) -> LossTerms:
        """Terms of a batch; a validation's always with the fixed decay, so that runs can be compared."""
        valid = batch.valid_N
        latent = out.latent_Mr[valid] if out.latent_Mr is not None else None
        head = self._model.markov_head
        has_dpace = is_training and loss.position_weights == "dpace"
        options = LossOptions(
            ce=loss.ce,
            tv=loss.tv,
            kl=loss.kl,
            dpace=DPace(valid // self._config.block_size, loss.dpace_alpha) if has_dpace else None,
            softcap=self._config.logit_softcap,
            count_matches=not is_training,
        )
        return distillation_loss(
            out.hidden_MD[valid],
            latent,
            head.markov_w2.weight if head is not None else None,
            self._ends.head_WD,
            batch.targets,
            options,
        )

    def _start_from_bigrams(self) -> None:
        """Give the sequential head the target's own bigrams; see :mod:`draftline.draft.bigrams`.

        A vocabulary whose table would not fit in memory starts without.
        """
        head, vocab = self._model.markov_head, self._ends.vocab_W
        if head is None or vocab is None or len(vocab) > MAX_TABLE_TOKENS or not self._target.eos_token_ids:
            return
        table = bigram_logits(self._target, vocab, self._target.eos_token_ids[0])
        first, second = low_rank(table, self._config.markov_rank, self._spec.seed)
        with torch.no_grad():
            head.markov_w1.weight.zero_()
            head.markov_w1.weight[vocab, : first.shape[1]] = first
            head.markov_w2.weight.zero_()
            head.markov_w2.weight[:, : second.shape[1]] = second
