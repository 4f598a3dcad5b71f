"""Convert a GGUF file to a Hugging Face directory, so that it can be used wherever a float model is.

The numbers are those of the file. Float types keep their dtype; norms and biases, which GGUF files hold in float32,
get the dtype of the matrices if it holds them exactly. Q8_0 becomes float32, which holds it exactly; float16 and
bfloat16 do not. A file with types narrower than Q8_0 becomes bfloat16, in which most such models were trained: it
rounds by at most a sixteenth of a step of those types (7e-5 nats on SmolLM2-135M in Q4_1, 4,096 tokens of wikitext-2),
and the parts that stay float take half the space.

Tensors are read, dequantised and written one at a time by two threads, so memory does not grow with the model: SmolLM2,
whose embedding is 113 MB in float32, takes 280 MB.
"""

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.dtypes import CONFIG_NAMES, FLOATS
from matquant.format.shards import Part, Slot, write_shards, write_zeros
from matquant.hf.gguf_config import Stored, read_config, read_stored, read_tensors
from matquant.hf.gguf_file import Entry, Header, bits_per_weight, is_gguf, read_header
from matquant.hf.gguf_tokens import read_files
from matquant.hf.tensors import SINGLE
from matquant.system.errors import InputError
from matquant.system.files import check_replaceable, check_space, json_bytes, replace_directory_when_done
from matquant.system.locks import check_place, delete, sibling

ORIGIN = "converted_from"  # key of config.json: the name of the GGUF file
EXACT_BITS = 8.5  # bits per weight of Q8_0; narrower types are reported
Report = Callable[[int, int], None]  # bytes written, total bytes


def silent(done: int, total: int) -> None:
    """Report nothing."""


def check_gguf(file: Path | str) -> None:
    """Raise InputError unless a GGUF file holds a model that we convert, judged by its header."""
    header = read_header(file)
    config = read_config(header)
    read_tensors(header, config)
    read_files(header, config["vocab_size"])


def quantised_notice(source: Path | str) -> str:
    """Return what to tell the user about a GGUF file whose weights are quantised to less than 8 bits, else ""."""
    if not is_gguf(source):
        return ""
    header = read_header(source)
    narrow = {name: entry.kind for name, entry in _matrices(header).items() if _bits(entry.kind) < EXACT_BITS}
    if not narrow:
        return ""
    kind = Counter(narrow.values()).most_common(1)[0][0]
    return (
        f"{source} is quantised already, most layers to {kind} ({_bits(kind):.1f} bits per weight); "
        "quality will be relative to these weights, not to the float model they came from"
    )


def convert_gguf(
    file: Path | str, out: Path | str, *, overwrite: bool = False, report: Report = silent, with_numbers: bool = True
) -> Path:
    """Write a GGUF file as the Hugging Face directory ``out``, atomically, and return it.

    report: called with the bytes written and their total. with_numbers: False leaves all tensors zero and takes no
    space, for previews. InputError for files that are not a supported model.
    """
    header = read_header(file)
    config = read_config(header)
    tensors = read_tensors(header, config)
    files = read_files(header, config["vocab_size"])
    target = check_place(out)

    def check() -> None:
        check_replaceable(target, "config.json", "a Hugging Face model", overwrite=overwrite)

    facts = header.file.stat()
    with replace_directory_when_done(target, check) as partial:
        _fill(partial, header, config, tensors, report=report, with_numbers=with_numbers)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        for made in partial.iterdir():
            os.utime(made, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # so that a resumed run finds the same files
    return target


@contextlib.contextmanager
def as_directory(
    source: Path | str, *, beside: Path | None = None, report: Report = silent, with_numbers: bool = True
) -> Iterator[Path | str]:
    """Yield ``source``, or for a GGUF file a conversion that is deleted afterwards. Errors name the GGUF file.

    beside: the path of the output, which the caller holds (locks.py): the conversion is ``.OUT.model`` beside it, and
    the same for every run of the file; None: it goes to the directory for temporary files.
    """
    if not is_gguf(source):
        yield source
        return
    with _scratch(beside) as directory:
        try:
            convert_gguf(source, directory, overwrite=True, report=report, with_numbers=with_numbers)
            yield directory
        except InputError as error:
            raise type(error)(str(error).replace(str(directory), str(source))) from None


@contextlib.contextmanager
def _scratch(beside: Path | None) -> Iterator[Path]:
    if beside is None:
        with tempfile.TemporaryDirectory(prefix="matquant-") as folder:
            yield Path(folder) / "model"
        return
    directory = sibling(beside, "model")
    delete(directory)  # left by a killed run
    try:
        yield directory
    finally:
        delete(directory)


def _fill(
    directory: Path,
    header: Header,
    config: Mapping[str, Any],
    tensors: Sequence[Stored],
    *,
    report: Report,
    with_numbers: bool,
) -> None:
    """Write config.json and the weights into a new directory."""
    dtype = _dtype(header, tensors)
    (directory / "config.json").write_bytes(
        json_bytes({**config, "dtype": CONFIG_NAMES[dtype], ORIGIN: header.file.name})
    )
    parts = [_part(header, stored, dtype) for stored in tensors]
    if not with_numbers:
        write_zeros(directory / SINGLE, parts)
        return
    total, written = sum(part.bytes for part in parts), 0
    check_space(directory.parent, total)

    def count(size_bytes: int) -> None:
        nonlocal written
        written += size_bytes
        report(written, total)

    write_shards(directory, parts, report=count)


def _part(header: Header, stored: Stored, dtype: str) -> Part:
    shape = header.tensors[stored.there].shape

    def make() -> Sequence[np.ndarray]:
        return [np.ascontiguousarray(read_stored(header, stored).astype(FLOATS[dtype], copy=False))]

    return Part((Slot(stored.name, dtype, shape),), make)


def _matrices(header: Header) -> dict[str, Entry]:
    return {name: entry for name, entry in header.tensors.items() if len(entry.shape) > 1}


def _bits(kind: str) -> float:
    return 32.0 if kind in FLOATS else bits_per_weight(kind)


def _dtype(header: Header, tensors: Sequence[Stored]) -> str:
    """Return the dtype of the converted model, as safetensors names it; see the top of this file."""
    kinds = {entry.kind for entry in _matrices(header).values()}
    if any(_bits(kind) < EXACT_BITS for kind in kinds):
        return "BF16"
    if len(kinds) > 1 or not kinds <= FLOATS.keys():
        return "F32"
    dtype: str = kinds.pop()
    for stored in tensors:
        if len(header.tensors[stored.there].shape) == 1 and dtype != "F32":
            array = read_stored(header, stored).astype(np.float32)
            if not np.array_equal(array.astype(FLOATS[dtype]).astype(np.float32), array):
                return "F32"
    return dtype
