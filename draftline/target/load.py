"""Load a target: files, tokenizer, config and the forward that runs it."""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftline.cache_dir import default_cache_dir
from draftline.errors import TargetError
from draftline.spec import TargetSpec
from draftline.target.fingerprint import TargetFiles, locate_target, target_fingerprint
from draftline.target.forward import TargetModel
from draftline.target.general import load_general
from draftline.target.general_config import Forward, choose_config
from draftline.target.hardware import preferred_dtype
from draftline.target.lean import LeanModel, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_UNFINISHED = ".converting-"


@dataclass
class Target:
    """A loaded target.

    Attributes:
        folder: Its Hugging Face directory (converted, for GGUF sources).
        fingerprint: See :func:`draftline.target.fingerprint.target_fingerprint`.
        config: The facts of its architecture.
        tokenizer: Its own tokenizer with chat template.
        eos_token_ids: Tokens that end an answer.
        dtype: Of the weights and of all arithmetic.
        weights: State dict by Hugging Face names, emptied of the layers once
            :attr:`model` has packed them. Of a target that transformers runs, only
            what drafts read: embeddings, LM head and final norm.
        enable_thinking: How conversations are written for it; see
            :func:`draftline.target.chat.chat_ids`.
        loaded_model: The forward where it is loaded with the target.
    """

    folder: Path
    fingerprint: str
    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    weights: dict[str, Tensor]
    enable_thinking: bool = False
    loaded_model: TargetModel | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head."""
        return self.config.vocab_size

    @property
    def max_context(self) -> int:
        """Positions the target was trained for."""
        return self.config.max_positions

    @property
    def embedding_VD(self) -> Tensor:
        """Input embeddings."""
        return self.weights["model.embed_tokens.weight"]

    @property
    def lm_head_VD(self) -> Tensor:
        """Output projection (the embeddings when tied).

        Raises:
            TargetError: the target's logits are more than a product with a matrix.
        """
        head = self.weights.get("lm_head.weight")
        if head is None and self.config.forward == "transformers":
            raise TargetError(
                f"no draft can use the LM head of target family {self.config.family!r}",
                expected="logits that are a scaled product of the last hidden state with one matrix",
                remedy="Set serving.proposer to prompt_lookup, which needs no trained draft",
            )
        return self.embedding_VD if head is None else head

    @cached_property
    def model(self) -> TargetModel:
        """The forward; a lean one is built at first use."""
        return self.loaded_model or LeanModel(self.config, self.weights, self.dtype)


def resolve_dtype(name: str) -> torch.dtype:
    """``bf16``, ``fp32`` or ``auto`` (what this machine multiplies faster)."""
    return DTYPES[preferred_dtype() if name == "auto" else name]


def resolve_device(name: str) -> torch.device:
    """``cpu``, ``cuda``, ``cuda:1`` ..., or ``auto`` (CUDA where there is a device)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_target(
    spec: TargetSpec,
    *,
    cache_dir: Path | None = None,
    dtype: str | None = None,
    forward: Forward = "auto",
    device: str = "cpu",
) -> Target:
    """Load a target for inference.

    Args:
        spec: Which, and in what dtype.
        cache_dir: Where converted GGUF targets are kept; the user's cache by default.
        dtype: Overrides ``spec.dtype`` (fp32 for exactness proofs).
        forward: Which forward runs it; ``auto`` takes the lean one where it knows the family.
        device: See :func:`resolve_device`.

    Raises:
        TargetError: not found, not downloadable here, or of an unsupported family.
    """
    folder = prepare_target(spec, cache_dir=cache_dir)
    config_document = _read_json(folder / "config.json")
    config = _model_config(folder, config_document, forward)
    torch_dtype, torch_device = resolve_dtype(dtype or spec.dtype), resolve_device(device)
    model: TargetModel | None = None
    if config.forward == "transformers":
        model = general = load_general(folder, config, torch_dtype, torch_device)
        weights = general.ends()
    else:
        weights = _read_weights(folder, torch_dtype, torch_device)
    tokenizer = _read_tokenizer(folder)
    return Target(
        folder,
        target_fingerprint(spec),
        config,
        tokenizer,
        _eos_ids(folder, config_document),
        torch_dtype,
        weights,
        enable_thinking=spec.enable_thinking,
        loaded_model=model,
    )


