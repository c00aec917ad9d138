"""Any decoder of transformers over a slot KV cache, by transformers' own forward.

The model runs as one row of flattened tokens with explicit positions. Our
attention function, registered with transformers, stores the row's keys and
values in the slots and attends per segment, so requests never see each other.
Linear layers, norms, experts, scales and caps are the model's own code.

A load ends with a self-check: logits of a ragged step must equal those of the
model's own attention, or the target is refused.

Dimension letters: N tokens, D hidden, V vocabulary, H query heads, K key
heads, E head size of keys, F head size of values, L taps, R slots of a
segment, Q queries a slot, T key positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from draftline.errors import TargetError
from draftline.target.batch import Chunk, Segment, StepBatch, build_batch
from draftline.target.config import ModelConfig
from draftline.target.kv_cache import SlotKVCache
from draftline.target.lean import TargetOutput, attend, within_window

ATTENTION = "draftline_slots"
"""Name of our attention function in transformers."""

_CHECKED_TOKENS = 12
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Mean difference of logits over their spread; a wrong mask or position gives about 1."""


@dataclass
class _Step:
    """What the attention layers of a model read while a step runs.

    Attributes:
        batch: The step.
        cache: Keys and values; ``None`` outside of steps.
        windows: The segments as layers with a window see them, by its width.
        shapes: Key heads and head size of each layer that was called, in the order of calls.
        window_by_layer: Windows that the configuration knows and the model does not pass on.
    """

    batch: StepBatch | None = None
    cache: SlotKVCache | None = None
    windows: dict[int, list[Segment]] = field(default_factory=dict)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)
    window_by_layer: dict[int, int] = field(default_factory=dict)


