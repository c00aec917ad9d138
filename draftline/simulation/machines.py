"""Step costs of machines that are not here: from data sheets and shapes, or from published throughputs.

**Roofline.** A target step reads every weight once and multiplies it by every
token; the slower of the two bounds it. Each request's keys and values are read
once, however many of its tokens are verified: that is why the cost depends on
requests as well as on tokens. Hardware figures are NVIDIA's data sheet of the
H100 SXM (https://www.nvidia.com/en-us/data-center/h100/): 3.35 TB/s, 989
TFLOP/s dense bf16, 900 GB/s NVLink in both directions together. The shares of
them that kernels reach, and the milliseconds outside them, are assumptions.

**Published.** vLLM pull request 52362 (https://github.com/vllm-project/vllm/pull/52362)
gives tokens per second of DeepSeek-V4 on MI350 without speculation, with a fixed
block of 7 and with vLLM's own adaptive verification. The first two fix the step
costs along two lines, one token and eight tokens a request; the third is left
to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from draftline.errors import SpecError
from draftline.planner.targets import KNOWN_CONFIGS, TargetFacts
from draftline.scheduling.costs import CostTable

BLOCK_SIZE = 7
DRAFT_LAYERS = 5
"""Of the reference's DSpark drafts (paper section 5.1)."""
CONTEXT_TOKENS = 1024
_REQUESTS = tuple(2**power for power in range(11))

