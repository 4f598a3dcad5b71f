"""Which files a checkpoint consists of: listed ones alone, regular ones inside it, and edits that are sealed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import conftest
import matquant
from matquant.export import export
from matquant.format.read import open_checkpoint
from matquant.format.seal import ignored_files
from matquant.format.side_files import TOKENS, side_files
from matquant.format.verify import verify_checkpoint
from matquant.hf.probe import check_tokens
from matquant.hf.vocabulary import read_vocabulary
from matquant.hf_torch.loading import load_tokenizer
from matquant.system.errors import InputError

MANIFEST = "matquant_manifest.json"
SECRET = "the user's own file"


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conftest.quantize(llama, tmp_path_factory.mktemp("manifest") / "made", method="rtn", scope="all")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def listed(directory: Path) -> set[str]:
    return set(json.loads((directory / MANIFEST).read_text())["files"])


# Sealing --------------------------------------------------------------------------------------------------------------


def test_sealing_accepts_edited_added_and_removed_small_files_and_says_which(copy: Path) -> None:
    edit(copy / "generation_config.json", eos_token_id=7)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "tokenizer_config.json").unlink()
    (copy / "README.md").write_text("mine")
    with pytest.raises(InputError, match=f"matquant verify --seal {copy}"):
        open_checkpoint(copy)
    _, changes = matquant.seal_checkpoint(copy)
    assert [str(change).split(" (")[0] for change in changes] == [
        "changed: generation_config.json",
        "dropped: matquant_tokens.json, the record of the earlier tokenizer's tokens",
        "missing: tokenizer_config.json",
        "added: chat_template.jinja",
    ]
    verify_checkpoint(copy)
    assert matquant.Engine(copy, threads=1).ends == frozenset({7, 256})  # config.json's too
    assert read_vocabulary(copy).chat_template == "{{ messages }}"
    assert ignored_files(copy) == [
        "README.md is not part of the checkpoint; ignored",
        "matquant_tokens.json is not part of the checkpoint; ignored",
    ]


def test_sealing_twice_changes_nothing(copy: Path) -> None:
    edit(copy / "generation_config.json", do_sample=True)
    matquant.seal_checkpoint(copy)
    before = (copy / MANIFEST).read_bytes(), (copy / MANIFEST).stat().st_mtime_ns
    assert matquant.seal_checkpoint(copy)[1] == []
    assert ((copy / MANIFEST).read_bytes(), (copy / MANIFEST).stat().st_mtime_ns) == before


def test_sealing_an_edited_tokenizer_drops_the_record_of_the_earlier_one(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", add_bos_token=True)
    with pytest.raises(InputError, match="has a different tokenizer than when it was made"):
        check_tokens(copy)
    found = [str(change) for change in matquant.seal_checkpoint(copy)[1]]
    assert f"dropped: {TOKENS}, the record of the earlier tokenizer's tokens" in found
    check_tokens(copy)
    assert matquant.seal_checkpoint(copy)[1] == []


def test_a_manifest_that_is_sealed_is_the_one_that_writing_gives(made: Path, copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    matquant.seal_checkpoint(copy)
    shutil.copy(made / "generation_config.json", copy)
    matquant.seal_checkpoint(copy)
    assert (copy / MANIFEST).read_bytes() == (made / MANIFEST).read_bytes()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def set_rule(directory: Path, rule: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["matquant"]["rule"] = rule
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: flip(out / "model.safetensors"), "model.safetensors is damaged: sha256"),
        (lambda out: (out / "model.safetensors").unlink(), "model.safetensors is missing; copy it again or"),
        (
            lambda out: (out / "config.json").unlink(),
            "config.json is missing and a checkpoint cannot be read without it; put it back",
        ),
        (lambda out: (out / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda out: (out / "generation_config.json").write_text("[1]"), "generation_config.json is not a JSON object"),
        (lambda out: set_rule(out, "nearest"), "rule='nearest'"),
        (lambda out: edit(out / "config.json", quantization_config={}), 'no "matquant" object'),
        (lambda out: edit(out / MANIFEST, format=99), "format 99"),
    ],
)
def test_sealing_never_accepts_changed_weights_or_what_does_not_open(
    damage: Callable[[Path], None], message: str, copy: Path
) -> None:
    edit(copy / "generation_config.json", eos_token_id=7)
    damage(copy)
    before = (copy / MANIFEST).read_bytes()
    with pytest.raises(InputError) as caught:
        matquant.seal_checkpoint(copy)
    assert message in str(caught.value)
    assert (copy / MANIFEST).read_bytes() == before


# Listed files only ----------------------------------------------------------------------------------------------------


def test_files_that_the_manifest_does_not_list_are_not_obeyed(copy: Path, tmp_path: Path) -> None:
    ends = matquant.Engine(copy, threads=1).ends
    for name in ("generation_config.json", "tokenizer_config.json"):
        (copy / name).unlink()
    matquant.seal_checkpoint(copy)
    edit(copy / "config.json")  # a whole checkpoint again, with a config.json that is written in another way
    matquant.seal_checkpoint(copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": 3, "do_sample": true}')
    (copy / "chat_template.jinja").write_text("attack")
    (copy / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "a", "model_max_length": 3}')
    (copy / "vocab.txt").write_text(SECRET)
    (copy / "matquant_plans.json").write_text("{}")  # our own cache is known
    engine = matquant.Engine(copy, threads=1)
    assert (engine.ends, engine.generation_config) == (ends, {})
    assert (engine.vocabulary.chat_template, engine.vocabulary.bos) == (None, None)
    assert load_tokenizer(copy).bos_token != "a"
    assert matquant.load(copy).generation_config.do_sample is not True
    assert set(side_files(copy)) == {"tokenizer.json"}
    export(copy, tmp_path / "dense", to="dense")
    assert not {"vocab.txt", "chat_template.jinja", "generation_config.json"} & {
        file.name for file in (tmp_path / "dense").iterdir()
    }
    assert [note.split()[0] for note in ignored_files(copy)] == [
        "chat_template.jinja",
        "generation_config.json",
        "matquant_tokens.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]


def test_a_tokenizer_that_is_there_but_not_listed_is_missing_and_the_error_says_how_to_add_it(copy: Path) -> None:
    held = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").unlink()
    matquant.seal_checkpoint(copy)
    (copy / "tokenizer.json").write_bytes(held)
    with pytest.raises(InputError, match=f"not part of the checkpoint: add it with matquant verify --seal {copy}"):
        read_vocabulary(copy)


# Links and what is no file --------------------------------------------------------------------------------------------


def put(kind: str, file: Path, outside: Path) -> str:
    """Replace ``file`` by something that must not be read; returns what the error says of it."""
    file.unlink(missing_ok=True)
    if kind == "link":
        outside.write_text(SECRET)
        file.symlink_to(outside)
        return "outside the directory; replace the link with a copy"
    if kind == "pipe":
        os.mkfifo(file)
        return "is a named pipe, where a file is expected"
    if kind == "directory":
        file.mkdir()
        return "is a directory, where a file is expected"
    if kind == "device":
        file.symlink_to("/dev/zero")
        return "is a device, where a file is expected"
    file.symlink_to(file.name if kind == "circle" else "nowhere")
    return "cannot be read" if kind == "circle" else "which is missing"


KINDS = ("link", "pipe", "directory", "device", "circle", "dangling")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "model.safetensors", MANIFEST])
def test_a_checkpoint_reads_regular_files_inside_it_only(kind: str, name: str, copy: Path, tmp_path: Path) -> None:
    message = put(kind, copy / name, tmp_path / "outside")
    for check_hashes in (True, False):
        with pytest.raises(InputError) as caught:
            open_checkpoint(copy, check_hashes=check_hashes)
        assert message in str(caught.value)
    with pytest.raises(InputError):
        matquant.seal_checkpoint(copy)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vocab.txt", "config.json"])
def test_quantising_rejects_side_files_that_are_links_out_or_no_files(
    kind: str, name: str, llama: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    message = put(kind, source / name, tmp_path / "outside")
    with pytest.raises(InputError) as caught:
        conftest.quantize(source, tmp_path / "out", method="rtn")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_links_of_the_hub_cache_from_snapshot_to_blobs_are_followed(copy: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "1f"
    (blobs := snapshot.parent.parent / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in copy.iterdir():
        file.rename(blobs / f"{file.name}.blob")
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}.blob")
    verify_checkpoint(snapshot)
    assert load_tokenizer(snapshot).bos_token == "<|endoftext|>"
    (tmp_path / "secret").write_text(SECRET)
    (blobs / "generation_config.json.blob").unlink()
    (blobs / "generation_config.json.blob").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="outside the directory"):
        open_checkpoint(snapshot, check_hashes=False)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/b", "..", ".", "", "a\0b", "\ud800", "a\\b", "x" * 300]
)
def test_names_in_a_manifest_that_are_no_file_names_are_rejected(name: str, copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "ab"}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    for check_hashes in (True, False):
        with pytest.raises(InputError) as caught:
            open_checkpoint(copy, check_hashes=check_hashes)
        str(caught.value).encode()


def test_what_the_manifest_lists_is_what_is_there(made: Path) -> None:
    assert listed(made) == {file.name for file in made.iterdir()} - {MANIFEST}
    assert ignored_files(made) == []
