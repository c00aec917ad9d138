"""From validated requests to running generations: prompts, limits, sampling."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import jinja2

from draftline.engine.requests import EngineRequest, SamplingParams
from draftline.errors import TargetError
from serving.capture.capture import TrafficCapture
from serving.errors import BadRequest, ContextTooLong, NotReady, UnknownModel
from serving.generation import Generation
from serving.schema import (
    ChatRequest,
    CompletionRequest,
    ModelCard,
    RequestMetrics,
    SamplingFields,
    SpeculationMetrics,
    Usage,
)
from serving.worker import EngineWorker

SHORT_CHARS = 16_384
"""A text up to here is tokenised in a few milliseconds."""


class TextModel(Protocol):
    """What the HTTP side needs of the target: its tokenizer and its limits."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def max_token_chars(self) -> int:
        """Characters of the longest token: a longer text has more tokens than one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a raw prompt, with the target's own leading tokens."""
        ...

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Ids of a conversation under the target's chat template, ready for the assistant's turn."""
        ...

    def decode(self, ids: Sequence[int], /) -> str:
        """Text of ids, special tokens left out, spaces as they are."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one token, special tokens spelled out."""
        ...


@dataclass(frozen=True)
class ServiceInfo:
    """Facts about what is served.

    Attributes:
        model_name: Name that clients use.
        max_context: Prompt plus answer tokens.
        num_spec_tokens: Block size of the draft, 0 without one.
        draft: Name of the draft in use, for example ``support-desk/3``.
        created: Unix time at which serving began.
        policy: How much of a block is verified, as the spec names it.
    """

    model_name: str
    max_context: int
    num_spec_tokens: int = 0
    draft: str | None = None
    created: int = 0
    policy: str = ""


@dataclass(frozen=True)
class Job:
    """A running request and what its response must repeat."""

    id: str
    created: int
    model: str
    num_prompt_tokens: int
    generation: Generation


