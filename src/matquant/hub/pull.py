"""Fetch a checkpoint from the hub: what a width needs first, the rest later.

The first pull pins the repository's commit in ``planes/origin.json``; later ones continue there. A file is downloaded
into ``planes/incoming``, from where an interrupted download ended, compared with its sha256, and only then moved to its
place, the manifest last. So a directory with a manifest is a checkpoint at every moment, an engine may serve it
meanwhile, and no damaged file ever takes its place. With all planes there the shards are assembled.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matquant.core.nest import MASTER_BITS, check_bits
from matquant.format.manifest import FOLDER, MANIFEST, ORIGIN, check_files, read_manifest, read_object
from matquant.format.plane_files import PLANE_BITS, RECORD, find_planes, parts_of, planes_read, read_record
from matquant.format.plane_write import assemble
from matquant.format.read import open_checkpoint, read_config
from matquant.hf.hub import Repository, check_name, fetch, find_repository
from matquant.system.errors import InputError
from matquant.system.files import check_space, explain_full_disk, json_bytes, sha256, sync, write_atomically
from matquant.system.locks import hold

INCOMING = f"{FOLDER}/incoming"
Progress = Callable[[int, int], None]  # bytes received so far, total
File = tuple[str, Mapping[str, Any]]  # path in the repository and in the directory, entry with bytes and sha256


def pull(
    repo: str,
    out: Path | str,
    *,
    bits: int = MASTER_BITS,
    revision: str | None = None,
    report: Progress = lambda done, total: None,
    notice: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Fetch what widths up to ``bits`` need of the checkpoint USER/REPO into the directory ``out``.

    revision: branch, tag or commit, of the first pull into ``out`` (None: main). Returns {"out", "commit", "bytes":
    received, "max_bits": the widest width that is there}. A later call with more bits fetches only what is missing, at
    the same commit. InputError for a hub that does not answer, a damaged file, or another ``out``; what has arrived is
    kept.
    """
    check_name(repo)
    check_bits(bits)
    with hold(out) as target, explain_full_disk(target):
        work = _begin(repo, target, bits=bits, revision=revision, notice=notice)
        if work is None:
            return {"out": str(target), "commit": None, "bytes": 0, "max_bits": MASTER_BITS}
        work.report = report
        if work.planes(bits):
            _fetch_planes(work, bits)
        else:
            _fetch_shards(work)
        found = open_checkpoint(target, check_hashes=False, check_sizes=True, partial=True)
        return {
            "out": str(target),
            "commit": work.repository.commit,
            "bytes": work.received,
            "max_bits": found.max_bits,
        }


@dataclass(kw_only=True)
class Work:
    """One pull: from where, into which directory, and how much has been received. total: bytes to receive."""

    repository: Repository
    target: Path
    report: Progress = lambda done, total: None
    received: int = 0
    done: int = 0
    total: int = 0

    def planes(self, bits: int) -> bool:
        """Return whether to fetch planes rather than shards; InputError if there are none."""
        if (self.target / RECORD).exists():
            return True
        if MANIFEST not in self.repository.files:
            raise InputError(f"{self.repository.name} has no {MANIFEST}: it is not a checkpoint that matquant pushed")
        if RECORD not in self.repository.files and bits < MASTER_BITS:
            raise InputError(
                f"{self.repository.name} has no planes, so only all {MASTER_BITS} bits can be fetched; "
                f"use --bits {MASTER_BITS}, or ask its owner for: matquant push DIR {self.repository.name} --planes"
            )
        return bits < MASTER_BITS

    def incoming(self, path: str) -> Path:
        """Return where a file is downloaded to."""
        return self.target / INCOMING / path.replace("/", "--")

    def read(self, path: str) -> Path:
        """Return a small file without an entry: in its place, or downloaded."""
        if (self.target / path).exists():
            return self.target / path
        fetch(self.repository, path, self.incoming(path), size=None, report=self.count)
        return self.incoming(path)

    def count(self, size: int) -> None:
        """Note bytes that have been received."""
        self.received += size
        self.done += size
        self.report(min(self.done, self.total or self.done), self.total or self.done)


