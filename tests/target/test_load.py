"""Finding, identifying and loading a target; whatever is wrong with it is a TargetError."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftline.errors import TargetError
from draftline.spec import TargetSpec
from draftline.target.fingerprint import locate_target, target_fingerprint
from draftline.target.load import Target, load_target, prepare_target


@pytest.fixture
def copy(tiny_target: Path, tmp_path: Path) -> Path:
    """A copy of the tiny target that a test may damage."""
    return shutil.copytree(tiny_target, tmp_path / "target")


def spec(folder: Path) -> TargetSpec:
    return TargetSpec(source=str(folder))


def test_what_is_loaded(loaded_target: Target, tiny_target: Path) -> None:
    assert loaded_target.eos_token_ids == (loaded_target.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert loaded_target.vocab_size == len(loaded_target.tokenizer)
    assert loaded_target.lm_head_VD is loaded_target.embedding_VD
    assert loaded_target.max_context == 1024
    assert loaded_target.fingerprint == target_fingerprint(spec(tiny_target))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_dtype_of_the_spec_or_of_the_caller(tiny_target: Path, dtype: str) -> None:
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    by_spec = load_target(TargetSpec.model_validate({"source": str(tiny_target), "dtype": dtype}))
    by_caller = load_target(spec(tiny_target), dtype=dtype)
    assert by_spec.dtype == by_caller.dtype == by_spec.embedding_VD.dtype == wanted


def test_the_fingerprint_follows_weights_config_and_tokenizer(copy: Path) -> None:
    seen = {target_fingerprint(spec(copy))}
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    seen.add(target_fingerprint(spec(copy)))
    for name in ("config.json", "tokenizer.json"):
        document = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps({**document, "note": 1}))
        seen.add(target_fingerprint(spec(copy)))
    assert len(seen) == 4
    (copy / "README.md").write_text("a note is not the model")
    assert target_fingerprint(spec(copy)) in seen


def test_the_fingerprint_reads_both_ends_of_large_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = bytearray(3 << 20)
    seen = set()
    for changed in ([], [0], [0, len(data) - 1]):
        for place in changed:
            data[place] = 1
        (tmp_path / "model.safetensors").write_bytes(data)
        seen.add(target_fingerprint(spec(tmp_path)))
    assert len(seen) == 3


def test_the_fingerprint_does_not_depend_on_the_place(copy: Path, tiny_target: Path) -> None:
    assert target_fingerprint(spec(copy)) == target_fingerprint(spec(tiny_target))


def test_a_hub_id_is_known_by_id_and_revision() -> None:
    ids = [TargetSpec(source="a/b"), TargetSpec(source="a/c"), TargetSpec(source="a/b", revision="x")]
    assert len({target_fingerprint(each) for each in ids}) == 3
    assert locate_target(ids[0]).hub_id == "a/b"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no-such-package-here", "pip install no-such-package-here"),
        ("package:json", "no GGUF"),
        ("./nowhere", "does not exist"),
        ("nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
    ],
)
def test_what_cannot_be_found(source: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load_target(TargetSpec(source=source))


def test_what_a_killed_conversion_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "a_target_for_tests"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(package.parent)
    source = TargetSpec(source="package:a-target-for-tests")
    targets = tmp_path / "cache" / "targets"
    converted = targets / target_fingerprint(source)[:20]
    left = targets / ".converting-abc"
    for folder in (converted, left):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert prepare_target(source, cache_dir=tmp_path / "cache") == converted
    assert (converted / "config.json").exists() and not left.exists()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def poor_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def no_layer(folder: Path) -> None:
    _without(folder, "model.layers.1.mlp.up_proj.weight")


def no_embedding(folder: Path) -> None:
    _without(folder, "model.embed_tokens.weight")


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [no_config, broken_config, poor_config, no_weights, cut_weights, no_layer, no_embedding, no_tokenizer],
)
def test_a_damaged_directory_is_a_target_error(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy)
    with pytest.raises(TargetError) as caught:
        load_target(spec(copy)).model  # noqa: B018
    assert caught.value.remedy or caught.value.expected
