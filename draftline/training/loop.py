"""The training loop of one worker; Ray Train starts it, but it knows nothing of Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from draftline.cache.reader import CacheReader
from draftline.cache.shards import Manifest
from draftline.draft.bigrams import MAX_TABLE_TOKENS, bigram_logits, low_rank
from draftline.draft.checkpoint import DraftModel, export_state, to_files
from draftline.draft.config import DraftConfig, resolve_taps
from draftline.draft.loss import confidence_loss, distillation_loss
from draftline.draft.model import DSparkDraft
from draftline.draft.vocab import choose_vocab
from draftline.errors import SpecError, TrainingDiverged
from draftline.spec import RunSpec
from draftline.steps.ledger import SCRATCH
from draftline.storage.base import ObjectStore
from draftline.target.load import Target
from draftline.training.batches import DraftBatch, build_draft_batch, draw_anchors
from draftline.training.checkpoints import CheckpointStore, TrainingCheckpoint
from draftline.training.optimizers import DraftOptimizer

VALIDATION_ANCHORS = 16
VALIDATION_SAMPLES = 24
_FEATURE_FLOOR = 1e-3


@dataclass(frozen=True)
class TrainingInputs:
    """What a worker reads.

    Attributes:
        spec: The run spec.
        store: The workspace.
        cache_prefix: Folder of the hidden-states step.
        manifest: Its manifest.
        counts: Token counts for the draft vocabulary, likeliest first.
        prefix: Folder of this step.
    """

    spec: RunSpec
    store: ObjectStore
    cache_prefix: str
    manifest: Manifest
    counts: list[tuple[int, int]]
    prefix: str


@dataclass(frozen=True)
class StepSums:
    """Sums over the slots of a step (all workers)."""

    ce: float
    tv: float
    confidence: float
    weight: float
    accept: float
    slots: float


def draft_config(spec: RunSpec, target: Target) -> DraftConfig:
    """The draft's architecture for a target.

    Raises:
        SpecError: the taps, the mask token or the draft vocabulary do not fit the target.
    """
    draft, config = spec.draft, target.config
    size = draft.vocab_size
    if draft.mask_token_id is not None and not 0 <= draft.mask_token_id < config.vocab_size:
        raise SpecError(
            f"draft.mask_token_id={draft.mask_token_id} is no token of the target",
            expected=f"0 to {config.vocab_size - 1}",
            remedy="Leave it out to take a special token that text never holds",
        )
    if 0 < size < len(target.eos_token_ids) + 1:
        raise SpecError(
            f"draft.vocab_size={size} has no room beside the target's end tokens",
            expected=f"at least {len(target.eos_token_ids) + 1}, or 0 for the whole vocabulary",
            remedy="Set draft.vocab_size to 0, or to a few thousand",
        )
    return DraftConfig(
        vocab_size=config.vocab_size,
        draft_vocab_size=config.vocab_size if size == 0 or size >= config.vocab_size else size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=draft.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        block_size=draft.block_size,
        target_layer_ids=resolve_taps(draft.target_layer_ids, draft.num_taps, config.num_layers),
        num_target_layers=config.num_layers,
        mask_token_id=draft.mask_token_id if draft.mask_token_id is not None else default_mask_token(target),
        markov_rank=draft.markov_rank,
        markov_head=draft.markov_head,
        enable_confidence_head=draft.enable_confidence_head,
        confidence_with_markov=draft.confidence_with_markov and draft.enable_confidence_head,
    )


def default_mask_token(target: Target) -> int:
    """A token that text never holds: an id that the tokenizer leaves unused, else the last special one but the ends.

    The reference's choice for Qwen3, 151669, is the first unused id.
    """
    tokenizer, taken = target.tokenizer, set(target.eos_token_ids)
    if len(tokenizer) < target.vocab_size:
        return len(tokenizer)
    added = [t for t in tokenizer.added_tokens_decoder if t < target.vocab_size and t not in taken]
    special = [t for t in tokenizer.all_special_ids if t not in taken]
    return int(max(added or special or [0]))


class DraftTrainer:
    """Trains a draft from a cache; exact across restarts.

    Args:
        inputs: What to read.
        target: The frozen target (embeddings and LM head are used).
        rank: This worker.
        world_size: All workers.
        on_step: Called after every step with the step number and its figures.
    """

    def __init__(
        self,
        inputs: TrainingInputs,
        target: Target,
        *,
        rank: int = 0,
        world_size: int = 1,
        on_step: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
    ) -> None:
        self._inputs = inputs
        self._spec = inputs.spec
        self._rank, self._world = rank, world_size
        self._on_step = on_step
        self._config = draft_config(self._spec, target)
        self._vocab = choose_vocab(inputs.counts, self._spec.draft.vocab_size, target.vocab_size, target.eos_token_ids)
        self._columns = _columns(self._vocab, target.vocab_size)
        self._embedding = target.embedding_VD.float()
        head = target.lm_head_VD.float()
        self._head = head if self._vocab is None else head[self._vocab].contiguous()
        seed = self._spec.seed
        self._reader = CacheReader(inputs.store, inputs.cache_prefix, inputs.manifest, "train", seed)
        self._validation = (
            CacheReader(inputs.store, inputs.cache_prefix, inputs.manifest, "validation", seed)
            if inputs.manifest.of_split("validation")
            else None
        )
        self._model = DSparkDraft(self._config, self._spec.tokens.max_length + self._config.block_size)
        self._model.initialise(torch.Generator().manual_seed(seed), target.weights["model.norm.weight"].float())
        self._target = target
        self._optimizer = DraftOptimizer(self._model, self._spec.train)
        self._checkpoints = CheckpointStore(inputs.store, f"{inputs.prefix}/{SCRATCH}")
        self._history: list[dict[str, Any]] = []

    @property
    def num_parameters(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self._model.parameters())

    def run(self) -> list[dict[str, Any]]:
        """Train to the last step, from the newest checkpoint if there is one; returns the history.

        Raises:
            TrainingDiverged: a loss or gradient is not finite.
        """
        train = self._spec.train
        start = self._restore()
        for step in range(start, train.steps):
            figures = self._step(step)
            done = step + 1
            is_last = done == train.steps
            if done % train.validate_every_steps == 0 or is_last:
                figures.update(self._validate())
            if done % 10 == 0 or is_last or "validation_loss" in figures:
                self._history.append({"step": done, **figures})
            if (done % train.checkpoint_every_steps == 0 or is_last) and self._rank == 0:
                self._save(done)
            self._on_step(done, figures)
        return self._history

    def export(self) -> dict[str, bytes]:
        """The trained draft as checkpoint files."""
        return to_files(DraftModel(self._config, export_state(self._model, self._vocab)))

    def history_file(self) -> bytes:
        """The history as JSON lines."""
        return "".join(json.dumps(record, sort_keys=True) + "\n" for record in self._history).encode()

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self, step: int) -> dict[str, float]:
        batch = self._batch(step)
        objective, sums = self._forward(batch)
        if not math.isfinite(sums.ce + sums.tv + sums.confidence):
            raise _diverged("the loss", step, batch)
        objective.backward()
        self._reduce_gradients()
        norm = self._optimizer.step(step)
        if not math.isfinite(norm):
            raise _diverged("a gradient", step, batch)
        return self._figures(sums)

    def _batch(self, step: int) -> DraftBatch:
        train = self._spec.train
        share = train.samples_per_step // self._world
        first = step * train.samples_per_step + self._rank * share
        positions = range(first, first + share)
        samples = [self._reader.at(p) for p in positions]
        anchors = [
            draw_anchors(s.loss_mask_T.numpy(), train.anchors_per_sample, (self._spec.seed, p))
            for s, p in zip(samples, positions, strict=True)
        ]
        return build_draft_batch(samples, anchors, self._config, self._columns, train.loss.position_decay)

    def _forward(self, batch: DraftBatch) -> tuple[Tensor, StepSums]:
        """The objective (divided once, by the weight of all workers) and the sums."""
        weights = self._spec.train.loss
        out = self._model(batch.inputs, self._embedding)
        valid = batch.valid_N
        hidden = out.hidden_SMD.flatten(0, 1)[valid]
        latent = out.latent_SMr.flatten(0, 1)[valid] if out.latent_SMr is not None else None
        w2 = self._model.markov_head.markov_w2.weight if self._model.markov_head is not None else None
        terms = distillation_loss(
            hidden, latent, w2, self._head, batch.targets, ce=weights.ce, tv=weights.tv, count_matches=False
        )
        objective = terms.objective
        confidence = hidden.new_zeros(())
        if out.confidence_SM is not None:
            confidence = confidence_loss(out.confidence_SM.flatten()[valid], terms.accept_N, batch.targets.weights_N)
            objective = objective + weights.confidence * confidence
        packed = torch.stack(
            [
                terms.ce_sum,
                terms.tv_sum,
                confidence.detach(),
                terms.weight_sum,
                terms.accept_N.sum(),
                terms.accept_N.new_tensor(float(len(valid))),
            ]
        ).double()
        if self._world > 1:
            distributed.all_reduce(packed)
        sums = StepSums(*packed.tolist())
        return objective / max(sums.weight, 1e-9), sums

    def _reduce_gradients(self) -> None:
        if self._world == 1:
            return
        grads = [p.grad for p in self._optimizer.parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        distributed.all_reduce(flat)
        offset = 0
        for grad in grads:
            grad.copy_(flat[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()

    def _figures(self, sums: StepSums) -> dict[str, float]:
        loss, weight = self._spec.train.loss, max(sums.weight, 1e-9)
        ce, tv, confidence = sums.ce / weight, sums.tv / weight, sums.confidence / weight
        return {
            "loss": loss.ce * ce + loss.tv * tv + loss.confidence * confidence,
            "ce": ce,
            "tv": tv,
            "confidence": confidence,
            "acceptance": sums.accept / max(sums.slots, 1.0),
        }

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Held-out loss and teacher-forced greedy accepted length (the same on every worker)."""
        if self._validation is None:
            return {}
        count = min(VALIDATION_SAMPLES, self._validation.num_samples)
        totals: dict[str, float] = {}
        lengths: list[float] = []
        for first in range(0, count, 8):
            positions = range(first, min(first + 8, count))
            samples = [self._validation.at(p) for p in positions]
            anchors = [
                draw_anchors(s.loss_mask_T.numpy(), VALIDATION_ANCHORS, (self._spec.seed, p))
                for s, p in zip(samples, positions, strict=True)
            ]
            batch = build_draft_batch(
                samples, anchors, self._config, self._columns, self._spec.train.loss.position_decay
            )
            out = self._model(batch.inputs, self._embedding)
            valid = batch.valid_N
            latent = out.latent_SMr.flatten(0, 1)[valid] if out.latent_SMr is not None else None
            w2 = self._model.markov_head.markov_w2.weight if self._model.markov_head is not None else None
            terms = distillation_loss(
                out.hidden_SMD.flatten(0, 1)[valid], latent, w2, self._head, batch.targets, ce=1.0, tv=1.0
            )
            for name, value in (("ce", terms.ce_sum), ("tv", terms.tv_sum), ("weight", terms.weight_sum)):
                totals[name] = totals.get(name, 0.0) + float(value)
            match = torch.zeros(out.hidden_SMD.shape[0] * out.hidden_SMD.shape[1])
            match[valid] = (terms.is_greedy_match_N & self._is_within_vocab(batch)).float()
            lengths += (1 + match.view(-1, self._config.block_size).cumprod(1).sum(1)).tolist()
        loss = self._spec.train.loss
        weight = max(totals["weight"], 1e-9)
        return {
            "validation_loss": (loss.ce * totals["ce"] + loss.tv * totals["tv"]) / weight,
            "accepted_length": float(np.mean(lengths)),
        }

    def _is_within_vocab(self, batch: DraftBatch) -> Tensor:
        """Rows whose likeliest target token the draft can propose at all; the loss sees only the draft's vocabulary."""
        hidden = batch.targets.hidden_ND
        if self._vocab is None:
            return torch.ones(len(hidden), dtype=torch.bool)
        head = self._target.lm_head_VD
        best = torch.cat([(part.to(head.dtype) @ head.t()).argmax(-1) for part in hidden.split(256)])
        return self._columns[best] >= 0

    # -- state --------------------------------------------------------------------------------------------------

    def _restore(self) -> int:
        step = self._load()
        if self._world > 1:
            # Measured on each worker, the start may differ in the last bit, or a factor in its sign.
            for value in self._model.state_dict().values():
                distributed.broadcast(value, 0)
        return step

    def _load(self) -> int:
        found = self._checkpoints.latest()
        if found is None:
            self._model.feature_scale.copy_(self._measure_features())
            self._start_from_bigrams()
            return 0
        model_state = {k.removeprefix("model."): v for k, v in found.tensors.items() if k.startswith("model.")}
        self._model.load_state_dict(model_state)
        self._optimizer.load_state(found.tensors)
        self._history = list(found.history)
        return found.step

    def _save(self, step: int) -> None:
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()}
        tensors.update(self._optimizer.state())
        self._checkpoints.save(TrainingCheckpoint(step, tensors, self._history))

    def _start_from_bigrams(self) -> None:
        """Give the sequential head the target's own bigrams; see :mod:`draftline.draft.bigrams`.

        A vocabulary whose table would not fit in memory starts without.
        """
        head, vocab = self._model.markov_head, self._vocab
        if head is None or vocab is None or len(vocab) > MAX_TABLE_TOKENS or not self._target.eos_token_ids:
            return
        table = bigram_logits(self._target, vocab, self._target.eos_token_ids[0])
        first, second = low_rank(table, self._config.markov_rank, self._spec.seed)
        with torch.no_grad():
            head.markov_w1.weight.zero_()
            head.markov_w1.weight[vocab, : first.shape[1]] = first
            head.markov_w2.weight.zero_()
            head.markov_w2.weight[:, : second.shape[1]] = second

    def _measure_features(self) -> Tensor:
        """1 / root-mean-square of every tap channel, over the first samples of the stream."""
        count = min(32, self._reader.num_samples)
        total = torch.zeros(len(self._config.target_layer_ids) * self._config.hidden_size, dtype=torch.float64)
        tokens = 0
        for position in range(count):
            taps = self._reader.at(position).taps_TLD
            total += taps.reshape(taps.shape[0], -1).double().pow(2).sum(0)
            tokens += taps.shape[0]
        return (total / max(tokens, 1)).sqrt().clamp(min=_FEATURE_FLOOR).reciprocal().float()


def _columns(vocab: Tensor | None, vocab_size: int) -> Tensor:
    if vocab is None:
        return torch.arange(vocab_size)
    columns = torch.full((vocab_size,), -1, dtype=torch.long)
    columns[vocab] = torch.arange(len(vocab))
    return columns


def _diverged(what: str, step: int, batch: DraftBatch) -> TrainingDiverged:
    return TrainingDiverged(
        f"{what} became NaN or infinite at step {step}",
        got=f"samples {', '.join(batch.sample_ids[:4])}",
        expected="finite values",
        remedy="Lower train.lr or train.muon_lr; the last good checkpoint is kept",
    )
