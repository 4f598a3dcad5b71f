"""Open a nested checkpoint, and read its tensors on demand.

The manifest's sizes and hashes are compared first, then the structure (structure.py), so damage is an error that names
the file and never a wrong model. No numbers are read before they are needed; with ``mmap`` the codes are views of the
files, which the system pages in. Pickle is never used. A directory may hold the planes of its codes instead of the
shards, all of them or the first ones (plane_files.py).
Shapes: N out features, K in features, G groups.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from matquant.core.experts import Joined
from matquant.core.nest import MASTER_BITS, labels_of, middle
from matquant.core.packing import unpack
from matquant.core.spec import DAMAGED, Plan, Spec
from matquant.core.tensor import NestedTensor
from matquant.format.facts import CONFIG, check_counts
from matquant.format.layout import SLICES, is_end, slice_tensors
from matquant.format.manifest import (
    AGAIN,
    FOLDER,
    INDEX,
    MADE_BY,
    MANIFEST,
    check_files,
    fetch_words,
    read_manifest,
    read_object,
    regular_file,
)
from matquant.format.plane_files import (
    PlaneFiles,
    find_planes,
    header_name,
    plane_tensors,
    unpack_planes,
    widest,
)
from matquant.format.structure import check_structure
from matquant.format.tensor_file import DTYPES, read_tensor
from matquant.system.arguments import check_types
from matquant.system.errors import InputError
from matquant.system.files import sha256

HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open nested checkpoint: its records, and where each tensor lies. Numbers are read on demand."""

    directory: Path
    config: Mapping[str, Any]  # config.json without quantization_config
    spec: Spec  # how the weights are stored, and how they were made
    ignore: tuple[str, ...]  # module paths of linear layers left unquantised
    files: Mapping[str, str]  # tensor name -> file name
    shapes: Mapping[str, tuple[int, int]]  # path -> (N, K)
    mmap: bool = True  # files are mapped into memory; otherwise tensors are read
    planes: PlaneFiles | None = None  # files that hold the codes by significance; None: they are in the shards
    handles: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # file name -> open file
    # file name -> (where its data begin, its header)
    headers: dict[str, tuple[int, Any]] = field(default_factory=dict, repr=False, compare=False)
    # (path, bits) -> bytes of its codes under rule extra
    packed_sizes: dict[tuple[str, int], int] = field(default_factory=dict, repr=False, compare=False)

    def array(self, name: str) -> np.ndarray:
        """Return a stored tensor by its full name."""
        if not self.mmap:
            return self.mapped(name, DTYPES[self.stored_dtype(name)])
        file = self.files[name]
        if file not in self.handles:
            self.handles[file] = _open_tensors(self.directory / file)
        try:
            array: np.ndarray = self.handles[file].get_tensor(name)
        except (SafetensorError, AttributeError, TypeError, ValueError) as error:  # a dtype that numpy lacks
            raise InputError(f"{name} in {self.directory / file} cannot be read ({error}); {AGAIN}") from None
        return array

    def stored_dtype(self, name: str) -> str:
        """Return the dtype of a stored tensor as its file names it: F32, F16, BF16, I32, ..."""
        entry: dict[str, Any] = self._header(name)[1][name]
        return str(entry["dtype"])

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor."""
        return tuple(self._header(name)[1][name]["shape"])

    def stored_bytes(self, name: str) -> int:
        """Return the bytes of a stored tensor; InputError for a dtype that numpy lacks."""
        dtype, file = self.stored_dtype(name), self.directory / self.files[name]
        if dtype not in DTYPES:
            raise InputError(f"{name} in {file} cannot be read (dtype {dtype}); {AGAIN}")
        return math.prod(self.stored_shape(name)) * int(np.dtype(DTYPES[dtype]).itemsize)

    def mapped(self, name: str, dtype: Any) -> np.ndarray:
        """Return a stored tensor of ``dtype`` as a read-only view of its file, which the system pages in on access.

        Without ``mmap`` it is read now.
        """
        start, header = self._header(name)
        entry = header[name]
        shape, file = tuple(entry["shape"]), self.directory / self.files[name]
        if not self.mmap:
            return read_tensor(file, dtype, start=start + entry["data_offsets"][0], shape=shape)
        return np.memmap(file, dtype, "r", start + entry["data_offsets"][0], shape)

    def _header(self, name: str) -> tuple[int, Any]:
        """Return the data offset and header of a tensor's file; each file's header is read once."""
        file = self.files[name]
        if file not in self.headers:
            with (self.directory / file).open("rb") as stream:  # checked by safetensors when the checkpoint was opened
                length = int.from_bytes(stream.read(8), "little")
                self.headers[file] = 8 + length, json.loads(stream.read(length))
        return self.headers[file]

    def widths(self, plan: Plan | int) -> dict[str, int]:
        """Return the width of every quantised weight at a plan, or at a default width.

        Embedding and head get at least ``spec.head_bits`` unless the plan names them. InputError for a plan that names
        an unknown path or misses one, and for widths whose planes are not there.
        """
        asked = plan if isinstance(plan, Plan) else Plan(default=plan)
        resolved = asked.resolve(self.shapes, least=self.least)
        for path, bits in resolved.items():
            if bits > max(self.max_bits, self.least.get(path, 1)):
                raise InputError(f"{self.lacks()}, so {path} cannot be read at int{bits}; {self.fetch(bits)}")
        return resolved

    @property
    def max_bits(self) -> int:
        """Return the widest width that can be read: 8, or that of the planes that are there."""
        return MASTER_BITS if self.planes is None else widest(self.planes.held, self.spec.rule)

    def lacks(self) -> str:
        """Return that only the first planes are there: the start of an error."""
        return f"{self.directory} has the planes of int{self.max_bits} only"

    def fetch(self, bits: int) -> str:
        """Return how to fetch the planes of a width: the end of an error."""
        return fetch_words(self.directory, bits=bits)

    @property
    def ends(self) -> tuple[str, ...]:
        """Return the paths of the quantised embedding and head: those outside the numbered layers."""
        return ends_of(self.shapes) if self.spec.head_bits is not None else ()

    @property
    def least(self) -> dict[str, int]:
        """Return the least width of embedding and head unless a plan names them: path -> bits."""
        return dict.fromkeys(self.ends, self.spec.head_bits or 1)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return tensor name -> shape of all weights; quantised ones are named ``path.weight``, [N, K]."""
        quantised = {f"{path}.weight": shape for path, shape in self.shapes.items()}
        return quantised | {name: self.stored_shape(name) for name in self.plain_names()}

    def model_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return tensor name -> shape of the quantised weights as the model's own files hold them."""
        joined = self.joined()
        inside = {path for tensor in joined.values() for path in tensor.places}
        single = {f"{path}.weight": shape for path, shape in self.shapes.items() if path not in inside}
        return single | {name: tensor.shape for name, tensor in joined.items()}

    def joined(self) -> dict[str, Joined]:
        """Return the tensors that hold all experts in the model's own files, by name."""
        return {} if self.spec.experts is None else self.spec.experts.join(self.shapes)

    def plain_names(self) -> list[str]:
        """Return the names of the tensors that are not part of a quantised weight."""
        ours = {f"{path}.weight_{part}" for path in self.shapes for part in ("packed", "scale", "shape", "zero_point")}
        if self.planes is not None:
            ours |= {name for path, shape in self.shapes.items() for name in plane_tensors(path, shape, self.spec)}
            ours |= {header_name(shard) for shard in self.planes.shards}
        return [name for name, file in self.files.items() if name not in ours and file != SLICES]

    def nested(self, path: str, *, mapped: bool = False) -> NestedTensor:
        """Return the quantised weight at ``path``, numpy arrays; ``mapped``: codes are a read-only view of the file."""
        rows, stored = self.shapes[path][0], self.spec.stored(path)
        scale = self.array(f"{path}.weight_scale").astype(np.float32) / 2 ** (MASTER_BITS - stored)
        zero = np.full_like(scale, 2 ** (MASTER_BITS - 1))
        if f"{path}.weight_zero_point" in self.files:
            zero = unpack(self.array(f"{path}.weight_zero_point").T, MASTER_BITS, rows).T.astype(np.float32)
            zero = np.ascontiguousarray(zero)
        slices = {}
        for bits in self.spec.slices:
            own = [self.array(name).astype(np.float32) for name in slice_tensors(path, bits, self.spec)]
            slices[bits] = own[0], own[1] if len(own) > 1 else np.full_like(own[0], middle(bits))
        return NestedTensor(
            codes=self._codes(path, mapped=mapped),
            scale=scale,
            zero=zero,
            rule=self.spec.rule,
            slices=slices,
            grid=self.spec.grid,
        )

    def _codes(self, path: str, *, mapped: bool) -> np.ndarray:
        """Return the labels of a weight's codes, uint8 [N, K]; bits whose planes are not there are 0."""
        columns, stored = self.shapes[path][1], self.spec.stored(path)
        if self.planes is not None:
            names = plane_tensors(path, self.shapes[path], self.spec)
            return unpack_planes([self.mapped(name, np.uint8) for name in names if name in self.files], columns)
        packed = f"{path}.weight_packed"
        codes = unpack(self.mapped(packed, "<u4") if mapped else self.array(packed).view("<u4"), stored, columns)
        codes = codes << (MASTER_BITS - stored) if stored < MASTER_BITS else codes
        labels: np.ndarray = labels_of(codes, grid=self.spec.grid)
        return labels


