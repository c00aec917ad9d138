"""Other ways of decoding, one user at a time: ``transformers``, the same with prompt lookup, and llama.cpp."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.llama_peer import LlamaPeer, LlamaServer, write_gguf
from draftline.spec import TargetSpec
from draftline.target.chat import chat_ids
from draftline.target.load import load_target

CONTEXT = 1024
MAX_USERS = 16
BATCH_CONTEXT = 256
BATCH_STEPS = 12
_LOOKUP_TOKENS = 10


@dataclass
class PeerRates:
    """Tokens per second after the first token.

    Attributes:
        one_user: By contender, one entry a prompt.
        batched: llama.cpp by number of sequences, all together.
        served: llama.cpp's server by number of users, all together, one entry a round.
    """

    one_user: dict[str, list[float]] = field(default_factory=dict)
    batched: dict[int, float] = field(default_factory=dict)
    served: dict[int, list[float]] = field(default_factory=dict)

    def add(self, name: str, tokens_per_s: float) -> None:
        """Add one prompt's speed."""
        self.one_user.setdefault(name, []).append(tokens_per_s)

    def to_markdown(self) -> str:
        """Medians, and the median of ours over each, prompt by prompt."""
        names = list(self.one_user)
        ours = self.one_user.get("Draftline, async", [])
        lines = ["| one user | tokens/s | ours over it |", "| --- | ---: | ---: |"]
        for name in names:
            rates = self.one_user[name]
            ratio = statistics.median(a / b for a, b in zip(ours, rates, strict=False)) if ours else float("nan")
            lines.append(f"| {name} | {statistics.median(rates):.1f} | {ratio:.2f}x |")
        return "\n".join(lines)


class Peers:
    """The contenders, loaded once; a context manager.

    Args:
        target: What all of them run.
        scratch: For the GGUF file.
        llama_python: Interpreter with llama-cpp-python; ``None`` leaves llama.cpp's library out.
        llama_server: llama.cpp's ``llama-server``; ``None`` leaves it out.
        threads: CPU threads of each.

    Attributes:
        server_url: Root of llama.cpp's server.
    """

    def __init__(
        self, target: TargetSpec, scratch: Path, llama_python: str | None, llama_server: str | None, threads: int
    ) -> None:
        from transformers import AutoModelForCausalLM

        loaded = load_target(target)
        self._tokenizer = loaded.tokenizer
        self._thinking = loaded.enable_thinking
        self._llama: LlamaPeer | None = None
        self._server: LlamaServer | None = None
        self.server_url: str | None = None
        file = scratch / "target.gguf"
        if llama_python is not None or llama_server is not None:
            write_gguf(loaded, file)
        if llama_python is not None:
            self._llama = LlamaPeer(llama_python, file, context=CONTEXT, sequences=MAX_USERS, threads=threads)
        if llama_server is not None:
            self._server = LlamaServer(llama_server, file, context=CONTEXT, sequences=MAX_USERS, threads=threads)
            self.server_url = self._server.url
        torch.set_num_threads(threads)
        self._model: Any = AutoModelForCausalLM.from_pretrained(loaded.folder, dtype=loaded.dtype).eval()

    def __enter__(self) -> Peers:
        with ExitStack() as ending:
            if self._llama is not None:
                ending.callback(self._llama.close)
            if self._server is not None:
                ending.enter_context(self._server)
            self._ending = ending.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.close()

    def measure(self, messages: Sequence[dict[str, str]], num_tokens: int, rates: PeerRates) -> None:
        """Let every peer continue a conversation by so many tokens, and add its speed."""
        ids = chat_ids(self._tokenizer, messages, enable_thinking=self._thinking)
        rates.add("transformers", self._transformers(ids, num_tokens))
        rates.add(
            "transformers, prompt lookup", self._transformers(ids, num_tokens, prompt_lookup_num_tokens=_LOOKUP_TOKENS)
        )
        if self._llama is not None:
            _, seconds = self._llama.generate(list(ids), num_tokens)
            rates.add("llama.cpp, bf16", (num_tokens - 1) / seconds)

    def batched(self, sequences: Sequence[int]) -> dict[int, float]:
        """llama.cpp's tokens per second with so many sequences in one batch, at a context of 256."""
        found: dict[int, float] = {}
        if self._llama is None:
            return found
        for count in sequences:
            self._llama.prepare(BATCH_CONTEXT, count)
            times = []
            for _ in range(BATCH_STEPS):
                started = time.perf_counter()
                self._llama.step(BATCH_CONTEXT, count, 1)
                times.append(time.perf_counter() - started)
            found[count] = count / statistics.median(times)
        return found

    def _transformers(self, ids: Sequence[int], num_tokens: int, **options: int) -> float:
        inputs = torch.tensor([list(ids)])
        seconds = []
        # One token costs the prompt; the rest is decoding.
        for limit in (1, num_tokens):
            started = time.perf_counter()
            self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=limit,
                min_new_tokens=limit,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
            seconds.append(time.perf_counter() - started)
        return (num_tokens - 1) / max(seconds[1] - seconds[0], 1e-9)