class GeneralModel:
    """A transformers model behind the interface of :class:`draftline.target.lean.LeanModel`.

    Args:
        config: Facts of the target.
        model: A causal language model, loaded with any attention; it is changed: its attention becomes ours.

    Raises:
        TargetError: its attention cannot be replaced, or gives other logits than its own.
    """

    def __init__(self, config: ModelConfig, model: Any) -> None:
        self.config = config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        model.eval().requires_grad_(False)
        _check_class(model)
        self._base: Any = (
            model.base_model.get_decoder() if hasattr(model.base_model, "get_decoder") else model.base_model
        )
        self._step = _Step(window_by_layer=_windows(model.config.get_text_config(decoder=True)))
        self._hooks = _LayerHooks(_decoder_layers(self._base, config))
        own_logits = _own_logits(model, config, self.device)
        _take_attention(model, self._step)
        self._shapes = self._probe()
        self._embeddings, self._output = model.get_input_embeddings(), model.get_output_embeddings()
        self._head = _Head(model)
        self._check(own_logits)

    # -- what drafts need ---------------------------------------------------------------------------------------

    def ends(self) -> dict[str, Tensor]:
        """Embeddings, LM head and the final norm's scale, by the names that a Llama gives them.

        The LM head holds whatever factor the model applies to its logits; without the matrices that drafts read,
        entries are left out.
        """
        found = {"model.embed_tokens.weight": self._embeddings.weight.detach()}
        factor = self._logit_factor()
        if factor is not None:
            weight = self._output.weight.detach()
            found["lm_head.weight"] = weight if factor == 1.0 else weight * factor
        found["model.norm.weight"] = self._norm_scale() - self.config.family_facts.norm_offset
        return found

    def _logit_factor(self) -> float | None:
        """Logits over the plain product with the head; ``None`` where they are more than a scaled product."""
        head = self._output
        if head is None or getattr(head, "bias", None) is not None or head.weight.shape[1] != self.config.hidden_size:
            return None
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, self.config.hidden_size, generator=generator).to(self.device, self.dtype)
        with torch.inference_mode():
            plain, found = (hidden @ head.weight.T).float(), self.logits(hidden).float()
        if (cap := self.config.logit_softcap) is not None:
            found = torch.atanh((found / cap).clamp(-0.999999, 0.999999)) * cap
        factor = float((plain * found).sum() / plain.square().sum())
        is_scaled = float((found - factor * plain).abs().mean()) < 0.02 * float(found.abs().mean())
        return (1.0 if abs(factor - 1.0) < 1e-3 else factor) if is_scaled else None

    def _norm_scale(self) -> Tensor:
        """What the final norm multiplies by, seen on a vector that a norm without a scale leaves alone."""
        norms = [
            m for m in self._base.children() if not isinstance(m, nn.ModuleList) and "norm" in type(m).__name__.lower()
        ]
        flat = torch.ones(1, self.config.hidden_size, device=self.device, dtype=self.dtype)
        flat[:, ::2] = -1.0
        with torch.inference_mode():
            return (norms[-1](flat) * flat)[0].clone() if norms else flat[0].abs()

    # -- the forward --------------------------------------------------------------------------------------------

    def new_cache(self, num_slots: int, num_positions: int) -> SlotKVCache:
        """A KV cache of this model's shape."""
        heads, sizes = [heads for heads, _ in self._shapes], [size for _, size in self._shapes]
        return SlotKVCache(len(heads), num_slots, num_positions, heads, sizes, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: SlotKVCache, tap_ids: Sequence[int] = ()) -> TargetOutput:
        """Run the tokens of a step, appending their keys and values to ``cache``.

        Args:
            batch: The step.
            cache: Read and extended.
            tap_ids: Layers whose output is wanted; -1 is what the first layer reads.
        """
        with self._hooks.collecting(tap_ids) as taps:
            hidden = self._run(batch, cache)
        stacked = [taps[layer][0] for layer in sorted(taps)]
        empty = hidden.new_empty(hidden.shape[0], 0, self.config.hidden_size)
        return TargetOutput(hidden, torch.stack(stacked, 1) if stacked else empty)

    @torch.inference_mode()
    def _run(self, batch: StepBatch, cache: SlotKVCache | None) -> Tensor:
        step = self._step
        step.batch, step.cache, step.windows = batch, cache, {}
        try:
            output = self._base(
                input_ids=batch.token_ids_N[None], position_ids=batch.positions_N[None], use_cache=False
            )
        finally:
            step.batch = step.cache = None
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Next-token logits ``[N, V]`` of post-norm hidden states, by the model's own head."""
        return self._head(hidden_ND)

    def score(self, logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token of every row, and the log-sum-exp of its logits in fp32; ``[N]`` each."""
        return logits_NV.argmax(-1), logits_NV.float().logsumexp(-1)

    # -- the self-check -----------------------------------------------------------------------------------------

    def _probe(self) -> list[tuple[int, int]]:
        """Key heads and head size of every layer, as a forward of one token shows them."""
        count = self.config.num_layers
        self._run(build_batch([Chunk(0, 0, [0])], 1, self.dtype, self.device), None)
        called = [layer for layer, _, _ in self._step.shapes]
        if sorted(called) != list(range(count)):
            raise TargetError(
                f"target family {self.config.family!r} cannot be run: not every layer is attention over its own keys",
                got=f"{len(called)} calls of attention in {count} layers",
                expected="one call a layer",
                remedy="Choose another target",
            )
        shapes = {layer: (heads, size) for layer, heads, size in self._step.shapes}
        return [shapes[layer] for layer in range(count)]

    def _check(self, own_VN: Tensor) -> None:
        """Compare a ragged step over slots with the model's own attention."""
        tokens = _checked_tokens(self.config)
        cache = self.new_cache(2, _CHECKED_TOKENS)
        found = []
        half = _CHECKED_TOKENS // 2 + 1
        for chunks in (
            [Chunk(0, 0, tokens[::-1][:3]), Chunk(1, 0, tokens[:half])],
            [Chunk(0, 3, tokens[::-1][3:4]), Chunk(1, half, tokens[half:])],
        ):
            batch = build_batch(chunks, cache.num_positions, self.dtype, self.device)
            rows = len(chunks[0].token_ids)
            found.append(self.logits(self.forward(batch, cache).hidden_ND)[rows:].float())
        difference = float((torch.cat(found) - own_VN).abs().mean() / own_VN.std())
        if not difference < _TOLERANCE.get(self.dtype, 0.1):
            raise TargetError(
                f"target family {self.config.family!r} cannot be run: over slots it gives other logits than by itself",
                got=f"a mean difference of {difference:.2g} of the logits' spread",
                expected="round-off",
                remedy="Choose another target, or serve this one with an engine that knows it",
            )


def load_general(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> GeneralModel:
    """Load a target for transformers' own forward; only code that transformers ships is run.

    Raises:
        TargetError: the weights cannot be read, or see :class:`GeneralModel`.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise TargetError(
            f"transformers cannot load the target in {folder} ({type(error).__name__})",
            got=str(error).splitlines()[0][:200],
            remedy="Save the model with save_pretrained",
        ) from None
    return GeneralModel(config, model.to(device))


class _Head:
    """The model's head with whatever it does to logits: the causal model with its decoder taken out."""

    def __init__(self, model: Any) -> None:
        self._model = model
        setattr(model, model.base_model_prefix, _Passed())

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        output: Tensor = self._model(inputs_embeds=hidden_ND[None], use_cache=False).logits
        return output[0]


class _Passed(nn.Module):
    """Stands in for a decoder: its last hidden state is what it is given."""

    @property
    def decoder(self) -> _Passed:
        """For models that keep their decoder one level deeper."""
        return self

    def forward(self, *args: object, inputs_embeds: Tensor, **kwargs: object) -> _PassedOutput:
        """Give the hidden states back."""
        return _PassedOutput(inputs_embeds)


class _PassedOutput:
    """A decoder's output with a last hidden state and nothing else, whatever it is asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


class _LayerHooks:
    """Collects outputs of decoder layers while asked to."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._wanted: frozenset[int] = frozenset()
        self._found: dict[int, Tensor] = {}
        layers[0].register_forward_pre_hook(self._before_first, with_kwargs=True)
        for index, layer in enumerate(layers):
            layer.register_forward_hook(self._after(index))

    def collecting(self, tap_ids: Sequence[int]) -> _LayerHooks:
        """Used as a context manager; gives the outputs by layer."""
        self._wanted, self._found = frozenset(tap_ids), {}
        return self

    def __enter__(self) -> dict[int, Tensor]:
        return self._found

    def __exit__(self, *error: object) -> None:
        self._wanted = frozenset()

    def _before_first(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if -1 in self._wanted:
            self._found[-1] = args[0] if args else kwargs["hidden_states"]

    def _after(self, index: int) -> Any:
        def note(module: nn.Module, args: object, output: Any) -> None:
            if index in self._wanted:
                self._found[index] = output if isinstance(output, Tensor) else output[0]

        return note


def _check_class(model: Any) -> None:
    is_stateful = bool(getattr(type(model), "_is_stateful", False))
    if is_stateful or not model._can_set_attn_implementation():
        raise TargetError(
            f"target family {model.config.model_type!r} cannot be run: "
            + ("it keeps state beside keys and values" if is_stateful else "its attention cannot be replaced"),
            expected="a model that attends through transformers' attention interface",
            remedy="Choose another target",
        )


def _take_attention(model: Any, step: _Step) -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _slot_attention)
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if getattr(module, "layer_idx", None) is not None:
            module.draftline_step = step


def _decoder_layers(base: Any, config: ModelConfig) -> list[nn.Module]:
    for module in base.children():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_layers:
            return list(module)
    raise TargetError(
        f"target family {config.family!r} cannot be run: its decoder layers are not to be found",
        expected=f"a list of {config.num_layers} layers",
        remedy="Choose another target",
    )


def _windows(text: Any) -> dict[int, int]:
    kinds, window = getattr(text, "layer_types", None) or (), getattr(text, "sliding_window", None)
    return {layer: int(window) for layer, kind in enumerate(kinds) if kind == "sliding_attention" and window}


def _checked_tokens(config: ModelConfig) -> list[int]:
    return [(3 + 7919 * place) % config.vocab_size for place in range(_CHECKED_TOKENS)]


@torch.inference_mode()
def _own_logits(model: Any, config: ModelConfig, device: torch.device) -> Tensor:
    ids = torch.tensor([_checked_tokens(config)], device=device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].float()


def _slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, for one row of tokens: ``[1, heads, N, size]`` in, ``[1, N, H, F]`` out.

    Args:
        module: The attention layer; knows its index and the step.
        query: Queries, rotated.
        key: Keys, rotated.
        value: Values.
        attention_mask: Always ``None``: none is made for our name.
        scaling: Of the logits.
        sliding_window: Positions that a query sees, its own included.
        softcap: Logits become ``c * tanh(logits / c)``.
        s_aux: A further logit per head that takes its share of the softmax (gpt-oss).
        kwargs: What other implementations need.
    """
    step: _Step = module.draftline_step
    batch, cache, layer = step.batch, step.cache, module.layer_idx
    assert batch is not None
    q_NHE, k_NKE, v_NKF = (x[0].transpose(0, 1) for x in (query, key, value))
    num_tokens, num_heads, size = q_NHE.shape
    width = v_NKF.shape[-1]
    if cache is None:
        # The probe: nothing is stored yet, and a single token sees itself alone.
        step.shapes.append((layer, k_NKE.shape[1], size))
        return v_NKF.repeat_interleave(num_heads // v_NKF.shape[1], 1)[None], None
    if width < size:
        # Keys and values lie side by side; of latent attention, values are narrower.
        v_NKF = nn.functional.pad(v_NKF, (0, size - width))
    cache.append(layer, batch.cache_index_N, torch.cat([k_NKE, v_NKF], 1))
    window = sliding_window or step.window_by_layer.get(layer)
    segments: Sequence[Segment] = batch.segments
    if window is not None:
        if window not in step.windows:
            step.windows[window] = [within_window(segment, window) for segment in segments]
        segments = step.windows[window]
    if softcap is None and s_aux is None:
        out = attend(q_NHE, cache, layer, segments, scaling)
    else:
        out = _attend_stepwise(q_NHE, cache, layer, segments, (scaling, softcap, s_aux))
    return out.view(1, num_tokens, num_heads, size)[..., :width], None


def _attend_stepwise(
    q_NHE: Tensor,
    cache: SlotKVCache,
    layer: int,
    segments: Sequence[Segment],
    law: tuple[float | None, float | None, Tensor | None],
) -> Tensor:
    """The same as :func:`draftline.target.lean.attend` for logits that are capped or have a sink."""
    scaling, softcap, sinks_H = law
    num_tokens, num_heads, size = q_NHE.shape
    group = num_heads // cache.heads(layer)
    out = q_NHE.new_empty(num_tokens, num_heads, size)
    for segment in segments:
        keys, values = cache.view(layer, segment.first_slot, segment.num_slots, segment.length)
        q_RHQE = q_NHE[segment.gather_RQ].transpose(1, 2)
        logits = (
            q_RHQE @ keys.repeat_interleave(group, 1).transpose(-1, -2) * (size**-0.5 if scaling is None else scaling)
        )
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits + segment.mask_RQT
        if sinks_H is not None:
            sinks = sinks_H.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sinks.to(logits.dtype)], -1)
        weights = logits.float().softmax(-1).to(q_NHE.dtype)[..., : segment.length]
        attended = (weights @ values.repeat_interleave(group, 1)).transpose(1, 2)
        out[segment.tokens_M] = attended.reshape(-1, num_heads, size)[segment.scatter_M]
    return out.view(num_tokens, num_heads * size)