def ends_of(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the paths outside the numbered decoder layers: embedding and head."""
    return tuple(filter(is_end, paths))


def open_checkpoint(
    directory: Path | str,
    *,
    check_hashes: bool = True,
    check_sizes: bool | None = None,
    mmap: bool = True,
    partial: bool = False,
) -> Checkpoint:
    """Open a nested checkpoint after checking its manifest (optional) and its structure.

    check_sizes: compare file sizes, which takes no time; None: only together with the hashes. mmap False: read tensors
    into memory, so that truncating a file later does no harm. partial: the first planes are enough; ``max_bits`` says
    which widths they serve.

    Raises InputError naming the damaged file or tensor and what to do.
    """
    check_types(directory=directory, check_hashes=check_hashes, mmap=mmap)
    where = Path(directory)
    check_sizes = check_hashes if check_sizes is None else check_sizes
    manifest = read_manifest(where)
    planes = find_planes(where, manifest)
    shards = {} if planes is None else planes.shards
    entries = {name: entry for name, entry in manifest["files"].items() if name not in shards}
    check_files(where, entries, sizes=check_sizes, hashes=check_hashes)
    if planes is not None:
        planes.check(sizes=check_sizes, hashes=check_hashes)
    checkpoint = open_listed(where, manifest, planes=planes, mmap=mmap)
    if checkpoint.max_bits < MASTER_BITS and not partial:
        raise InputError(f"{checkpoint.lacks()}, and all of them are needed; {checkpoint.fetch(MASTER_BITS)}")
    return checkpoint


def open_listed(
    where: Path, manifest: Mapping[str, Any], *, planes: PlaneFiles | None = None, mmap: bool = True
) -> Checkpoint:
    """Open a checkpoint whose files have been compared with ``manifest``; InputError if its structure is wrong."""
    config, quantised, spec = read_config(where)
    if (version := quantised["matquant"]["format"]) != manifest["format"]:
        found = f"{where} has format {manifest['format']} in {MANIFEST}, but {version} in config.json"
        raise InputError(f"{found}; {AGAIN}")
    listed = set(manifest["files"])
    with contextlib.ExitStack() as stack:
        sources = _tensor_files(where, listed, planes)
        handles = {file: stack.enter_context(_open_tensors(where / file)) for file in sources}
        files = _tensor_names(where, handles)
        check_counts(config, len(files), where=where / "config.json")
        shapes = check_structure(where, files, handles, spec, planes=None if planes is None else planes.held)
    _untie_stored_head(config, files)
    ignore = quantised.get("ignore")
    return Checkpoint(
        directory=where,
        config=config,
        spec=spec,
        ignore=tuple(map(str, ignore)) if isinstance(ignore, list) else (),
        files=files,
        shapes=shapes,
        mmap=mmap,
        planes=planes,
    )


def read_config(where: Path) -> tuple[dict[str, Any], dict[str, Any], Spec]:
    """Return a checkpoint's config.json without quantization_config, that object, and our record in it."""
    config = read_object(where / "config.json", CONFIG)
    quantised = config.pop("quantization_config", None)
    record = quantised.get("matquant") if isinstance(quantised, dict) else None
    if not isinstance(quantised, dict) or not isinstance(record, dict):
        raise InputError(f'{where / "config.json"} has no "matquant" object; {MADE_BY}')
    return config, quantised, Spec.from_json(record, where=str(where / "config.json"))


def manifest_sha256(directory: Path | str) -> str:
    """Return the sha256 of a checkpoint's manifest, which identifies the checkpoint: it holds all files' hashes."""
    return sha256(Path(directory) / MANIFEST)


def _untie_stored_head(config: dict[str, Any], names: Mapping[str, str]) -> None:
    """Untie head and embedding in ``config`` if the head is stored, as transformers does."""
    if any(name.endswith(HEAD) for name in names):
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part.get("tie_word_embeddings"):
                part["tie_word_embeddings"] = False


def _tensor_files(where: Path, listed: set[str], planes: PlaneFiles | None) -> list[str]:
    """Return the listed files that hold tensors: the slices, and the model's shards or the planes instead."""
    index = where / INDEX
    shards: set[Any] = {"model.safetensors"}
    if regular_file(where, INDEX) is not None:
        if index.name not in listed:
            raise InputError(f"{index} is not listed in {MANIFEST}; {AGAIN}")
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError(f"{index} has no weight_map; {AGAIN}")
        shards = set(weight_map.values())
    if (where / SLICES).exists():
        shards.add(SLICES)
    for shard in sorted(shards):
        if shard not in listed:
            raise InputError(f"{where / shard} is not listed in {MANIFEST}; {AGAIN}")
    if planes is not None:
        return [*sorted(shards - set(planes.shards)), *(f"{FOLDER}/{part}" for part in planes.parts())]
    return sorted(shards)


def _open_tensors(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}); {AGAIN}") from None


def _tensor_names(where: Path, handles: Mapping[str, Any]) -> dict[str, str]:
    """Return tensor name -> file name."""
    files: dict[str, str] = {}
    for file, handle in handles.items():
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
            if name in files:
                raise InputError(f"{where} has the tensor {name} in {files[name]} and in {file}; {DAMAGED}")
            files[name] = file
    return files
