"""The manifest of a checkpoint: its files, with the size and sha256 of each.

Only listed files are read or copied. A file added to the directory changes nothing until ``matquant verify --seal``
lists it. A link never brings in a file from elsewhere: ``side_file`` and ``check_files`` accept only regular files
inside the directory, and links from snapshots to blobs in a hub cache.
"""

import contextlib
import json
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matquant.core.spec import Spec, check_format
from matquant.format.facts import Table, read_facts
from matquant.system.errors import InputError
from matquant.system.files import json_bytes, sha256

MANIFEST = "matquant_manifest.json"
PLAN_CACHE = "matquant_plans.json"  # written beside a checkpoint by matquant plan
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
FOLDER = "planes"  # plane_files.py
ORIGIN = f"{FOLDER}/origin.json"  # where ``matquant pull`` gets them from: {"repo": name, "commit": hash}
MADE_BY = "give a checkpoint made by matquant quantize"
AGAIN = "copy it again or write the checkpoint again"
NUMBERS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npy", ".npz", ".h5", ".msgpack", ".onnx", ".pkl")
KINDS = {  # kinds of paths that are not regular files
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_weights(name: str) -> bool:
    """Return whether a file holds weights or lists where they are: edits of such files are never accepted."""
    return name == INDEX or name.lower().endswith(NUMBERS)


def regular_file(directory: Path, name: str) -> Path | None:
    """Return the path of a file in ``directory``, None if there is none.

    InputError if it is not a regular file (opening a pipe would block forever), or is a link out of the directory.
    """
    file = directory / name
    try:
        real = file.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        if file.is_symlink():
            raise InputError(f"{file} is a link to {file.readlink()}, which is missing; {AGAIN}") from None
        return None
    except (OSError, RuntimeError, ValueError) as error:  # circular links, names that no file system accepts
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{directory / ascii(name)[1:-1]} cannot be read ({reason}); {AGAIN}") from None
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "not a regular file")
        raise InputError(f"{file} is {kind}, where a file is expected; {AGAIN}")
    if not _belongs(real, directory.resolve()):
        raise InputError(f"{file} is a link to {real}, outside the directory; replace the link with a copy of the file")
    return file


def _belongs(real: Path, home: Path) -> bool:
    """Return whether a resolved path is inside ``home``, or in the hub cache's blobs if ``home`` is a snapshot."""
    blobs = home.parent.parent / "blobs"
    return real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs))


def side_file(directory: Path, name: str) -> Path | None:
    """Return the path of a model's small file (tokenizer, template, generation settings); None if there is none.

    In a checkpoint, only files that the manifest lists are found.
    """
    if (directory / MANIFEST).exists() and name not in read_manifest(directory)["files"]:
        return None
    return regular_file(directory, name)


def side_facts(directory: Path, name: str, table: Table) -> dict[str, Any]:
    """Read a small JSON file of a model and check it against ``table``; {} if there is none."""
    file = side_file(directory, name)
    return {} if file is None else read_facts(file, table)


def seal_hint(directory: Path, name: str) -> str:
    """Return the end of an error about a missing file: how to add it if it is there but not listed."""
    if not (directory / name).exists() or side_file(directory, name) is not None:
        return ""
    return f"; {name} is there, but not part of the checkpoint: add it with matquant verify --seal {directory}"


@contextlib.contextmanager
def listed_only(directory: Path) -> Iterator[Path]:
    """Yield a directory with only the small files that a checkpoint's manifest lists.

    For readers that look for files themselves. A directory without a manifest is yielded unchanged.
    """
    if not (directory / MANIFEST).exists():
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="matquant-") as folder:
        for name in read_manifest(directory)["files"]:
            file = None if is_weights(name) else regular_file(directory, name)
            if file is not None:
                (Path(folder) / name).symlink_to(file.resolve())
        yield Path(folder)


# ---------------------------------------------------------------------------------------------------------- the record


def write_manifest(directory: Path, spec: Spec) -> None:
    """Write the manifest of all files that are in ``directory`` now."""
    files = sorted(file for file in directory.iterdir() if file.name != MANIFEST)
    (directory / MANIFEST).write_bytes(json_bytes({"format": spec.format, "files": hashed(files)}))


