"""Read the header of a GGUF file: its metadata, and the names, types, shapes and places of its tensors.

A GGUF file is the letters GGUF, a version, two counts, the metadata (key, type, value), a table of tensors (name,
shape, type, place) and the data, where each tensor begins at a multiple of ``general.alignment``. All integers are
little-endian. Blocks of quantised types are dequantised by the gguf package, one tensor at a time.

Source: docs/gguf.md of ggml.
"""

import importlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from matquant.core.dtypes import FLOATS
from matquant.system.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_RANK = 4
ALIGNMENT = 32  # bytes, unless general.alignment says otherwise
SCALARS = {  # number of a metadata type -> struct's letter
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
}
STRING, ARRAY = 8, 9
PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
CONTENTS = {  # general.type -> what such a file is
    "adapter": "a LoRA adapter; merge it into its model first and give the result",
    "mmproj": "the vision or audio part of a model; give the file of the language model",
    "imatrix": "an importance matrix; give the file of the model",
    "vocab": "a vocabulary without weights; give the file of the model",
}
COPY_AGAIN = "copy or download it again"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in the file."""

    kind: str  # the type's name in the gguf package, such as F32 or Q8_0
    shape: tuple[int, ...]  # outermost dimension first
    start: int  # first byte in the file
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """Everything before the data."""

    file: Path
    values: Mapping[str, Any] = field(repr=False)  # metadata; arrays as lists
    tensors: Mapping[str, Entry] = field(repr=False)

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))


def is_gguf(source: Path | str) -> bool:
    """Return whether ``source`` is a GGUF file, by its first bytes or its name."""
    file = Path(source)
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC or file.suffix.lower() == ".gguf"


def read_header(source: Path | str) -> Header:
    """Read the header of a GGUF file that holds a whole model.

    InputError for other and damaged files, one part of several, adapters and other companions of a model, and without
    the gguf package.
    """
    file = Path(source)
    size = file.stat().st_size
    with file.open("rb") as stream:
        try:
            _check_start(file, stream)
            tensors, entries = _unpack(stream, size, "QQ")
            values = dict(_pair(stream, size) for _ in range(entries))
            table = [_tensor(stream, size) for _ in range(tensors)]
            end = stream.tell()
        except EOFError:
            raise InputError(f"{file} is truncated: it ends inside its header; {COPY_AGAIN}") from None
        except (ValueError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} has a damaged header ({error}); {COPY_AGAIN}") from None
    _check_contents(file, values, len(table))
    return Header(file=file, values=values, tensors=_place(file, values, table, end=end, size=size))


def read_tensor(header: Header, name: str) -> np.ndarray:
    """Return a tensor: of its dtype for F32, F16 and BF16, else dequantised to float32."""
    entry = header.tensors[name]
    with header.file.open("rb") as stream:
        stream.seek(entry.start)
        data = np.frombuffer(stream.read(entry.bytes), np.uint8)
    if data.size != entry.bytes:
        raise InputError(f"{header.file} ended too early while it was read; {COPY_AGAIN}")
    if entry.kind in FLOATS:
        array: np.ndarray = data.view(FLOATS[entry.kind]).reshape(entry.shape)
        return array
    gguf = package()
    rows = data.reshape(*entry.shape[:-1], -1)
    found = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[entry.kind])
    return np.asarray(found, np.float32).reshape(entry.shape)


def bits_per_weight(kind: str) -> float:
    """Return the size of a type in bits per weight, its scales included."""
    gguf = package()
    weights, size_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return float(8 * size_bytes / weights)


def package(work: str = "reading GGUF files", *, extra: str = "train") -> ModuleType:
    """Return the gguf package; InputError if it is not installed. work: what needs it. extra: what installs it."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise InputError(
            f"{work} needs the package gguf, which is not installed; pip install 'matquant[{extra}]'"
        ) from None


# ------------------------------------------------------------------------------------------------------------- parsing


def _check_start(file: Path, stream: BinaryIO) -> None:
    """Raise InputError for other files, big-endian ones and other versions."""
    start = stream.read(8)
    if start[:4] != MAGIC:
        raise InputError(f"{file} is not a GGUF file (it begins with {start[:4]!r}); give the model's GGUF file")
    if len(start) < 8:
        raise EOFError
    version = int.from_bytes(start[4:], "little")
    if version & 0xFFFF == 0:
        raise InputError(f"{file} is a big-endian GGUF file; give the little-endian one, or convert it again")
    if version not in VERSIONS:
        raise InputError(
            f"{file} is a GGUF file of version {version}; versions {' and '.join(map(str, VERSIONS))} are supported"
        )


