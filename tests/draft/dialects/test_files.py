"""Checkpoint folders as such: shards, damage, pickles, and telling dialects apart."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from draftline.draft.checkpoint import load_folder
from draftline.draft.dialects import deepspec, speculators
from draftline.draft.dialects.files import CheckpointFiles, read_folder_files
from draftline.draft.dialects.registry import READABLE, detect_dialect, read_files
from draftline.errors import FormatError
from tests.draft.dialects.cases import (
    CONFIGS,
    TARGET,
    changed,
    deepspec_folder,
    draft,
    files_of,
    same,
    write_folder,
)
from tests.draft.dialects.test_nested import model_optimizer, specforge


def shard(folder: Path) -> Path:
    """Split the weights in two files with an index, as large checkpoints are."""
    tensors = dict(read_folder_files(folder).tensors)
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("name", ["vanilla", "rnn, pruned"])
def test_every_readable_folder_is_loaded_alike(name: str, tmp_path: Path) -> None:
    model = draft(name, with_frozen=True)
    written = speculators.write(model, TARGET)
    assert same(load_folder(deepspec_folder(tmp_path / "d", model)), model)
    assert same(load_folder(write_folder(tmp_path / "s", written.document, written.tensors)), model)
    assert same(load_folder(shard(deepspec_folder(tmp_path / "sharded", model))), model)


def test_a_foreign_checkpoint_that_names_a_local_target_needs_no_help(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    facts = {"num_hidden_layers": 6, "hidden_size": 32, "vocab_size": 61}
    (tmp_path / "target" / "config.json").write_text(json.dumps({"text_config": facts}))
    files = files_of(speculators.write(draft("vanilla"), TARGET))
    algorithm = {**files.document["speculators_config"], "verifier": {"name_or_path": str(tmp_path / "target")}}
    foreign = changed(files, draftline=None, speculators_config=algorithm)
    assert load_folder(write_folder(tmp_path / "draft", foreign.document, foreign.tensors)).config == CONFIGS["vanilla"]
    (tmp_path / "target" / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="how many layers"):
        load_folder(tmp_path / "draft")


def test_dialects_are_told_apart() -> None:
    model = draft("vanilla")
    made = {
        "deepspec": files_of(deepspec.write(model)),
        "speculators": files_of(speculators.write(model, TARGET)),
        "specforge": specforge("vanilla"),
        "model-optimizer": model_optimizer("vanilla"),
    }
    assert {name: detect_dialect(files) for name, files in made.items()} == {name: name for name in READABLE}
    assert all(same(read_files(files)[0], model) for files in made.values())


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, r"\['LlamaFor.*looks like a target"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "Of Eagle3 drafts"),
        ({"architectures": ["DeepseekV4ForCausalLM"], "dspark_block_size": 7}, "bundled with its target"),
        ({"model_type": "medusa"}, "got model_type medusa.*Point to a draft"),
        ({"a": 1, "b": 2}, "got config.json with a, b"),
        ({}, "with no fields"),
    ],
)
def test_a_foreign_config_is_named(document: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_files(CheckpointFiles("somewhere", document, {}))


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    folder = deepspec_folder(tmp_path / "draft", draft("vanilla"))
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FormatError, match=r"pickled weights.*pytorch_model\.bin"):
        load_folder(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_named(keep: int, tmp_path: Path) -> None:
    folder = deepspec_folder(tmp_path / "draft", draft("vanilla"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"model\.safetensors is damaged"):
        load_folder(folder)


def break_index(folder: Path, **weight_map: str) -> None:
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    document["weight_map"] |= weight_map
    path.write_text(json.dumps(document))


def test_damage_of_shards_is_named(tmp_path: Path) -> None:
    folder = shard(deepspec_folder(tmp_path / "draft", draft("vanilla")))
    break_index(folder, other="gone.safetensors")
    with pytest.raises(FormatError, match=r"no gone\.safetensors"):
        load_folder(folder)
    break_index(folder, other="../draft/model-00001-of-00002.safetensors")
    with pytest.raises(FormatError, match="none of the folder"):
        load_folder(folder)
    save_file({"fc.weight": torch.zeros(1)}, folder / "twice.safetensors")
    break_index(folder, other="twice.safetensors")
    with pytest.raises(FormatError, match=r"fc\.weight is in two weight files"):
        load_folder(folder)
    for text in ("{", "[]", "{}", '{"weight_map": {}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(FormatError, match=r"index\.json"):
            load_folder(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    folder = deepspec_folder(tmp_path / "draft", draft("vanilla"))
    (folder / "config.json").write_text(text)
    with pytest.raises(FormatError, match=r"config\.json"):
        load_folder(folder)


def tensors_with(name: str, value: torch.Tensor) -> CheckpointFiles:
    files = files_of(deepspec.write(draft("vanilla, pruned")))
    return CheckpointFiles(files.origin, files.document, {**files.tensors, name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.0.self_attn.q_proj.bias", torch.zeros(32), "does not speak of; got layers.0.self_attn.q_proj.bias"),
        ("fc.weight", torch.zeros(32, 96, dtype=torch.float8_e4m3fn), r"fc\.weight has a type.*quantisation"),
        ("d2t", torch.zeros(14), "d2t has a type.*expected int64"),
        ("t2d", torch.zeros(61, dtype=torch.uint8), "t2d has a type.*expected bool"),
        ("t2d", torch.arange(61) < 14, "d2t and t2d do not name the same tokens"),
        ("embed_tokens.weight", torch.zeros(60, 32), r"embed_tokens\.weight has another shape"),
        ("lm_head.weight", torch.zeros(61, 32), r"lm_head\.weight has another shape"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_files(tensors_with(name, value))


def test_the_targets_tensors_that_only_a_training_needs_are_passed_over() -> None:
    files = tensors_with("verifier_lm_head.weight", torch.zeros(3))
    assert same(read_files(files)[0], draft("vanilla, pruned"))


def test_a_mapping_beside_a_whole_vocabulary_must_map_nothing() -> None:
    files = files_of(deepspec.write(draft("vanilla")))
    mapping = {"d2t": torch.zeros(61, dtype=torch.int64), "t2d": torch.ones(61, dtype=torch.bool)}
    whole = CheckpointFiles(files.origin, files.document, {**files.tensors, **mapping})
    assert same(read_files(whole)[0], draft("vanilla"))
    mapping["d2t"][3] = 1
    with pytest.raises(FormatError, match="d2t maps columns"):
        read_files(CheckpointFiles(files.origin, files.document, {**files.tensors, **mapping}))
