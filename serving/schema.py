"""Request and response documents of the OpenAI surface.

Unsupported fields are refused by name: a silently ignored field is an answer
to a question nobody asked. Fields that SDKs send by habit are accepted as
long as their value asks for nothing (``frequency_penalty: 0``).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from draftline.engine.requests import MAX_TOP_LOGPROBS

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_CHOICES = 4
MAX_PROMPTS = 16
MAX_MESSAGES = 1024
MAX_PARTS = 256
MAX_FIELDS = 100
DEFAULT_COMPLETION_TOKENS = 16
"""What ``/v1/completions`` generates without ``max_tokens``, as at OpenAI."""

NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "metadata": (None, {}),
    "min_p": (None, 0),
    "parallel_tool_calls": (None,),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
}
"""Unsupported fields, with the values under which they ask for nothing."""


_Item = TypeVar("_Item")

FailFastList = Annotated[list[_Item], Field(fail_fast=True)]
"""Gives up at its first wrong item: every branch of a union is tried, and a long list would make millions of errors."""


class Strict(BaseModel):
    """Base of request parts: no unknown key, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        # One error is made for every unknown field; megabytes of them would become gigabytes of errors.
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"at most {MAX_FIELDS} fields are allowed in one object, got {len(value)}")
        return value


class StreamOptions(Strict):
    """Options of a streamed answer.

    Attributes:
        include_usage: End with a chunk that holds usage and speculation statistics.
        include_token_origin: Say of every token whether it was drafted (:class:`StreamOrigins`); not OpenAI's.
    """

    include_usage: bool = False
    include_token_origin: bool = False


class TextPart(BaseModel):
    """One text part of a message; its number of fields is bounded by the message, at a tenth of the cost."""

    model_config = Strict.model_config

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation; only text is understood."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | FailFastList[TextPart]

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_extras(cls, value: object) -> object:
        # The official SDK returns assistant messages with these keys set to null; people send them back as they are.
        empty = {"refusal", "tool_calls", "function_call", "audio", "annotations"}
        if isinstance(value, dict):
            return {k: v for k, v in value.items() if not (k in empty and v in (None, []))}
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _few_parts(cls, content: object) -> object:
        if isinstance(content, list):
            if len(content) > MAX_PARTS:
                raise ValueError(f"at most {MAX_PARTS} parts are allowed in one message, got {len(content)}")
            for part in content:
                if isinstance(part, dict) and len(part) > MAX_FIELDS:
                    raise ValueError(f"at most {MAX_FIELDS} fields are allowed in one object, got {len(part)}")
        return content

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA: dict[str, Any] = {
    "anyOf": [
        _STOP_STRING,
        {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS},
        {"type": "null"},
    ]
}
"""What the validator of ``stop`` checks in words of its own."""


