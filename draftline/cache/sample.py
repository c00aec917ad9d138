"""The unit that training reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CachedSample:
    """One sample of the hidden-state cache, its tensors decoded; T tokens, L taps, D hidden size.

    Attributes:
        sample_id: Its name.
        input_ids_T: Token ids; int64.
        loss_mask_T: Whether the target produced the token; bool.
        taps_TLD: Outputs of the tapped layers; bf16 from the ``bf16`` codec, else fp32.
        last_hidden_TD: After the final norm, where a token or the one after it was produced; zero elsewhere. Dtype
            as the taps.
        log_normaliser_T: Log-sum-exp over the whole vocabulary of the logits that ``last_hidden_TD`` gives, at the same
            places; zero elsewhere. fp32.
    """

    sample_id: str
    input_ids_T: Tensor
    loss_mask_T: Tensor
    taps_TLD: Tensor
    last_hidden_TD: Tensor
    log_normaliser_T: Tensor
