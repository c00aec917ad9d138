"""``draftline convert``: what it writes, what it proves, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from draftline.draft import compare
from draftline.draft import convert as module
from draftline.draft.checkpoint import load_folder
from draftline.draft.compare import compare_drafts
from draftline.draft.convert import Conversion, convert_checkpoint
from draftline.draft.dialects.files import CheckpointFiles, read_folder_files
from draftline.draft.dialects.model import DraftModel
from draftline.draft.dialects.registry import WRITABLE
from draftline.errors import DraftlineError, FormatError, InputError, NoSpace, SpecError, StorageError, TargetError
from pipelines.cli import app
from pipelines.convert_command import DialectName
from tests.draft.dialects.cases import CONFIGS, changed, deepspec_folder, draft, same, speculators_files, write_folder
from tests.draft.dialects.test_nested import model_optimizer, specforge

CONVERTIBLE = [
    "vanilla",
    "gated",
    "rnn, pruned",
    "dflash",
    "vanilla, no confidence",
    "gated, confidence without markov",
]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A target's folder as far as a conversion reads it, weights in two shards."""
    return make_target(tmp_path / "target")


def make_target(folder: Path, seed: int = 3) -> Path:
    folder.mkdir()
    facts = {"num_hidden_layers": 6, "hidden_size": 32, "vocab_size": 61, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], **facts}))
    generator = torch.Generator().manual_seed(seed)
    embedding, head = (torch.randn(61, 32, generator=generator, dtype=torch.bfloat16) for _ in range(2))
    save_file({"model.embed_tokens.weight": embedding}, folder / "model-00001-of-00002.safetensors")
    save_file({"lm_head.weight": head}, folder / "model-00002-of-00002.safetensors")
    return folder


def head_of(target: Path) -> torch.Tensor:
    return load_file(target / "model-00002-of-00002.safetensors")["lm_head.weight"]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_there_and_back_gives_equal_bytes(name: str, tmp_path: Path, target: Path) -> None:
    source = deepspec_folder(tmp_path / "a", replace(draft(name), max_positions=None))
    there, back, again = tmp_path / "b", tmp_path / "deep" / "c", tmp_path / "d"
    done = convert_checkpoint(Conversion(source, there, "speculators", str(target)))
    assert done.found == "deepspec" and done.difference.is_equal and done.difference.logits == 0
    assert (done.difference.confidence == 0) if CONFIGS[name].enable_confidence_head else True
    first, last = load_folder(source), convert_checkpoint(Conversion(there, back, "deepspec", str(target)))
    assert last.found == "speculators"
    second = load_folder(back)
    assert second.config == first.config
    # The source did not say how long sequences may be; the target does.
    assert (first.max_positions, second.max_positions) == (None, 4096)
    assert not compare_drafts(first, replace(second, frozen={})).tensors
    convert_checkpoint(Conversion(back, again, "speculators", str(target)))
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (there / file).read_bytes()


@pytest.mark.parametrize("make", [specforge, model_optimizer])
def test_imported_layouts_are_written_in_either_dialect(
    make: Callable[[str], CheckpointFiles], tmp_path: Path, target: Path
) -> None:
    files = make("rnn")
    source = write_folder(tmp_path / "theirs", files.document, files.tensors)
    for dialect in ("deepspec", "speculators"):
        convert_checkpoint(Conversion(source, tmp_path / dialect, dialect, str(target)))
        assert same(load_folder(tmp_path / dialect), draft("rnn"))


def test_the_target_is_named_and_asked(tmp_path: Path, target: Path) -> None:
    foreign = changed(speculators_files("vanilla"), draftline=None)
    source = write_folder(tmp_path / "theirs", foreign.document, foreign.tensors)
    with pytest.raises(FormatError, match="how many layers"):
        convert_checkpoint(Conversion(source, tmp_path / "b", "deepspec"))
    convert_checkpoint(Conversion(source, tmp_path / "b", "deepspec", str(target)))
    assert load_folder(tmp_path / "b").config == CONFIGS["vanilla"]
    done = convert_checkpoint(Conversion(tmp_path / "b", tmp_path / "c", "speculators", str(target)))
    document = read_folder_files(tmp_path / "c").document
    assert document["speculators_config"]["verifier"] == {
        "name_or_path": str(target),
        "architectures": ["Qwen3ForCausalLM"],
    }
    assert document["transformer_layer_config"]["max_position_embeddings"] == 4096
    assert done.warnings == ()