def load_config(spec: TargetSpec, *, cache_dir: Path | None = None, forward: Forward = "auto") -> ModelConfig:
    """The facts of a target's architecture, without its weights.

    Raises:
        TargetError: see :func:`load_target`.
    """
    folder = prepare_target(spec, cache_dir=cache_dir)
    return _model_config(folder, _read_json(folder / "config.json"), forward)


def _model_config(folder: Path, document: dict[str, Any], forward: Forward) -> ModelConfig:
    try:
        return choose_config(document, forward)
    except KeyError as error:
        raise TargetError(f"{folder}/config.json lacks {error}", remedy="Save the model with save_pretrained") from None


def prepare_target(spec: TargetSpec, *, cache_dir: Path | None = None) -> Path:
    """Make sure a Hugging Face directory of the target exists here; returns it.

    GGUF packages are converted once (about 20 s) and kept by fingerprint;
    hub ids are downloaded by ``huggingface_hub``.

    Raises:
        TargetError: see :func:`load_target`.
    """
    files = locate_target(spec)
    if files.hub_id is not None:
        return _download(files.hub_id, spec.revision)
    assert files.folder is not None
    if files.gguf_file is None:
        return files.folder
    root = cache_dir or default_cache_dir()
    folder = root / "targets" / target_fingerprint(spec)[:20]
    with _locked(root / "targets"):
        _remove_unfinished(root / "targets")
        if not (folder / "config.json").is_file():
            _convert_gguf(files, folder)
    return folder


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean "not to be had"
        raise TargetError(
            f"target {hub_id!r} cannot be downloaded ({type(error).__name__})",
            got=str(error).splitlines()[0][:200],
            remedy="Check the id and the network, or download it elsewhere and set target.source to the directory",
        ) from None


def _convert_gguf(files: TargetFiles, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert files.folder is not None and files.gguf_file is not None
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            files.folder, gguf_file=files.gguf_file, dtype=torch.float32, low_cpu_mem_usage=True
        )
        tokenizer = AutoTokenizer.from_pretrained(files.folder, gguf_file=files.gguf_file)
    except (OSError, ImportError, ValueError) as error:
        raise TargetError(f"cannot read GGUF target {files.gguf_file}: {error}") from None
    # save_pretrained refuses a model that still remembers its quantisation.
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer = None
    # Weights are kept in bf16, so that bf16 and fp32 runs use the very same numbers.
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_UNFINISHED))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed conversion left; whoever converts holds the lock, so nobody is at work there."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="ascii") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _read_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise TargetError(
            f"no weights in {folder}", expected="*.safetensors files", remedy="Save the model with save_pretrained"
        )
    weights: dict[str, Tensor] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as handle:
                for stored in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if (name := _text_name(stored)) is not None:
                        weights[name] = handle.get_tensor(stored).to(device, dtype)
        except SafetensorError as error:
            raise TargetError(f"{shard} is damaged ({error})", remedy="Copy or download the model again") from None
    missing = {"model.embed_tokens.weight", "model.norm.weight"} - set(weights)
    if missing:
        raise TargetError(f"target weights lack {sorted(missing)[0]!r}", remedy="Check the model directory")
    return weights


def _text_name(stored: str) -> str | None:
    """A weight's name in a text model; ``None`` for a multimodal model's weights that text does not need."""
    for wrapped in ("model.language_model.", "language_model.model."):
        if stored.startswith(wrapped):
            return "model." + stored.removeprefix(wrapped)
    if stored.startswith("language_model.lm_head."):
        return stored.removeprefix("language_model.")
    is_text = stored.startswith(("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head."))
    return stored if is_text else None


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise TargetError(
            f"no usable tokenizer in {folder} ({type(error).__name__})",
            expected="tokenizer.json and tokenizer_config.json",
            remedy="Save the target's tokenizer there with save_pretrained",
        ) from None
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TargetError(f"{path} is damaged ({error})", remedy="Save the model with save_pretrained") from None
    if not isinstance(document, dict):
        raise TargetError(f"{path} is no model configuration", got=type(document).__name__, expected="a JSON object")
    return document


def _eos_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    ids: list[int] = []
    generation = folder / "generation_config.json"
    sources = [_read_json(generation)] if generation.is_file() else []
    for document in [*sources, config]:
        value = document.get("eos_token_id")
        ids.extend(value if isinstance(value, list) else [value] if value is not None else [])
    return tuple(dict.fromkeys(ids))
