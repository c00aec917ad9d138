"""Train a stand-alone draft: a shallow model of the target's own family, on the cache that the other drafts learn from.

For the comparison in ``baselines.py``. It has the target's frozen embeddings
and head, its own layers, and the same loss, optimiser, data and number of
steps as the others; every produced token is a training position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from draftline.cache.reader import CachedSample
from draftline.cache.source import SampleSource
from draftline.draft.loss import DistillationTargets, LossOptions, distillation_loss
from draftline.spec import TrainSpec
from draftline.target.load import Target
from draftline.training.batches import eligible_anchors
from draftline.training.frozen import FrozenEnds
from draftline.training.optimizers import DraftOptimizer


def train_standalone(
    target: Target, source: SampleSource, train: TrainSpec, ends: FrozenEnds, num_layers: int, folder: Path
) -> Path:
    """Train and save as a Hugging Face directory.

    Args:
        target: The target, in fp32.
        source: Training samples.
        train: Steps, samples a step, learning rates and loss weights.
        ends: The frozen head over the draft vocabulary.
        num_layers: Depth.
        folder: Where it is written.
    """
    model = _new_model(target, num_layers)
    options = LossOptions(ce=train.loss.ce, tv=train.loss.tv, kl=train.loss.kl, count_matches=False)
    optimizer = DraftOptimizer(
        nn.ModuleDict({"layers": model.model.layers, "norm": model.model.norm}), train, train.steps
    )
    for step in track(range(train.steps), description="stand-alone draft"):
        first = step * train.samples_per_step
        samples = [source.at(position) for position in range(first, first + train.samples_per_step)]
        hidden, targets = _batch(model.model, samples, ends.columns_V)
        terms = distillation_loss(hidden, None, None, ends.head_WD, targets, options)
        (terms.objective / terms.weight_sum).backward()
        optimizer.step(step)
    model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    return folder


def _new_model(target: Target, num_layers: int) -> Any:
    torch.manual_seed(0)
    config: Any = AutoConfig.from_pretrained(target.folder)
    config.num_hidden_layers = num_layers
    config.dtype = torch.float32
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(target.embedding_VD)
        model.get_output_embeddings().weight.copy_(target.lm_head_VD)
        model.model.norm.weight.copy_(target.weights["model.norm.weight"])
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    return model


def _batch(
    model: nn.Module, samples: list[CachedSample], columns_V: torch.Tensor
) -> tuple[torch.Tensor, DistillationTargets]:
    """Hidden states of all produced positions that are followed by another, and what they are trained towards."""
    longest = max(len(s.input_ids_T) for s in samples)
    # Padding on the right is never seen by the tokens before it.
    ids = torch.stack([nn.functional.pad(s.input_ids_T, (0, longest - len(s.input_ids_T))) for s in samples])
    states = model(input_ids=ids, use_cache=False).last_hidden_state
    hidden, laws, normalisers, labels = [], [], [], []
    for row, sample in enumerate(samples):
        at = torch.from_numpy(eligible_anchors(sample.loss_mask_T.numpy()))
        hidden.append(states[row, at])
        laws.append(sample.last_hidden_TD[at].float())
        normalisers.append(sample.log_normaliser_T[at])
        labels.append(columns_V[sample.input_ids_T[at + 1]])
    weights = torch.ones(sum(len(part) for part in labels))
    return torch.cat(hidden), DistillationTargets(torch.cat(laws), torch.cat(normalisers), torch.cat(labels), weights)