def hashed(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the manifest entries of files, by name."""
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(sha256, files))
    return {f.name: {"bytes": f.stat().st_size, "sha256": s} for f, s in zip(files, sums, strict=True)}


def read_manifest(where: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest; InputError for unknown formats and entries without name, size and sha256."""
    if not where.is_dir():
        raise InputError(f"{where}: no such directory; {MADE_BY}")
    if regular_file(where, MANIFEST) is None and (where / ORIGIN).exists():
        raise InputError(f"{where} is not complete: files are missing; {fetch_words(where, bits=2)}")
    if regular_file(where, MANIFEST) is None:
        raise InputError(f"{where} has no {MANIFEST}; {MADE_BY}")
    manifest = read_object(where / MANIFEST)
    check_format(manifest.get("format"), where=where)
    check_entries(manifest.get("files"), where=where / MANIFEST)
    if CONFIG not in manifest["files"]:
        raise InputError(f"{where / MANIFEST} lists no files; {AGAIN}")
    return manifest


def fetch_words(where: Path, *, bits: int) -> str:
    """Return how to fetch what a width needs: the end of an error."""
    repo = "REPO"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        repo = str(json.loads((where / ORIGIN).read_text())["repo"])
    return f"fetch them with: matquant pull {repo} --bits {bits} -o {where}"


def check_entries(entries: Any, *, where: Path) -> None:
    """Raise InputError unless ``entries`` maps file names, without a directory, to sizes and sha256 sums."""
    if not isinstance(entries, dict) or not entries:
        raise InputError(f"{where} lists no files; {AGAIN}")
    for name, entry in entries.items():
        if Path(name).name != name or "\\" in name or name in (MANIFEST, "", ".", ".."):
            raise InputError(f"{where} lists {name!r}, which is not a file name; {AGAIN}")
        if (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            raise InputError(f"{where} has no size and sha256 of {name}; {AGAIN}")


def read_object(file: Path, table: Table = MappingProxyType({})) -> dict[str, Any]:
    """Read the object in a JSON file of a checkpoint and check it against ``table``; InputError for anything else."""
    if not file.is_file():
        raise InputError(f"{file} is missing; {AGAIN}")
    return read_facts(file, table, remedy=AGAIN)


def check_files(where: Path, entries: Mapping[str, Any], *, sizes: bool = True, hashes: bool) -> None:
    """Raise InputError unless every listed file is a regular file in ``where``, of its size and (``hashes``) sha256."""
    for name, entry in entries.items():
        file = regular_file(where, name)
        if file is None:
            raise InputError(f"{where / name} is missing; {AGAIN if name == CONFIG else _remedy(where, name)}")
        if sizes and file.stat().st_size != entry["bytes"]:
            found = f"{file} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
            raise InputError(f"{found}; {_remedy(where, name)}")
    if hashes:
        with ThreadPoolExecutor() as pool:
            sums = list(pool.map(sha256, (where / name for name in entries)))
        for (name, entry), found in zip(entries.items(), sums, strict=True):
            if found != entry["sha256"]:
                raise InputError(
                    f"{where / name} is damaged: sha256 {found[:12]}…, "
                    f"the manifest says {entry['sha256'][:12]}…; {_remedy(where, name)}"
                )


def _remedy(where: Path, name: str) -> str:
    """Return what to do: weights must not change, other files may have been edited on purpose."""
    if is_weights(name):
        return AGAIN
    return f"{AGAIN}, or accept your own edit with: matquant verify --seal {where}"


def unlisted(directory: Path) -> list[str]:
    """Return the names in a checkpoint's directory that are not part of it, without our own caches."""
    planes = [FOLDER] if (directory / FOLDER).is_dir() else []
    known = {MANIFEST, *planes, *read_manifest(directory)["files"]}
    others = (entry for entry in directory.iterdir() if entry.name not in known)
    return sorted(entry.name + "/" * entry.is_dir() for entry in others if PLAN_CACHE not in entry.name)
