"""Every family's layer equals one put together from transformers' own parts, as DeepSpec's models put them together.

The reference is written from DeepSpec's ``modeling/dspark/{qwen3,gemma4}/modeling.py``; its norms, feed-forwards and
rotary embeddings are transformers'. Gemma 3 follows ``Gemma3DecoderLayer``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma3TextConfig, Gemma4TextConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextMLP, Gemma4TextRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, rotate_half
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from draftline.draft.checkpoint import export_state
from draftline.draft.config import DraftConfig
from draftline.draft.runner import DraftRunner
from draftline.target.rope import RopeScaling
from tests.draft.forward import Sequences, fill_slot, module_outputs, true_previous
from tests.draft.test_model import BASE, EMBEDDING, IDS, LM_HEAD, TAPS, TOKENS
from tests.servers.tiny_target import random_module

HEAD, SIZE, INNER = 8, 24, 40
GEMMA4 = replace(
    BASE,
    family="gemma4",
    head_dim=HEAD,
    rope_theta=1e6,
    rope_scaling=RopeScaling("proportional", partial_rotary_factor=0.5),
    has_shared_kv=True,
    logit_softcap=3.0,
)
CONFIGS: dict[str, DraftConfig] = {
    "qwen3": replace(BASE, head_dim=HEAD),
    "llama": replace(BASE, family="llama", head_dim=HEAD, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16)),
    "gemma3": replace(
        BASE, family="gemma3", head_dim=HEAD, query_pre_attn_scalar=20.0, rope_scaling=RopeScaling("linear", 8.0)
    ),
    "gemma4": GEMMA4,
    "gemma4 with values": replace(GEMMA4, has_shared_kv=False, num_kv_heads=1, logit_softcap=None),
}
ANCHORS = (3, 9)
_HF = {
    "qwen3": (Qwen3Config, Qwen3RMSNorm, Qwen3MLP),
    "llama": (LlamaConfig, LlamaRMSNorm, LlamaMLP),
    "gemma3": (Gemma3TextConfig, Gemma3RMSNorm, Gemma3MLP),
    "gemma4": (Gemma4TextConfig, Gemma4RMSNorm, lambda config: Gemma4TextMLP(config, 0)),
}


class Reference:
    """One draft's backbone, block after block, from the exported weights."""

    def __init__(self, config: DraftConfig, state: dict[str, Tensor]) -> None:
        self.config, self.state = config, state
        config_class, self.norm_class, self.mlp_class = _HF[config.family]
        rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
        if config.rope_scaling is not None:
            rope |= config.rope_scaling.to_hf()
        common: dict[str, Any] = {
            "hidden_size": SIZE,
            "intermediate_size": INNER,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": HEAD,
            "num_hidden_layers": config.num_layers,
            "layer_types": ["full_attention"] * config.num_layers,
            "rope_parameters": rope,
        }
        if config.family == "gemma4":
            common |= {
                "rope_parameters": {"full_attention": rope},
                "global_head_dim": HEAD,
                "hidden_size_per_layer_input": 0,
            }
            self.rotary = Gemma4TextRotaryEmbedding(Gemma4TextConfig(**common))
        else:
            self.rotary = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in common.items() if k != "layer_types"}))
        if config.family == "llama":
            del common["layer_types"]
        if config.family == "gemma3":
            common["rope_parameters"] = {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 1e4}}
        self.hf_config = config_class(**common)

    def norm(self, name: str, x: Tensor) -> Tensor:
        module = self.norm_class(x.shape[-1], eps=self.config.rms_norm_eps)
        module.load_state_dict({"weight": self.state[f"{name}.weight"]})
        out: Tensor = module(x)
        return out

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        module: nn.Module = self.mlp_class(self.hf_config)
        start = f"{prefix}mlp."
        module.load_state_dict({n.removeprefix(start): v for n, v in self.state.items() if n.startswith(start)})
        out: Tensor = module(x)
        return out

    def attention(self, prefix: str, x: Tensor, context: Tensor, anchor: int) -> Tensor:
        config, at = self.config, f"{prefix}self_attn."
        keyed = torch.cat([context, x])
        q = (x @ self.state[f"{at}q_proj.weight"].T).view(len(x), -1, HEAD)
        k = (keyed @ self.state[f"{at}k_proj.weight"].T).view(len(keyed), -1, HEAD)
        v = k
        if not config.has_shared_kv:
            v = (keyed @ self.state[f"{at}v_proj.weight"].T).view(len(keyed), -1, HEAD)
        if config.family != "llama":
            q, k = self.norm(f"{at}q_norm", q), self.norm(f"{at}k_norm", k)
        if config.family == "gemma4":
            v = Gemma4RMSNorm(HEAD, eps=config.rms_norm_eps, with_scale=False)(v)
        positions = torch.cat([torch.arange(len(context)), anchor + torch.arange(len(x))])[None]
        arguments = {"layer_type": "full_attention"} if config.family == "gemma4" else {}
        cos, sin = (part[0][:, None] for part in self.rotary(x[None], positions, **arguments))
        q = q * cos[-len(x) :] + rotate_half(q) * sin[-len(x) :]
        k = k * cos + rotate_half(k) * sin
        group = config.num_heads // config.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scale = {"gemma4": 1.0, "gemma3": 20.0**-0.5}.get(config.family, HEAD**-0.5)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=scale
        )
        return out.transpose(0, 1).reshape(len(x), -1) @ self.state[f"{at}o_proj.weight"].T

    def hidden(self, taps: Tensor, anchor: int, anchor_id: int) -> Tensor:
        """``[B, D]`` after the final norm."""
        config = self.config
        context = self.norm("hidden_norm", taps[:anchor] @ self.state["fc.weight"].T)
        ids = torch.tensor([anchor_id] + [config.mask_token_id] * (config.block_size - 1))
        x = EMBEDDING[ids] * (SIZE**0.5 if config.family.startswith("gemma") else 1.0)
        for index in range(config.num_layers):
            prefix = f"layers.{index}."
            attended = self.attention(prefix, self.norm(f"{prefix}input_layernorm", x), context, anchor)
            if config.family.startswith("gemma"):
                x = x + self.norm(f"{prefix}post_attention_layernorm", attended)
                fed = self.mlp(prefix, self.norm(f"{prefix}pre_feedforward_layernorm", x))
                x = x + self.norm(f"{prefix}post_feedforward_layernorm", fed)
            else:
                x = x + attended
                x = x + self.mlp(prefix, self.norm(f"{prefix}post_attention_layernorm", x))
            if config.family == "gemma4":
                x = x * self.state[f"{prefix}layer_scalar"]
        return self.norm("norm", x)

    def logits(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """``[B, W]``: the head's logits, capped where the family caps them, and the Markov bias, which is not."""
        logits, cap = hidden @ LM_HEAD.T, self.config.logit_softcap
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        bias = self.state["markov_head.markov_w1.weight"][previous] @ self.state["markov_head.markov_w2.weight"].T
        return logits + bias


def made(config: DraftConfig) -> tuple[Any, dict[str, Tensor]]:
    draft = random_module(config, 11, max_positions=64)
    with torch.no_grad():
        for name, buffer in draft.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
    return draft, export_state(draft, None)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_module_equals_transformers_parts(name: str) -> None:
    config = CONFIGS[name]
    draft, state = made(config)
    reference = Reference(config, state)
    given = Sequences(TAPS, IDS, EMBEDDING, LM_HEAD)
    previous = true_previous(config, IDS, ANCHORS)
    uncapped, _ = module_outputs(draft, given, ANCHORS, None, previous)
    for sample in range(2):
        for a, anchor in enumerate(ANCHORS):
            hidden = reference.hidden(TAPS[sample], anchor, int(IDS[sample, anchor]))
            slots = slice(a * config.block_size, (a + 1) * config.block_size)
            # The module gives hidden states; the loss and the runner cap its logits.
            expected = Reference(replace(config, logit_softcap=None), state).logits(hidden, previous[sample, slots])
            # fp32 sums of some 50 terms, twice.
            torch.testing.assert_close(uncapped[sample, slots], expected, atol=3e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_runner_equals_transformers_parts(name: str) -> None:
    config = CONFIGS[name]
    _, state = made(config)
    reference = Reference(config, state)
    runner = DraftRunner(config, state, EMBEDDING, LM_HEAD, torch.float32, 2, 40)
    anchor = TOKENS - 2
    fill_slot(runner, TAPS[1], 1, anchor, 40)
    uniforms = torch.rand(1, config.block_size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    anchor_id = int(IDS[1, anchor])
    proposal = runner.propose([1], [anchor_id], [anchor], [1.0], uniforms)
    drafted = proposal.token_ids_RB[0]
    hidden = reference.hidden(TAPS[1], anchor, anchor_id)
    logits = reference.logits(hidden, torch.tensor([anchor_id, *drafted[:-1].tolist()]))
    assert proposal.law_RBW is not None
    torch.testing.assert_close(proposal.law_RBW[0], logits.softmax(-1), atol=3e-4, rtol=1e-3)


def test_bf16_norms_of_gemma_round_once() -> None:
    """Gemma multiplies in fp32 and rounds; Llama rounds, multiplies and rounds again."""
    config = CONFIGS["gemma3"]
    draft, _ = made(config)
    x = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = Gemma3RMSNorm(SIZE, eps=config.rms_norm_eps).bfloat16()
    draft.norm.bfloat16()
    expected.load_state_dict({"weight": draft.norm.weight})
    assert torch.equal(draft.norm(x), expected(x))


def test_gemma_norms_start_as_ones() -> None:
    draft = random_module(replace(CONFIGS["gemma3"]), 0, max_positions=8)
    draft.norm.start_from(torch.full((SIZE,), 1.5))
    assert draft.norm.weight.tolist() == [0.5] * SIZE
    x = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(0))
    plain = x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * 1.5
    torch.testing.assert_close(draft.norm(x), plain)