@pytest.mark.parametrize("dialect", ["deepspec", "speculators"])
def test_with_frozen_the_targets_tensors_are_copied(dialect: str, tmp_path: Path, target: Path) -> None:
    source = deepspec_folder(tmp_path / "a", draft("vanilla, pruned"))
    done = convert_checkpoint(Conversion(source, tmp_path / "b", dialect, str(target), with_frozen=True))
    written = load_folder(tmp_path / "b")
    assert not [line for line in done.warnings if "with-frozen" in line]
    kept = written.weights["d2t"] + torch.arange(14)
    assert written.frozen["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(written.frozen["lm_head.weight"], head_of(target)[kept])
    assert written.frozen["embed_tokens.weight"].shape == (61, 32)
    # What a checkpoint carries stays in it, and is compared with the target that is named.
    convert_checkpoint(Conversion(tmp_path / "b", tmp_path / "c", dialect, str(target)))
    assert same(load_folder(tmp_path / "c"), written)
    other = make_target(tmp_path / "other", seed=4)
    with pytest.raises(TargetError, match="carries another"):
        convert_checkpoint(Conversion(tmp_path / "b", tmp_path / "d", dialect, str(other)))


def test_a_tied_target_lends_its_embeddings_as_the_head(tmp_path: Path, target: Path) -> None:
    (target / "model-00002-of-00002.safetensors").unlink()
    source = deepspec_folder(tmp_path / "a", draft("vanilla"))
    convert_checkpoint(Conversion(source, tmp_path / "b", "deepspec", str(target), with_frozen=True))
    frozen = load_folder(tmp_path / "b").frozen
    assert torch.equal(frozen["lm_head.weight"], frozen["embed_tokens.weight"])


@pytest.mark.parametrize(
    ("name", "needed"),
    [("vanilla, pruned", {"lm_head.weight"}), ("eagle3", {"lm_head.weight", "embed_tokens.weight"}), ("gated", set())],
)
def test_what_speculators_needs_of_the_target_comes_along(
    name: str, needed: set[str], tmp_path: Path, target: Path
) -> None:
    source = deepspec_folder(tmp_path / "a", draft(name))
    if needed:
        with pytest.raises(SpecError, match="copies of the target's tensors"):
            convert_checkpoint(Conversion(source, tmp_path / "b", "speculators"))
    convert_checkpoint(Conversion(source, tmp_path / "b", "speculators", str(target)))
    assert load_folder(tmp_path / "b").frozen.keys() == needed


def nothing_left(folder: Path, *expected: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(expected)


def test_a_destination_is_only_replaced_by_force(tmp_path: Path) -> None:
    source = deepspec_folder(tmp_path / "a", draft("vanilla"))
    taken = deepspec_folder(tmp_path / "b", draft("gated"))
    request = Conversion(source, taken, "speculators")
    with pytest.raises(InputError, match=r"is not empty.*--force"):
        convert_checkpoint(request)
    assert load_folder(taken).config.markov_head == "gated"
    convert_checkpoint(replace(request, force=True))
    assert load_folder(taken).config.markov_head == "vanilla"
    (taken / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"more than a checkpoint.*README\.md"):
        convert_checkpoint(replace(request, force=True))
    assert (taken / "README.md").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    convert_checkpoint(replace(request, destination=tmp_path / "empty"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        convert_checkpoint(replace(request, destination=tmp_path / "file", force=True))
    with pytest.raises(InputError, match="source itself"):
        convert_checkpoint(replace(request, destination=source, force=True))
    assert nothing_left(tmp_path, "a", "b", "empty", "file")


@pytest.mark.parametrize("name", ["fc.weight", "norm.weight", "markov_head.markov_w2.weight"])
def test_what_was_written_wrongly_takes_no_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of one weight, on its way to the file."""
    render = module.render_files

    def flipped(document: dict[str, object], tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
        damaged = tensors[name].clone()
        damaged.view(torch.int32).flatten()[0] ^= 1
        return render(document, {**tensors, name: damaged})

    monkeypatch.setattr(module, "render_files", flipped)
    source = deepspec_folder(tmp_path / "a", draft("vanilla"))
    taken = deepspec_folder(tmp_path / "b", draft("gated"))
    with pytest.raises(FormatError, match=f"not the draft that was read.*{name}"):
        convert_checkpoint(Conversion(source, taken, "speculators", force=True))
    assert load_folder(taken).config.markov_head == "gated"
    assert nothing_left(tmp_path, "a", "b")


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EACCES, StorageError)]
)
def test_a_full_disk_leaves_what_was_there(
    code: int, kind: type[DraftlineError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(code, "cannot")

    monkeypatch.setattr(module, "_write_synced", full)
    source = deepspec_folder(tmp_path / "a", draft("vanilla"))
    taken = deepspec_folder(tmp_path / "b", draft("gated"))
    with pytest.raises(kind, match="cannot be written"):
        convert_checkpoint(Conversion(source, taken, "deepspec", force=True))
    assert load_folder(taken).config.markov_head == "gated"
    assert nothing_left(tmp_path, "a", "b")


def test_a_failure_between_the_two_renames_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, place: Path) -> Path:
        if self.name == "new":
            raise OSError(errno.EIO, "cannot")
        return rename(self, place)

    monkeypatch.setattr(Path, "rename", failing)
    source = deepspec_folder(tmp_path / "a", draft("vanilla"))
    taken = deepspec_folder(tmp_path / "b", draft("gated"))
    with pytest.raises(StorageError):
        convert_checkpoint(Conversion(source, taken, "deepspec", force=True))
    assert load_folder(taken).config.markov_head == "gated"
    assert nothing_left(tmp_path, "a", "b")


@pytest.mark.parametrize(("field", "value"), [("num_hidden_layers", 7), ("hidden_size", 64), ("vocab_size", 62)])
def test_another_target_is_refused(field: str, value: int, tmp_path: Path, target: Path) -> None:
    document = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**document, field: value}))
    source = deepspec_folder(tmp_path / "a", draft("vanilla"))
    with pytest.raises(TargetError, match="made for another target"):
        convert_checkpoint(Conversion(source, tmp_path / "b", "speculators", str(target)))


def test_requests_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    source = deepspec_folder(tmp_path / "a", draft("vanilla"))
    with pytest.raises(InputError, match="needs to know the target"):
        convert_checkpoint(Conversion(source, tmp_path / "b", "deepspec", with_frozen=True))
    with pytest.raises(SpecError, match="'specforge' cannot be written"):
        convert_checkpoint(Conversion(source, tmp_path / "b", "specforge"))


def differing(**fields: object) -> DraftModel:
    model = draft("vanilla")
    return replace(model, config=replace(model.config, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"rms_norm_eps": 1e-3}, {"rope_theta": 1e4}, {"block_size": 3}])
def test_the_comparison_sees_a_config_that_says_something_else(fields: dict[str, object]) -> None:
    difference = compare_drafts(draft("vanilla"), differing(**fields))
    assert difference.tensors == ()
    assert difference.logits > 1e-4 and difference.confidence is not None and difference.confidence > 1e-4
    assert not difference.is_equal


def test_the_comparison_sees_a_single_bit_and_a_type() -> None:
    one, other = draft("vanilla"), draft("vanilla")
    assert compare_drafts(one, other).is_equal
    other.weights["norm.weight"][0] = -0.0
    one.weights["norm.weight"][0] = 0.0
    assert compare_drafts(one, other).tensors == ("norm.weight",)
    half = replace(one, weights={**one.weights, "fc.weight": one.weights["fc.weight"].bfloat16()})
    assert compare_drafts(one, half).tensors == ("fc.weight",)
    bits = half.weights["fc.weight"].view(torch.float16)
    assert compare_drafts(half, replace(half, weights={**half.weights, "fc.weight": bits})).tensors == ("fc.weight",)
    added = draft("vanilla", with_frozen=True)
    assert compare_drafts(draft("vanilla"), added).tensors == ("embed_tokens.weight", "lm_head.weight")


def test_a_vocabulary_beyond_the_sample_of_columns_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MAX_COLUMNS", 10)
    for name in ("vanilla", "rnn, pruned", "dflash"):
        assert compare_drafts(draft(name), draft(name)).is_equal


def test_the_command_says_what_it_read_wrote_and_compared(tmp_path: Path, target: Path) -> None:
    source = deepspec_folder(tmp_path / "a", draft("gated"))
    arguments = ["convert", str(source), str(tmp_path / "b"), "--to", "speculators", "--target", str(target)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        f"Read {source}: deepspec, dspark, vocabulary whole",
        f"Wrote {tmp_path / 'b'}: speculators",
        "Compared on random inputs: weights equal bit by bit; greatest difference of logits 0.0, "
        "of confidence logits 0.0",
    ]
    assert done.stderr == "warning: vLLM serves only vanilla Markov heads, not 'gated'.\n"
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == InputError.exit_code
    assert again.stderr.startswith("error: ") and "--force" in again.stderr
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    assert CliRunner().invoke(app, [*arguments[:3], "--to", "gguf"]).exit_code == 2


def test_the_command_refuses_a_folder_that_is_no_draft(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    done = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "b"), "--to", "deepspec"])
    assert done.exit_code == FormatError.exit_code
    assert "looks like a target" in done.stderr
    assert not (tmp_path / "b").exists()


def test_the_names_of_the_command_are_those_of_the_dialects() -> None:
    assert tuple(name.value for name in DialectName) == WRITABLE
