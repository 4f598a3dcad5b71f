"""Read the small files beside a float model, a directory or hub id, without byte-order marks.

transformers fails on a byte-order mark in a JSON file; ``readable`` gives it a directory without them.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from matquant.format.side_files import SIDE_FILES, side_files
from matquant.hf.hub import fetch_files
from matquant.system.files import MARK

TEXT_SUFFIXES = (".json", ".jinja", ".txt")
MARK_BYTES = MARK.encode()
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # for pip -> module
TIKTOKEN = {"tiktoken": "tiktoken"}


def collect(source: Path | str) -> dict[str, bytes]:
    """Return a model's tokenizer, template and generation files, by name, without byte-order marks."""
    directory = local_directory(source)
    files = {} if directory is None else side_files(directory)
    return {name: _without_mark(name, content) for name, content in files.items()}


def local_directory(source: Path | str) -> Path | None:
    """Return the directory of a model's small files; for a hub id its cached snapshot, None if nothing is cached.

    Files of the snapshot that are not cached yet are fetched, unless HF_HUB_OFFLINE is set.
    """
    return Path(source) if Path(source).is_dir() else fetch_files(str(source), SIDE_FILES)


@contextlib.contextmanager
def readable(source: Path | str) -> Iterator[Path | str]:
    """Yield ``source``, or a temporary copy if one of its text files begins with a byte-order mark.

    The copy links to all files except those with a mark.
    """
    where = Path(source)
    files = [file for file in where.iterdir() if file.is_file()] if where.is_dir() else []
    marked = [file for file in files if file.suffix in TEXT_SUFFIXES and _is_marked(file)]
    if not marked:
        yield source
        return
    with tempfile.TemporaryDirectory() as scratch:
        for file in where.iterdir():
            if file in marked:
                (Path(scratch) / file.name).write_bytes(file.read_bytes().removeprefix(MARK_BYTES))
            else:
                (Path(scratch) / file.name).symlink_to(file.resolve())
        yield Path(scratch)


class Missing(NamedTuple):
    """A tokenizer file and the packages (their pip names) that transformers needs to read it."""

    file: str
    packages: str


def missing_packages(source: Path | str) -> Missing | None:
    """Return the missing packages that the tokenizer of ``source`` needs; None if none is known to be missing."""
    directory = local_directory(source)
    for file in sorted(directory.glob("*.model")) if directory is not None else []:
        with file.open("rb") as stream:
            kind = SENTENCEPIECE if stream.read(1) == b"\n" else TIKTOKEN  # a protobuf's first field; base64 text
        lacking = [package for package, module in kind.items() if not _is_installed(module)]
        if lacking:
            return Missing(file.name, " ".join(lacking))
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _is_marked(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(MARK_BYTES)) == MARK_BYTES


def _without_mark(name: str, content: bytes) -> bytes:
    return content.removeprefix(MARK_BYTES) if name.endswith(TEXT_SUFFIXES) else content
