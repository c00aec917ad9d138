"""llama.cpp as a peer: a target's weights as a bf16 GGUF file, and a process that times its steps.

llama.cpp is run through ``llama-cpp-python``, installed in an environment of
its own (``pip install llama-cpp-python==0.3.36 numpy`` builds it in minutes);
its interpreter is named by ``--llama-python``. This file runs there too, as
the worker, with nothing of Draftline's.

Usage: ``python -m benchmarks.llama_peer --output target.gguf`` writes the file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from draftline.target.load import Target


def write_gguf(target: Target, path: Path, *, pre_tokenizer: str = "smollm") -> None:
    """Write a Llama-like target's stored weights as bf16 GGUF, in the layout of llama.cpp's converter.

    Args:
        target: Just loaded: the layers' weights must not be packed yet.
        path: Written whole or not at all.
        pre_tokenizer: llama.cpp's name for how the target's tokenizer splits text.
    """
    import gguf

    config = target.config
    temporary = path.with_suffix(".tmp")
    writer = gguf.GGUFWriter(temporary, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, target, pre_tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for name, weight in target.weights.items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        if stored is None:
            raise SystemExit(f"no GGUF name for {name}")
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _interleaved(weight, config.head_dim)
        if weight.dim() == 1:
            writer.add_tensor(stored, weight.float().numpy())
        else:
            bits = weight.bfloat16().view(dtype=_torch().int16).contiguous().numpy()
            writer.add_tensor(stored, bits.view("uint8"), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.rename(path)


class LlamaPeer:
    """A worker process with llama.cpp.

    Args:
        python: Interpreter that has ``llama_cpp``.
        model: GGUF file.
        context: Positions a sequence.
        sequences: At most.
        threads: To compute with.
    """

    def __init__(self, python: str, model: Path, *, context: int, sequences: int, threads: int) -> None:
        sizes = [str(n) for n in (context, sequences, threads)]
        command = [python, str(Path(__file__).resolve()), "--worker", str(model), *sizes]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def prepare(self, context: int, sequences: int) -> None:
        """Fill so many sequences with a context."""
        self._ask(do="prepare", context=context, sequences=sequences)

    def step(self, context: int, sequences: int, tokens: int) -> None:
        """Decode ``tokens`` tokens of every prepared sequence, logits of all; the context stays as it was."""
        self._ask(do="step", context=context, sequences=sequences, tokens=tokens)

    def generate(self, prompt_ids: list[int], tokens: int) -> tuple[list[int], float]:
        """Greedy continuation of so many tokens, and the seconds it took after the prompt."""
        answer = self._ask(do="generate", prompt=prompt_ids, tokens=tokens)
        return answer["ids"], answer["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _ask(self, **question: object) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp's process ended; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class LlamaServer:
    """llama.cpp's own server (``llama-server``), continuous batching and prompt cache as it comes; a context manager.

    Args:
        program: Path of ``llama-server``; the source package of llama-cpp-python holds what builds it.
        model: GGUF file.
        context: Positions a sequence.
        sequences: Decoded at once, at most.
        threads: To compute with.
    """

    def __init__(self, program: str, model: Path, *, context: int, sequences: int, threads: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        sizes = {"-c": context * sequences, "-np": sequences, "-t": threads, "--port": port}
        options = [str(part) for pair in sizes.items() for part in pair]
        self._log = model.with_suffix(".server.log")
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    [program, "-m", str(model), "--host", "127.0.0.1", *options], stdout=log, stderr=log
                )
            except OSError as error:
                raise SystemExit(
                    f"--llama-server {program!r} cannot be run: {error.strerror}; see benchmarks/README.md for a build"
                ) from error

    def __enter__(self) -> LlamaServer:
        deadline_s = time.monotonic() + 60
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self._end()
                said = self._log.read_text(errors="replace").splitlines()[-10:]
                raise SystemExit("\n".join(["llama-server did not start within a minute; it said last:", *said]))
            time.sleep(0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def _end(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


def _torch() -> Any:
    import torch

    return torch


def _interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a rotary projection in llama.cpp's order: pairs side by side, not half by half."""
    heads = weight.shape[0] // head_dim
    return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)


def _add_tokenizer(writer: Any, target: Target, pre_tokenizer: str) -> None:
    import gguf

    document = json.loads((target.folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {entry["id"] for entry in document["added_tokens"] if entry["special"]}
    by_id = {index: token for token, index in target.tokenizer.get_vocab().items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(target.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    kinds = gguf.TokenType
    writer.add_token_types(
        [
            kinds.CONTROL if i in special else kinds.NORMAL if i in by_id else kinds.UNUSED
            for i in range(target.vocab_size)
        ]
    )
    merges = document["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(target.eos_token_ids[0])
    writer.add_add_bos_token(False)
    if template := getattr(target.tokenizer, "chat_template", None):
        writer.add_chat_template(template)


# -- the worker, which runs in llama.cpp's environment ---------------------------------------------------------------


class _Worker:
    def __init__(self, model: str, context: int, sequences: int, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        # Its messages name every tensor several times.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), model_options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context * sequences
        options.n_seq_max = sequences
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prepare(self, context: int, sequences: int) -> None:
        self._api.llama_memory_clear(self._memory, True)
        for sequence in range(sequences):
            ids = list(range(100, 100 + context))
            for first in range(0, context, 512):
                part = ids[first : first + 512]
                self._decode([(token, first + i, sequence, False) for i, token in enumerate(part)])

    def step(self, context: int, sequences: int, tokens: int) -> None:
        self._decode([(100 + i, context + i, sequence, True) for sequence in range(sequences) for i in range(tokens)])
        logits = self._logits(sequences * tokens)
        logits.argmax(-1)
        for sequence in range(sequences):
            self._api.llama_memory_seq_rm(self._memory, sequence, context, -1)

    def generate(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        self._api.llama_memory_clear(self._memory, True)
        self._decode([(token, i, 0, i == len(prompt) - 1) for i, token in enumerate(prompt)])
        ids: list[int] = []
        started = 0.0
        while True:
            ids.append(int(self._logits(1).argmax()))
            if len(ids) == 1:
                started = time.perf_counter()
            if len(ids) == tokens:
                return ids, time.perf_counter() - started
            self._decode([(ids[-1], len(prompt) + len(ids) - 1, 0, True)])

    def _logits(self, rows: int) -> Any:
        import numpy as np

        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (rows, self._vocabulary))

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = self._api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, has_logits) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = has_logits
        code = self._api.llama_decode(self._context, batch)
        self._api.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode gave {code}")


def _serve(arguments: list[str]) -> None:
    model, *sizes = arguments
    worker = _Worker(model, *(int(size) for size in sizes))
    for line in sys.stdin:
        question = json.loads(line)
        match question.pop("do"):
            case "prepare":
                worker.prepare(**question)
                answer: dict[str, object] = {}
            case "step":
                worker.step(**question)
                answer = {}
            case _:
                ids, seconds = worker.generate(question["prompt"], question["tokens"])
                answer = {"ids": ids, "seconds": seconds}
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Write the demo target, or the one in a directory, as GGUF."""
    from draftline.spec import TargetSpec
    from draftline.target.load import load_target

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="target.source; the demo's by default")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    spec = TargetSpec(source=arguments.target) if arguments.target else TargetSpec()
    write_gguf(load_target(spec, dtype="fp32"), arguments.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _serve(sys.argv[2:])
    else:
        main()