class SamplingFields(Strict):
    """What both endpoints understand.

    Attributes:
        model: Name as listed by ``/v1/models``.
        max_tokens: Most tokens of each answer.
        temperature: 0 is greedy.
        top_p: Nucleus mass in (0, 1].
        top_k: Keep the k likeliest tokens; 0 or -1 keeps all.
        n: Independent answers per prompt.
        seed: Repeats a sampled answer; answer i of several uses seed + i.
        stop: Up to four strings that end the answer and are not part of it.
        stream: Send the answer as it comes.
        ignore_eos: Keep generating past the model's end token.
        min_tokens: Neither end tokens nor stop strings end the answer earlier.
        user: Accepted for compatibility; not stored.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str | FailFastList[str] | None, Field(json_schema_extra=_STOP_SCHEMA)] = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        neutral = {name: values for name, values in NEUTRAL_VALUES.items() if name not in cls.model_fields}
        return {k: v for k, v in value.items() if not (k in neutral and _is_one_of(v, neutral[k]))}

    @field_validator("stop")
    @classmethod
    def _stop_bounds(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed, got {len(strings)}")
        for text in strings:
            if not 1 <= len(text) <= MAX_STOP_CHARS:
                raise ValueError(f"a stop string must have 1 to {MAX_STOP_CHARS} characters, got {len(text)}")
        return stop

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        if self.limit is not None and self.min_tokens > self.limit:
            raise ValueError(f"min_tokens={self.min_tokens} is above the token limit of {self.limit}")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens per answer that the client asked for."""
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are reported."""
        return False

    @property
    def num_top_logprobs(self) -> int:
        """How many of the likeliest tokens are reported at each place."""
        return 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage_chunk(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_origins(self) -> bool:
        """Whether chunks say where their tokens came from."""
        return self.stream_options is not None and self.stream_options.include_token_origin


class ChatRequest(SamplingFields):
    """Body of ``POST /v1/chat/completions``.

    Attributes:
        messages: The conversation so far.
        max_completion_tokens: Newer name of ``max_tokens``.
        logprobs: Report the target's log-probability of each chosen token.
        top_logprobs: How many of the likeliest tokens to report at each place, with ``logprobs``.
        store: Whether the server may keep the request, redacted, to train drafts on.
    """

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    store: bool | None = None

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def limit(self) -> int | None:
        """See :attr:`SamplingFields.limit`."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """See :attr:`SamplingFields.wants_logprobs`."""
        return bool(self.logprobs)

    @property
    def num_top_logprobs(self) -> int:
        """See :attr:`SamplingFields.num_top_logprobs`."""
        return self.top_logprobs or 0


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``.

    Attributes:
        prompt: A text, token ids, or a list of either.
        logprobs: 0 reports the chosen tokens' log-probabilities, a number as many of the likeliest tokens too,
            ``null`` none.
    """

    prompt: str | FailFastList[str] | FailFastList[int] | FailFastList[FailFastList[int]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @field_validator("prompt")
    @classmethod
    def _prompt_bounds(cls, prompt: Any) -> Any:
        if isinstance(prompt, list):
            if not prompt:
                raise ValueError("must not be empty")
            if not isinstance(prompt[0], int) and len(prompt) > MAX_PROMPTS:
                raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed in one request, got {len(prompt)}")
        return prompt

    @property
    def limit(self) -> int | None:
        """See :attr:`SamplingFields.limit`."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """See :attr:`SamplingFields.wants_logprobs`."""
        return self.logprobs is not None

    @property
    def num_top_logprobs(self) -> int:
        """See :attr:`SamplingFields.num_top_logprobs`."""
        return self.logprobs or 0

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


def _is_one_of(value: object, accepted: tuple[object, ...]) -> bool:
    # False == 0 in Python; a boolean penalty is a mistake worth reporting.
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in accepted)


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SpeculationMetrics(BaseModel):
    """Speculation of one request, in vLLM's shape.

    Attributes:
        mean_acceptance_length: Tokens per verify step, bonus included.
        draft_acceptance_rate: Accepted share of the drafted tokens.
        acceptance_histogram: Entry n counts verify steps that accepted n drafts.
        num_spec_steps: Verify steps with at least one draft token.
        num_accepted_draft_tokens: Accepted draft tokens.
        num_draft_tokens: Verified draft tokens.
        num_spec_tokens: Block size, the most draft tokens of one step.
    """

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int


class RequestMetrics(BaseModel):
    """Root of the ``metrics`` field."""

    speculative_decoding: SpeculationMetrics


class TopLogprob(BaseModel):
    """Log-probability of one token under the target.

    Attributes:
        token: Its text.
        logprob: Natural logarithm; temperature 1, nothing cut off.
        bytes: UTF-8 bytes, ``None`` for a token that is no whole character.
    """

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The same of a chosen token.

    Attributes:
        top_logprobs: The likeliest tokens at its place, likeliest first, as many as were asked for.
    """

    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat answer or chunk."""

    content: list[TokenLogprob]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion or chunk.

    Attributes:
        top_logprobs: The likeliest tokens at each place by their text, where they were asked for.
        text_offset: Characters before each token, counting tokens as decoded one
            by one.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None = None
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """The assistant message of a choice."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class Sparse(BaseModel):
    """Base of documents that leave out what they do not have, instead of saying ``null``."""

    @model_serializer(mode="wrap")
    def _drop_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class ChatDelta(Sparse):
    """What a chunk adds; the role comes with the first."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """One answer's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionChoice(BaseModel):
    """One completion, whole or a chunk of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class TokenOrigin(BaseModel):
    """Where one streamed token came from.

    Attributes:
        text: What became visible with this token; the texts of a chunk's tokens add up to the chunk's text.
        origin: ``draft``, accepted by the target, or ``target``, its own token after the accepted ones.
        position: Place in what its step emitted, from 0.
        num_drafted: Draft tokens that the step verified; 0 for a step without a draft.
        logprob: Under the target; natural logarithm, temperature 1, nothing cut off.
    """

    text: str
    origin: Literal["draft", "target"]
    position: int
    num_drafted: int
    logprob: float


class StreamOrigins(BaseModel):
    """The ``draftline`` field of a chunk, sent on ``stream_options.include_token_origin`` alone."""

    tokens: list[TokenOrigin]


class Envelope(Sparse):
    """Common root of answers and chunks."""

    id: str
    created: int
    model: str
    usage: Usage | None = None
    metrics: RequestMetrics | None = None
    draftline: StreamOrigins | None = None


class ChatResponse(Envelope):
    """Answer of ``POST /v1/chat/completions``."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Envelope):
    """One chunk of a streamed chat answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class CompletionResponse(Envelope):
    """Answer, or one chunk, of ``POST /v1/completions``."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ModelCard(BaseModel):
    """One entry of ``GET /v1/models``.

    Attributes:
        max_model_len: Prompt plus answer tokens of one request.
        draft: The draft in use, for example ``support-desk/3``.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "draftline"
    max_model_len: int
    draft: str | None


class ModelList(BaseModel):
    """Answer of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