def _take(stream: BinaryIO, size: int, count: int) -> bytes:
    """Return the next ``count`` bytes of a file of ``size`` bytes; EOFError if it ends before."""
    data = stream.read(count) if count <= size else b""
    if len(data) < count:
        raise EOFError
    return data


def _unpack(stream: BinaryIO, size: int, letters: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{letters}", _take(stream, size, struct.calcsize(f"<{letters}")))


def _string(stream: BinaryIO, size: int) -> str:
    """Return a string; damaged UTF-8 is kept as replacement characters, as some tokens have it."""
    (length,) = _unpack(stream, size, "Q")
    return _take(stream, size, length).decode("utf-8", errors="replace")


def _pair(stream: BinaryIO, size: int) -> tuple[str, Any]:
    """Return a key of the metadata and its value."""
    key = _string(stream, size)
    (kind,) = _unpack(stream, size, "I")
    if kind != ARRAY:
        return key, _value(stream, size, kind, key)
    kind, count = _unpack(stream, size, "IQ")
    if kind in SCALARS:
        data = _take(stream, size, count * struct.calcsize(f"<{SCALARS[kind]}"))
        return key, list(struct.unpack(f"<{count}{SCALARS[kind]}", data))
    return key, [_value(stream, size, kind, key) for _ in range(count)]


def _value(stream: BinaryIO, size: int, kind: int, key: str) -> Any:
    if kind == STRING:
        return _string(stream, size)
    if kind not in SCALARS:
        raise ValueError(f"{key!r} is of the unknown type {kind}")
    return _unpack(stream, size, SCALARS[kind])[0]


def _tensor(stream: BinaryIO, size: int) -> tuple[str, tuple[int, ...], int, int]:
    """Return a row of the table: name, shape, number of the type, place in the data."""
    name = _string(stream, size)
    (rank,) = _unpack(stream, size, "I")
    if rank > LARGEST_RANK:
        raise ValueError(f"{name!r} has {rank} dimensions")
    *shape, kind, offset = _unpack(stream, size, f"{rank}QIQ")
    return name, tuple(reversed(shape)), kind, offset


def _check_contents(file: Path, values: Mapping[str, Any], tensors: int) -> None:
    """Raise InputError unless the file holds one whole model."""
    kind = str(values.get("general.type", "model"))
    if values.get("general.architecture") == "clip" or any(key.startswith("clip.") for key in values):
        kind = "mmproj"
    elif any(key.startswith("adapter.") for key in values):
        kind = "adapter"
    parts = values.get("split.count")
    named = PART.search(file.name)
    if (isinstance(parts, int) and parts > 1) or (named and int(named[1]) > 1):
        raise InputError(
            f"{file} is one of {parts or int(named[1]) if named else parts} parts of a model; merge them with "
            "llama.cpp's 'llama-gguf-split --merge FIRST_PART MODEL.gguf' and give the result"
        )
    if kind == "model" and not tensors:
        kind = "vocab"
    if kind != "model":
        raise InputError(f"{file} is {CONTENTS.get(kind, f'of type {kind!r}, not a model; give a model')}")


def _place(
    file: Path, values: Mapping[str, Any], table: list[tuple[str, tuple[int, ...], int, int]], *, end: int, size: int
) -> dict[str, Entry]:
    """Return the tensors by name, each within the file; end: first byte after the table."""
    gguf = package()
    alignment = values.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise InputError(f"{file} has general.alignment {alignment!r}; it must be an integer above 0; {COPY_AGAIN}")
    data = -(-end // alignment) * alignment
    found: dict[str, Entry] = {}
    for name, shape, number, offset in table:
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise InputError(
                f"{file} stores {name} in a type unknown to gguf (number {number}); pip install --upgrade gguf"
            ) from None
        weights, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in FLOATS and kind not in gguf.quants._type_traits:
            raise InputError(f"{file} stores {name} as {kind.name}, which cannot be dequantised; give another file")
        if name in found or not shape or 0 in shape or shape[-1] % weights:
            raise InputError(f"{file} has a damaged table of tensors at {name!r}; {COPY_AGAIN}")
        stored_bytes = math.prod(shape) // weights * block_bytes
        if data + offset + stored_bytes > size:
            raise InputError(
                f"{file} is truncated: {name} ends at byte {data + offset + stored_bytes:,}, "
                f"the file at {size:,}; {COPY_AGAIN}"
            )
        found[name] = Entry(kind=kind.name, shape=shape, start=data + offset, bytes=stored_bytes)
    return found
