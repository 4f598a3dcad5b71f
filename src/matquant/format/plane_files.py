"""The planes of a checkpoint as files: codes cut by significance, so that their top bits can be fetched first.

The bits of a byte cannot be fetched apart, so the planes layout stores them apart, five planes of 2, 1, 1, 2 and 2
bits, most significant first, as in memory (core/planes.py). Part x of every kind belongs to shard x:

    planes/manifest.json        size and sha256 of every part, and of the shards that they assemble to
    planes/rest-00001.planes    everything of shard 1 but the codes: what every width reads
    planes/p0-00001.planes      bits 7 and 6 of its codes; p1: bit 5, p2: bit 4, p3: bits 3 and 2, p4: bits 1 and 0

A part is a safetensors file of another name, so that loaders that look for *.safetensors never fetch one. A plane of
the weight at ``path`` is the tensor ``path.plane0`` .. ``path.plane4``, uint8 [N, ceil(K * bits / 8)], packed like
core/packing.py but in whole bytes. Embedding and head are read at ``head_bits`` or wider at every width: the planes
which that needs lie in ``rest``. docs/format.md specifies the files byte by byte.
Shapes: N out features, K in features.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.nest import MASTER_BITS, RESIDENT_BITS, bits_read
from matquant.core.packing import CACHED, pack
from matquant.core.spec import Spec
from matquant.format.layout import is_end
from matquant.format.manifest import (
    AGAIN,
    FOLDER,
    check_entries,
    check_files,
    fetch_words,
    read_object,
    regular_file,
)
from matquant.system.errors import InputError

RECORD = f"{FOLDER}/manifest.json"
FORMAT = 1  # of planes/manifest.json; the checkpoint's format is in its manifest
PLANE_BITS = tuple(last - first for first, last in pairwise((0, *RESIDENT_BITS)))
PART = re.compile(r"(rest|p[0-4])-(\d{5})\.planes")


def part_name(kind: str, number: int) -> str:
    """Return the file name of the part of shard ``number``, from 1. kind: "rest" or "p0" .. "p4"."""
    return f"{kind}-{number:05d}.planes"


def header_name(shard: str) -> str:
    """Return the name of the tensor, uint8, that is the start of a shard up to its data."""
    return f"{shard}/header"


def planes_read(bits: int, rule: str) -> int:
    """Return how many planes, from the first, reading ``bits`` bits needs."""
    return RESIDENT_BITS.index(bits_read(bits, rule=rule)) + 1


def widest(planes: int, rule: str) -> int:
    """Return the widest width that the first ``planes`` planes serve."""
    return max(bits for bits in range(1, MASTER_BITS + 1) if planes_read(bits, rule) <= planes)


def plane_tensors(path: str, shape: tuple[int, int], spec: Spec) -> dict[str, tuple[int, int]]:
    """Return tensor name -> shape of every plane of the weight at ``path``: as many as hold its stored bits."""
    rows, columns = shape
    count = planes_read(spec.stored(path), "prefix")
    return {f"{path}.plane{j}": (rows, -(-columns * PLANE_BITS[j] // 8)) for j in range(count)}


def kind_of(path: str, plane: int, spec: Spec) -> str:
    """Return the kind of part that a plane of the weight at ``path`` lies in."""
    every_width = spec.head_bits is not None and is_end(path) and plane < planes_read(spec.head_bits, spec.rule)
    return "rest" if every_width else f"p{plane}"


def pack_plane(codes_NK: np.ndarray, plane: int) -> np.ndarray:
    """Return a plane of codes, uint8 [N, ceil(K * bits / 8)]."""
    bits, columns = PLANE_BITS[plane], codes_NK.shape[1]
    field = (codes_NK >> (MASTER_BITS - RESIDENT_BITS[plane])) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(pack(field, bits).view(np.uint8)[:, : -(-columns * bits // 8)])


@functools.cache
def _fields(plane: int) -> np.ndarray:
    """Return the codes that each byte of a plane holds [256], all in one item: their other bits are 0."""
    bits = PLANE_BITS[plane]
    fields = np.arange(256)[:, None] >> np.arange(0, 8, bits) & 2**bits - 1
    codes = (fields << (MASTER_BITS - RESIDENT_BITS[plane])).astype(np.uint8)
    items: np.ndarray = codes.view(f"<u{8 // bits}").reshape(256)
    return items


def unpack_planes(planes: Iterable[np.ndarray], columns: int) -> np.ndarray:
    """Return the codes, uint8 [N, K], of their first planes; bits of planes that are not given are 0."""
    held = list(planes)
    rows = held[0].shape[0]
    codes_NK = np.empty((rows, columns), np.uint8)
    step = max(1, CACHED // columns)
    for start in range(0, rows, step):
        block = np.zeros((min(step, rows - start), columns), np.uint8)
        for plane, packed in enumerate(held):
            block |= _fields(plane)[packed[start : start + step]].view(np.uint8)[:, :columns]
        codes_NK[start : start + step] = block
    return codes_NK


# -------------------------------------------------------------------------------------------------------- the directory


@dataclass(frozen=True, kw_only=True)
class PlaneFiles:
    """The planes of a directory without the shards. entries: of the record, by file name under ``planes/``."""

    directory: Path
    entries: Mapping[str, Any]
    shards: Mapping[str, Any]  # the shards that the parts assemble to -> their manifest entries
    held: int  # planes, from the first, of which every part is there

    def parts(self, planes: int | None = None) -> list[str]:
        """Return the names of the parts that the first ``planes`` planes (None: those held) consist of, in order."""
        return parts_of(self.entries, self.held if planes is None else planes)

    def check(self, *, first: int = 0, sizes: bool = True, hashes: bool) -> None:
        """Raise InputError naming a damaged part of the planes held, from plane ``first`` on (0: with ``rest``)."""
        names = [name for name in self.parts() if first == 0 or (name[0] == "p" and int(name[1]) >= first)]
        entries = {f"{FOLDER}/{name}": self.entries[name] for name in names}
        check_files(self.directory, entries, sizes=sizes, hashes=hashes)


def parts_of(entries: Iterable[str], planes: int) -> list[str]:
    """Return the parts that the first ``planes`` planes consist of: what every width reads, then plane by plane."""
    kinds = ["rest", *(f"p{plane}" for plane in range(planes))]
    return sorted((name for name in entries if name.split("-")[0] in kinds), key=lambda n: (kinds.index(n[:-13]), n))


def find_planes(where: Path, manifest: Mapping[str, Any]) -> PlaneFiles | None:
    """Return the planes of a directory that has them instead of its shards; None if all listed files are there.

    InputError if they belong to another checkpoint, or what every width reads is not there.
    """
    listed = manifest["files"]
    if not (where / FOLDER).is_dir() or all((where / name).exists() for name in listed):
        return None
    if regular_file(where, RECORD) is None:
        return None
    record = read_record(where / RECORD)
    entries, shards = record["files"], record["shards"]
    for name, entry in shards.items():
        if listed.get(name) != entry:
            raise InputError(f"{where / FOLDER} holds planes of another {name} than the manifest lists; {AGAIN}")
    present = {name for name in entries if regular_file(where, f"{FOLDER}/{name}") is not None}
    missing = [name for name in parts_of(entries, 1) if name not in present]
    if missing:
        raise InputError(
            f"{where / FOLDER / missing[0]} is missing, so no width can be read; {fetch_words(where, bits=2)}"
        )
    held = next((j for j in range(1, len(PLANE_BITS)) if not present.issuperset(parts_of(entries, j + 1))), None)
    return PlaneFiles(directory=where, entries=entries, shards=shards, held=held or len(PLANE_BITS))


def read_record(file: Path) -> dict[str, Any]:
    """Read ``planes/manifest.json``; InputError for another format and for names that are not those of parts."""
    record = read_object(file)
    if record.get("format") != FORMAT:
        raise InputError(
            f"{file} is in format {record.get('format')!r}; this matquant reads format {FORMAT}: upgrade matquant"
        )
    for key in ("files", "shards"):
        check_entries(record.get(key), where=file)
    numbers = set()
    for name in record["files"]:
        found = PART.fullmatch(name)
        if not found:
            raise InputError(f"{file} lists {name!r}, which is not the name of a part; {AGAIN}")
        numbers.add(int(found[2]))
    if numbers != set(range(1, len(record["shards"]) + 1)):
        raise InputError(f"{file} does not list one part of each kind for every shard; {AGAIN}")
    return record
