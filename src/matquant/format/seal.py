"""Accept edits of a checkpoint's small files: check everything that must not change, then write the manifest again.

A typical repair edits generation_config.json or a chat template, after which its hash no longer matches. Sealing
compares every weight file with the manifest, opens the edited checkpoint, and then lists the small files as they
are. A weight file that differs is never accepted. Records of earlier evaluations name the earlier manifest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matquant.format.manifest import (
    MANIFEST,
    check_files,
    is_weights,
    read_manifest,
    read_object,
    regular_file,
    unlisted,
)
from matquant.format.plane_files import find_planes
from matquant.format.read import Checkpoint, open_listed
from matquant.format.side_files import SIDE_FILES, TOKENS
from matquant.format.verify import check_plain, check_scales
from matquant.system.errors import InputError
from matquant.system.files import json_bytes, sha256, write_atomically

TOKENIZER_FILES = [name for name in SIDE_FILES if "template" not in name and name != "generation_config.json"]
SHOWN = 20  # maximum number of unlisted files that are named


@dataclass(frozen=True, kw_only=True)
class Change:
    """A small file that differs from the manifest. before, after: bytes; None: not listed, or missing."""

    name: str
    before: int | None
    after: int | None

    def __str__(self) -> str:
        if self.before is None:
            return f"added: {self.name} ({self.after:,} bytes)"
        if self.name == TOKENS and self.after is None:
            return f"dropped: {self.name}, the record of the earlier tokenizer's tokens"
        if self.after is None:
            return f"missing: {self.name} ({self.before:,} bytes)"
        return f"changed: {self.name} ({self.before:,} -> {self.after:,} bytes)"


def seal_checkpoint(directory: Path | str) -> tuple[Checkpoint, list[Change]]:
    """Accept edited, added and missing small files of a checkpoint; return it and the accepted changes.

    Only tokenizer, template and generation files can be added; any other new file stays out. The manifest is replaced
    atomically, and not touched if nothing changed. If a weight file differs or the checkpoint would not open,
    InputError is raised and nothing is written.
    """
    where = Path(directory)
    manifest = read_manifest(where)
    listed: dict[str, Any] = manifest["files"]
    planes = find_planes(where, manifest)
    shards = {} if planes is None else planes.shards
    weights = {name: entry for name, entry in listed.items() if is_weights(name) and name not in shards}
    check_files(where, weights, hashes=True)
    if planes is not None:
        planes.check(hashes=True)
    names = [name for name in listed if not is_weights(name)]
    names += [name for name in SIDE_FILES if name not in listed]
    entries = {name: entry for name in names if (entry := _entry(where, name)) is not None}
    if any(listed.get(name) != entries.get(name) for name in TOKENIZER_FILES):
        entries.pop(TOKENS, None)  # it describes the tokenizer before the edit
    changes = [
        Change(name=name, before=_size(listed.get(name)), after=_size(entries.get(name)))
        for name in names
        if listed.get(name) != entries.get(name)
    ]
    if "config.json" not in entries:
        raise InputError(f"{where / 'config.json'} is missing and a checkpoint cannot be read without it; put it back")
    sealed = {**manifest, "files": {name: listed[name] for name in listed if is_weights(name)} | entries}
    checkpoint = open_listed(where, sealed, planes=planes)
    check_scales(checkpoint)
    check_plain(checkpoint)
    if changes:
        write_atomically(where / MANIFEST, json_bytes(sealed))
    return checkpoint, changes


def _entry(where: Path, name: str) -> dict[str, Any] | None:
    """Return the manifest entry of the present small file, None if it is missing; InputError for damaged JSON."""
    file = regular_file(where, name)
    if file is None:
        return None
    if name.endswith(".json"):
        read_object(file)
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _size(entry: dict[str, Any] | None) -> int | None:
    return None if entry is None else int(entry["bytes"])


def describe(changes: Sequence[Change]) -> str:
    """Return the accepted changes, one line per file."""
    return "\n".join(map(str, changes)) or "nothing to seal: all files are as the manifest lists them"


def ignored_files(directory: Path | str) -> list[str]:
    """Return a sentence for every file in the directory that is not part of the checkpoint."""
    names = unlisted(Path(directory))
    notes = [
        f"{name} is not part of the checkpoint; ignored"
        + (f" (matquant verify --seal {directory} would add it)" if name in SIDE_FILES else "")
        for name in names[:SHOWN]
    ]
    return notes + [f"{len(names) - SHOWN} more files are not part of the checkpoint; ignored"] * (len(names) > SHOWN)
