"""What block drafts put on their backbone: the sequential head and the confidence head (paper section 3.1).

Dimension letters: M slots of all blocks, D hidden, V target vocabulary,
W draft vocabulary, r Markov rank.

Parameter names are DeepSpec's, so a state dict is a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from draftline.draft.config import DraftConfig


class MarkovHead(nn.Module):
    """The sequential head (eq. 4-6): a low-rank bias that depends on the token before.

    ``forward`` returns the latent; ``markov_w2`` maps it to vocabulary logits
    (done by the chunked loss and by the runner).
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        rank = config.markov_rank
        self.kind = config.markov_head
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(config.hidden_size + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + config.hidden_size, 3 * rank)

    def step(self, hidden: Tensor, previous: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Latent ``[..., r]`` of one slot and the next state.

        Args:
            hidden: ``[..., D]``.
            previous: ``markov_w1`` of the token before, ``[..., r]``.
            state: Of the rnn head; ``None`` is zero.
        """
        if self.kind == "vanilla":
            return previous, None
        if self.kind == "gated":
            return previous * torch.sigmoid(self.gate_proj(torch.cat([hidden, previous], -1))), None
        state = torch.zeros_like(previous) if state is None else state
        joint = self.joint_proj(torch.cat([state, previous, hidden], -1))
        gate, candidate, output = joint.chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)

    def forward(self, hidden_MD: Tensor, previous_Mr: Tensor, block_size: int) -> Tensor:
        """Latents ``[M, r]`` of whole blocks, one after the other."""
        if self.kind != "rnn":
            return self.step(hidden_MD, previous_Mr, None)[0]
        hidden, previous = hidden_MD.unflatten(0, (-1, block_size)), previous_Mr.unflatten(0, (-1, block_size))
        state: Tensor | None = None
        latents = []
        for k in range(block_size):
            latent, state = self.step(hidden[:, k], previous[:, k], state)
            latents.append(latent)
        return torch.stack(latents, 1).flatten(0, 1)


class ConfidenceHead(nn.Module):
    """Logit of the probability that a drafted token survives, given the ones before did (eq. 7)."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_with_markov
        self.proj = nn.Linear(config.confidence_features, 1)

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """``[...]`` logits from hidden states and the token before's Markov embedding."""
        features = torch.cat([hidden, previous], -1) if self.with_markov and previous is not None else hidden
        logits: Tensor = self.proj(features).squeeze(-1)
        return logits