class CompletionService:
    """Starts generations for both endpoints.

    Args:
        worker: The engine loop.
        text: Tokenizer of the target.
        info: What is served; replaced by :meth:`set_draft` when the draft changes.
        capture: Keeps a sample of the chats as prompts; ``None`` keeps nothing.
    """

    def __init__(
        self, worker: EngineWorker, text: TextModel, info: ServiceInfo, capture: TrafficCapture | None = None
    ) -> None:
        self.worker = worker
        self.text = text
        self.info = info
        self.capture = capture
        # Long prompts take tens of milliseconds to tokenise; streams of others must not stutter meanwhile, nor
        # short prompts wait behind them.
        self._short, self._long = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"draftline-tokenize-{kind}")
            for kind in ("short", "long")
        )

    def set_draft(self, draft: str | None, num_spec_tokens: int) -> None:
        """Record which draft is in use from now on."""
        self.info = replace(self.info, draft=draft, num_spec_tokens=num_spec_tokens)

    def close(self) -> None:
        """Stop the worker, the tokenising threads, and the capture after it has written what it holds."""
        self.worker.stop()
        if self.capture is not None:
            self.capture.close()
        for pool in (self._short, self._long):
            pool.shutdown(wait=False, cancel_futures=True)

    def model_card(self) -> ModelCard:
        """The served model as ``/v1/models`` shows it."""
        info = self.info
        return ModelCard(id=info.model_name, created=info.created, max_model_len=info.max_context, draft=info.draft)

    async def start_chat(self, request: ChatRequest) -> Job:
        """Admit a chat request.

        Raises:
            ServingError: what the client should be told.
        """
        self._check(request)
        if request.store and self.capture is None:
            raise BadRequest(
                "'store': true is not supported by this server, which keeps no requests. Remove it", param="store"
            )
        num_chars = sum(len(m.text) for m in request.messages)
        self._check_length(num_chars, "messages")
        messages = [
            {"role": m.role if m.role != "developer" else "system", "content": m.text} for m in request.messages
        ]
        prompt = await self._tokenize(partial(self._encode_chat, messages), num_chars)
        job = self._start("chatcmpl", request, [prompt])
        if self.capture is not None:
            self.capture.offer(job.id, [(m["role"], m["content"]) for m in messages], store=request.store)
        return job

    async def start_completion(self, request: CompletionRequest) -> Job:
        """Admit a completion request; errors as :meth:`start_chat`."""
        self._check(request)
        prompts = []
        for prompt in request.prompts:
            if isinstance(prompt, str):
                self._check_length(len(prompt), "prompt")
                prompts.append(await self._tokenize(partial(self.text.encode, prompt), len(prompt)))
            else:
                prompts.append(self._check_ids(prompt))
        return self._start("cmpl", request, prompts)

    def usage(self, job: Job) -> Usage:
        """Token counts of a job so far."""
        completion = job.generation.num_completion_tokens
        return Usage(
            prompt_tokens=job.num_prompt_tokens,
            completion_tokens=completion,
            total_tokens=job.num_prompt_tokens + completion,
        )

    def metrics(self, job: Job) -> RequestMetrics:
        """Speculation statistics of a job so far."""
        stats = job.generation.speculation
        num_spec_tokens = max(self.info.num_spec_tokens, len(stats.accepted_histogram) - 1, 0)
        histogram = stats.accepted_histogram + [0] * (num_spec_tokens + 1 - len(stats.accepted_histogram))
        rate = stats.num_accepted_tokens / stats.num_draft_tokens if stats.num_draft_tokens else 0.0
        return RequestMetrics(
            speculative_decoding=SpeculationMetrics(
                mean_acceptance_length=stats.mean_accepted_length,
                draft_acceptance_rate=rate,
                acceptance_histogram=histogram,
                num_spec_steps=stats.num_spec_steps,
                num_accepted_draft_tokens=stats.num_accepted_tokens,
                num_draft_tokens=stats.num_draft_tokens,
                num_spec_tokens=num_spec_tokens,
            )
        )

    def _check(self, request: SamplingFields) -> None:
        if request.model != self.info.model_name:
            raise UnknownModel(
                f"The model '{request.model}' is not served here; use '{self.info.model_name}'", param="model"
            )
        if not self.worker.is_healthy:
            raise NotReady("The engine is not running; try again shortly")
        self.worker.check_room()

    def _check_length(self, num_chars: int, param: str) -> None:
        """Refuse what cannot fit before tokenising it, which takes a thread that all requests share."""
        most = self.info.max_context * self.text.max_token_chars
        if num_chars > most:
            raise ContextTooLong(
                f"This model's maximum context length is {self.info.max_context} tokens, which is at most {most} "
                f"characters, but the request has {num_chars}. Shorten it",
                param=param,
            )

    async def _tokenize(self, work: Callable[[], list[int]], num_chars: int) -> list[int]:
        pool = self._short if num_chars <= SHORT_CHARS else self._long
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            return self.text.encode_chat(messages)
        except jinja2.TemplateError as error:
            raise BadRequest(f"The model's chat template refuses these messages: {error}", param="messages") from None
        except TargetError as error:
            raise BadRequest(str(error), param="messages") from None

    def _check_ids(self, ids: list[int]) -> list[int]:
        if len(ids) >= self.info.max_context:
            raise self._too_long(len(ids), " and an answer needs at least 1", "prompt")
        bad = next((i for i in ids if not 0 <= i < self.text.vocab_size), None)
        if bad is not None:
            raise BadRequest(
                f"Token id {bad} is outside the model's vocabulary of {self.text.vocab_size}", param="prompt"
            )
        return ids

    def _start(self, prefix: str, request: SamplingFields, prompts: list[list[int]]) -> Job:
        job_id = f"{prefix}-{secrets.token_hex(12)}"
        sequences: list[EngineRequest] = []
        for prompt in prompts:
            sampling = self._sampling(request, len(prompt))
            for number in range(request.n or 1):
                # Random generators take no negative seeds; distinct seeds stay distinct.
                seed = None if request.seed is None else (request.seed + number) % 2**64
                sequences.append(
                    EngineRequest(f"{job_id}-{len(sequences)}", tuple(prompt), replace(sampling, seed=seed))
                )
        ticket = self.worker.submit(sequences)
        generation = Generation(self.worker, ticket, self.text, request.stop_strings)
        return Job(job_id, int(time.time()), self.info.model_name, sum(map(len, prompts)), generation)

    def _sampling(self, request: SamplingFields, num_prompt_tokens: int) -> SamplingParams:
        limit, room = request.limit, self.info.max_context - num_prompt_tokens
        if num_prompt_tokens == 0:
            raise BadRequest("The prompt has no tokens; send some text", param="prompt")
        if room < 1 or (limit is not None and limit > room):
            wanted = f" plus {limit} for the answer" if limit is not None else " and an answer needs at least 1"
            param = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise self._too_long(num_prompt_tokens, wanted, param)
        max_tokens = room if limit is None else limit
        if request.min_tokens > max_tokens:
            raise BadRequest(
                f"min_tokens={request.min_tokens} is above the {max_tokens} tokens left", param="min_tokens"
            )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_temperature(request.temperature),
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(request.top_k or 0, 0),
            ignore_eos=request.ignore_eos,
            min_tokens=request.min_tokens,
            has_logprobs=request.wants_logprobs or request.wants_origins,
            num_top_logprobs=request.num_top_logprobs,
        )

    def _too_long(self, num_prompt_tokens: int, wanted: str, param: str) -> ContextTooLong:
        return ContextTooLong(
            f"This model's maximum context length is {self.info.max_context} tokens, but the prompt has "
            f"{num_prompt_tokens}{wanted}. Shorten the prompt or lower max_tokens",
            param=param,
        )


def _temperature(asked: float | None) -> float:
    # Below this the law is greedy in any float arithmetic, and dividing by it would overflow (vLLM has the same limit).
    return 1.0 if asked is None else 0.0 if asked < 1e-5 else asked