_LLAMA_70B = {
    # https://huggingface.co/meta-llama/Llama-3.1-70B-Instruct/blob/main/config.json
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Accelerator:
    """One GPU.

    Attributes:
        bytes_per_s: Memory bandwidth, data sheet.
        flops: Dense bf16 operations a second, data sheet.
        link_bytes_per_s: To the other GPUs, one direction.
        memory_share: Of the bandwidth that kernels reach.
        compute_share: Of the operations that they reach.
        step_ms: Of a target step outside its kernels: launches, sampling, scheduling.
        reduce_ms: Latency of one all-reduce.
    """

    bytes_per_s: float = 3.35e12
    flops: float = 989e12
    link_bytes_per_s: float = 450e9
    memory_share: float = 0.8
    compute_share: float = 0.6
    step_ms: float = 1.0
    reduce_ms: float = 0.012


H100 = Accelerator()


@dataclass(frozen=True)
class Roofline:
    """A target and its DSpark draft in bf16 on some GPUs, tensor-parallel.

    Attributes:
        target: Its shape.
        num_gpus: Tensor parallelism.
        accelerator: Each of them.
    """

    target: TargetFacts
    num_gpus: int = 1
    accelerator: Accelerator = H100

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, all layers, bf16."""
        kinds = self.target.attention
        return sum(2 * k.num_layers * k.num_kv_heads * k.head_dim * (2 if k.has_values else 1) for k in kinds)

    def verify_ms(self, num_requests: int, num_tokens: int, context_tokens: float) -> float:
        """One target step: linear layers with the LM head, attention, all-reduces, the fixed part."""
        target = self.target
        weights = target.num_layer_weights + target.vocab_size * target.hidden_size
        reduces = 2 * target.num_layers if self.num_gpus > 1 else 0
        moved = 2 * (self.num_gpus - 1) / self.num_gpus * 2 * target.hidden_size * num_tokens
        per_reduce_ms = self.accelerator.reduce_ms + 1000 * moved / self.accelerator.link_bytes_per_s
        linear_ms = self._linear_ms(weights, num_tokens)
        return (
            linear_ms + self._read_ms(num_requests, context_tokens) + reduces * per_reduce_ms + self.accelerator.step_ms
        )

    def draft_ms(self, num_requests: int) -> float:
        """One block for each request: five layers over anchor and masks, the LM head over its predictions.

        The Markov head's passes one after the other are launches of microseconds each.
        """
        target = self.target
        layer = target.num_layer_weights / target.num_layers
        layers_ms = self._linear_ms(DRAFT_LAYERS * layer, num_requests * BLOCK_SIZE)
        head_ms = self._linear_ms(target.vocab_size * target.hidden_size, num_requests * BLOCK_SIZE)
        return layers_ms + head_ms + 0.03 * BLOCK_SIZE + 0.2

    def costs(self) -> CostTable:
        """The table, up to 1,024 requests with whole blocks."""
        verify = {
            (requests, requests * each): self.verify_ms(requests, requests * each, CONTEXT_TOKENS)
            for requests in _REQUESTS
            for each in range(1, BLOCK_SIZE + 2)
        }
        return CostTable.from_points(
            verify,
            {requests: self.draft_ms(requests) for requests in _REQUESTS},
            context_tokens=CONTEXT_TOKENS,
            context_ms=self._read_ms(1, 1),
            facts={"machine": f"roofline of {self.num_gpus} H100", "target": self.target.name},
        )

    def _linear_ms(self, weights: float, num_tokens: int) -> float:
        hardware, each = self.accelerator, weights / self.num_gpus
        memory_ms = 1000 * 2 * each / (hardware.memory_share * hardware.bytes_per_s)
        compute_ms = 1000 * 2 * each * num_tokens / (hardware.compute_share * hardware.flops)
        # A corner would be sharper than kernels are: near it both bounds are felt.
        return float((memory_ms**4 + compute_ms**4) ** 0.25)

    def _read_ms(self, num_requests: int, context_tokens: float) -> float:
        hardware = self.accelerator
        read = num_requests * context_tokens * self.kv_bytes_per_token / self.num_gpus
        return 1000 * read / (hardware.memory_share * hardware.bytes_per_s)


PUBLISHED_CONCURRENCIES = (4, 8, 16, 32, 64, 128, 256)
PUBLISHED_TOKENS_PER_S: Mapping[str, tuple[float, ...]] = {
    "off": (381.53, 729.20, 1342.83, 2392.99, 4094.75, 6340.78, 8878.57),
    "fixed 7": (970.33, 1762.59, 2909.52, 4756.32, 6712.35, 8778.87, 7852.42),
    "adaptive": (902.37, 1616.77, 2773.69, 4501.11, 7144.12, 10356.48, 13324.67),
}
"""Output tokens per second of vLLM pull request 52362, DeepSeek-V4 on MI350, ShareGPT, 512 tokens each."""
PUBLISHED_ACCEPTED_LENGTH = 3.4
"""Not in that pull request: what vLLM's blog of 14 August 2026 gives for every fixed length on DeepSeek-V4.

https://vllm.ai/blog/2026-08-14-dspark-adaptive-verification
"""
_PUBLISHED_DRAFT_SHARE = 0.15
"""Of a step with a whole block for four requests that goes into drafting: an assumption, the source does not split."""


def published_costs() -> CostTable:
    """Step costs behind vLLM's figures: R tokens at R requests, and 8 R tokens drafting included.

    Between one and eight tokens a request the cost is taken to be linear, and
    prefill, which throughputs contain, is in the steps.
    """
    plain = [1000 * c / rate for c, rate in zip(PUBLISHED_CONCURRENCIES, PUBLISHED_TOKENS_PER_S["off"], strict=True)]
    whole = [
        1000 * c * PUBLISHED_ACCEPTED_LENGTH / rate
        for c, rate in zip(PUBLISHED_CONCURRENCIES, PUBLISHED_TOKENS_PER_S["fixed 7"], strict=True)
    ]
    draft = dict(zip(PUBLISHED_CONCURRENCIES, _draft_part(whole, plain), strict=True))
    verify: dict[tuple[int, int], float] = {}
    for c, least, most in zip(PUBLISHED_CONCURRENCIES, plain, whole, strict=True):
        for each in range(1, BLOCK_SIZE + 2):
            verify[c, c * each] = least + (most - draft[c] - least) * (each - 1) / BLOCK_SIZE
    return CostTable.from_points(verify, draft, facts={"machine": "vLLM pull request 52362"})


def _draft_part(whole: list[float], plain: list[float]) -> list[float]:
    share = np.full(len(whole), _PUBLISHED_DRAFT_SHARE * whole[0])
    return [float(min(ms, w - p)) for ms, w, p in zip(share, whole, plain, strict=True)]


def _known(source: str) -> TargetFacts:
    return TargetFacts.from_config(source, KNOWN_CONFIGS[source])


MACHINES: Mapping[str, Callable[[], CostTable]] = {
    "qwen3-8b-h100": lambda: Roofline(_known("Qwen/Qwen3-8B")).costs(),
    "qwen3-14b-h100": lambda: Roofline(_known("Qwen/Qwen3-14B")).costs(),
    "llama3.1-8b-h100": lambda: Roofline(_known("meta-llama/Llama-3.1-8B-Instruct")).costs(),
    "llama3.1-70b-4xh100": lambda: Roofline(TargetFacts.from_config("Llama-3.1-70B", _LLAMA_70B), 4).costs(),
    "deepseek-v4-mi350": published_costs,
}
"""Cost tables by name."""


def machine_costs(name: str) -> CostTable:
    """A machine's costs.

    Raises:
        SpecError: no such machine.
    """
    if name not in MACHINES:
        raise SpecError(f"no machine {name!r} to simulate", expected=f"one of {', '.join(MACHINES)}")
    return MACHINES[name]()