def _begin(repo: str, target: Path, *, bits: int, revision: str | None, notice: Callable[[str], None]) -> Work | None:
    """Return the work, at the commit of the first pull if there was one; None if all is there.

    InputError if the directory is not one to pull into.
    """
    origin = target / ORIGIN
    if origin.exists():
        known = read_object(origin)
        name, commit = str(known.get("repo")), str(known.get("commit"))
        if name != repo:
            raise InputError(f"{target} holds a checkpoint from {name}; pull {repo} into another -o")
        newest = find_repository(repo, revision=revision)
        if newest.commit == commit:
            return Work(repository=newest, target=target)
        notice(
            f"{repo} has moved to {newest.commit[:12]}; {target} continues at {commit[:12]}: "
            "pull into another -o for the new one"
        )
        return Work(repository=find_repository(repo, revision=commit), target=target)
    found = find_repository(repo, revision=revision)
    work = Work(repository=found, target=target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if _is_same(work):
            notice(f"{target} has all of {repo} already")
            return None
        raise InputError(f"{target} is not empty and was not pulled from {repo}; use another -o")
    work.planes(bits)  # a repository without planes leaves no directory behind
    write_atomically(origin, json_bytes({"repo": repo, "commit": found.commit}))
    return work


def _is_same(work: Work) -> bool:
    """Return whether a directory holds the whole checkpoint of the repository, as after an earlier pull of all bits."""
    file = work.target / MANIFEST
    if not file.is_file() or MANIFEST not in work.repository.files:
        return False
    beside = work.target.with_name(f".{work.target.name}.manifest")
    try:
        fetch(work.repository, MANIFEST, beside, size=None, report=lambda size: None)
        same = beside.read_bytes() == file.read_bytes()
    finally:
        beside.unlink(missing_ok=True)
    if same:
        check_files(work.target, read_manifest(work.target)["files"], hashes=False)
    return same


def _fetch_planes(work: Work, bits: int) -> None:
    """Fetch the small files and the planes of a width; assemble the shards if all planes are there."""
    target = work.target
    manifest = _read_manifest(work.read(MANIFEST))
    record = read_record(work.read(RECORD))
    _fetch(work, {name: entry for name, entry in manifest["files"].items() if name not in record["shards"]})
    names = parts_of(record["files"], planes_read(bits, read_config(target)[2].rule))
    _fetch(work, {f"{FOLDER}/{name}": record["files"][name] for name in names})
    _finish(work, RECORD, MANIFEST)
    planes = find_planes(target, manifest)
    if planes is None or planes.held == len(PLANE_BITS):
        assemble(target)


def _fetch_shards(work: Work) -> None:
    """Fetch the whole checkpoint."""
    manifest = _read_manifest(work.read(MANIFEST))
    _fetch(work, manifest["files"])
    _finish(work, MANIFEST)
    shutil.rmtree(work.target / FOLDER)


def _read_manifest(file: Path) -> dict[str, Any]:
    """Read a manifest that may not be in its place yet."""
    return read_manifest(file.parent)


def _fetch(work: Work, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Fetch those of ``files``, path -> entry, that are not in their place; every one is compared with its entry."""
    missing = list(_missing(work.target, files))
    begun = {path: work.incoming(path) for path, _ in missing}
    there = sum(file.stat().st_size for file in begun.values() if file.exists())
    work.total += sum(entry["bytes"] for _, entry in missing)
    check_space(work.target, max(0, sum(entry["bytes"] for _, entry in missing) - there))
    work.done += there
    for path, entry in missing:
        fetch(work.repository, path, begun[path], size=entry["bytes"], report=work.count)
        found = sha256(begun[path])
        if found != entry["sha256"]:
            begun[path].unlink()
            raise InputError(
                f"{path} of {work.repository.name} at {work.repository.commit[:12]} is damaged: sha256 {found[:12]}…, "
                f"the manifest says {entry['sha256'][:12]}…; pull again, or ask its owner to push it again"
            )
        _place(work, path)


def _missing(target: Path, files: Mapping[str, Mapping[str, Any]]) -> Iterator[File]:
    for path, entry in files.items():
        file = target / path
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            yield path, entry


def _finish(work: Work, *paths: str) -> None:
    """Move the records to their places, which makes the directory a checkpoint, and forget what is left over."""
    for path in paths:
        if work.incoming(path).exists():
            _place(work, path)
    shutil.rmtree(work.target / INCOMING, ignore_errors=True)


def _place(work: Work, path: str) -> None:
    """Move a file that is complete to its place."""
    sync(work.incoming(path))
    work.incoming(path).replace(work.target / path)
    sync((work.target / path).parent)
