"""The nested checkpoint on disk: a Hugging Face directory that is a stock int8 model to everyone else.

The 8-bit codes are stored as compressed-tensors W8A16 (``pack-quantized``): ``weight_packed`` viewed as uint8 IS the
code matrix. Ours on top: the "matquant" object in config.json's ``quantization_config``, the affines of the widths that
have their own in matquant_slices.safetensors (which stock loaders never open), and a manifest of sha256 sums.
docs/format.md specifies all of it byte by byte.

A checkpoint is written shard by shard into a temporary sibling directory, synced, hashed, then renamed into place: a
crash leaves the old checkpoint or the new one. Reading checks the hashes first, so damage is an error and never a wrong
model. No pickle anywhere. Shapes: N out features, K in features, G groups.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from matquant.core.dtypes import ANY_FLOAT
from matquant.core.grid import middle
from matquant.core.nest import CENTRE, MASTER_BITS, labels_of, slice_codes, stored_codes
from matquant.core.overflow import packed_bytes
from matquant.core.packing import pack, unpack, words
from matquant.core.spec import DAMAGED, Spec
from matquant.core.tensor import NestedTensor
from matquant.format.facts import CONFIG, check_depth
from matquant.format.manifest import (
    AGAIN,
    INDEX,
    MADE_BY,
    MANIFEST,
    check_files,
    read_manifest,
    read_object,
    regular_file,
    side_file,
    write_manifest,
)
from matquant.format.tensor_file import DTYPES, read_tensor
from matquant.system.arguments import check_types
from matquant.system.errors import InputError
from matquant.system.files import check_replaceable, json_bytes, replace_directory_when_done, sha256
from matquant.system.locks import check_place

SLICES = "matquant_slices.safetensors"
HEAD = "lm_head.weight"
TOKENS = "matquant_tokens.json"  # hf/probe.py
SHARD_BYTES = 5 * 10**9  # what transformers itself shards at
SIDE_FILES = (
    *("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json", "vocab.txt", "chat_template.jinja", "generation_config.json"),
    "chat_template.json",
)


Item = tuple[str, "np.ndarray | NestedTensor"]


# ---------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    directory: Path | str,
    items: Iterable[Item],
    *,
    spec: Spec,
    config: Mapping[str, Any],
    ignore: Iterable[str],
    files: Mapping[str, bytes],
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a nested checkpoint, one shard in memory at a time.

    items: (path, NestedTensor) for quantised weights and (tensor name, array) for all others, numpy; may be lazy.
    config: the model's config.json; ignore: module names of linears that stay unquantised; files: further files by
    name (tokenizer, logs). Raises InputError if ``directory`` exists and ``overwrite`` is false, or the disk is full;
    nothing is left behind then.
    """
    check_types(directory=directory, overwrite=overwrite)
    target = check_place(directory)  # through a link, the checkpoint it points to is replaced
    with replace_directory_when_done(target, lambda: check_writable(target, overwrite=overwrite)) as partial:
        _write_tensors(partial, items, spec=spec, shard_bytes=shard_bytes)
        quantised = {**config, "quantization_config": quantization_config(spec, ignore)}
        (partial / "config.json").write_bytes(json_bytes(quantised))
        for name, content in files.items():
            (partial / name).write_bytes(content)
        write_manifest(partial, spec)


def check_writable(target: Path, *, overwrite: bool) -> None:
    """InputError if ``target`` may not be written: it exists without ``overwrite``, or is not a checkpoint of ours."""
    check_replaceable(target, MANIFEST, "a matquant checkpoint", overwrite=overwrite)


def side_files(source: Path | str) -> dict[str, bytes]:
    """Tokenizer and generation files in a model's directory, by name.

    Of a checkpoint only those that its manifest lists. InputError for links that leave the directory, and for what is
    no regular file.
    """
    where = Path(source)
    if not where.is_dir():
        return {}
    regular_file(where, "config.json")  # what it says is copied too
    found = {name: side_file(where, name) for name in SIDE_FILES}
    return {name: file.read_bytes() for name, file in found.items() if file is not None}


def nested_side_files(directory: Path) -> dict[str, bytes]:
    """The side files of a nested checkpoint that go into another one: those of its model, and the record of tokens."""
    record = side_file(directory, TOKENS)
    return side_files(directory) | ({} if record is None else {TOKENS: record.read_bytes()})


def quantization_config(spec: Spec, ignore: Iterable[str]) -> dict[str, Any]:
    """The stock compressed-tensors description of what is stored, with our Spec as the extra key "matquant"."""
    stored = spec.stored_bits
    widths = {stored} if isinstance(stored, int) else set(stored.values())
    groups = {
        (bits, spec.symmetric): [] if isinstance(stored, int) else [path for path in stored if stored[path] == bits]
        for bits in sorted(widths, reverse=True)
    }
    config = stock_config(groups, group_size=spec.group_size, ignore=ignore) | {"matquant": spec.to_json()}
    if not spec.symmetric:
        # transformers 5.23 mis-shapes packed zero points unless it dequantises while loading.
        config["dequantize"] = True
    return config


def stock_config(
    groups: Mapping[tuple[int, bool], Sequence[str]], *, group_size: int | None, ignore: Iterable[str]
) -> dict[str, Any]:
    """The quantization_config of compressed-tensors, ``pack-quantized``.

    groups: (bits, whether the zero is in the middle) -> the paths stored so; of a single group they are not listed.
    """
    config_groups = {}
    for number, ((bits, symmetric), paths) in enumerate(groups.items()):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group_size is None else "group",
            "group_size": group_size,
            "dynamic": False,
        }
        targets = ["Linear"] if len(groups) == 1 else [f"re:^{re.escape(path)}$" for path in paths]
        config_groups[f"group_{number}"] = {"targets": targets, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": sorted(ignore),
    }


def _stored_tensors(path: str, tensor: NestedTensor, spec: Spec) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{path}.weight_packed", pack(stored_codes(tensor.codes, grid=tensor.grid), MASTER_BITS).view("<i4")
    yield f"{path}.weight_scale", tensor.scale.astype(_scale_dtype(path, spec))
    yield f"{path}.weight_shape", np.array(tensor.codes.shape, dtype=np.int64)
    if not spec.symmetric:
        # Packed along the rows, as compressed-tensors has it.
        yield f"{path}.weight_zero_point", pack_zeros(tensor.zero, MASTER_BITS)


def slice_tensors(path: str, bits: int, spec: Spec) -> dict[str, Any]:
    """Tensor name -> dtype of what a width has of its own: its scale and, unless it is in the centre, its zero."""
    names: dict[str, Any] = {f"{path}.{bits}.scale": ml_dtypes.bfloat16}
    return names if spec.zeros == CENTRE else {**names, f"{path}.{bits}.zero": np.float16}


def pack_zeros(zero_NG: np.ndarray, bits: int) -> np.ndarray:
    """Integer zeros [N, G] as compressed-tensors has them: int32 words [ceil(N * bits / 32), G], packed along rows."""
    return np.ascontiguousarray(pack(zero_NG.T.astype(np.uint8), bits).view("<i4").T)


def _scale_dtype(path: str, spec: Spec) -> Any:
    # transformers decompresses fused experts and asymmetric weights in the dtype of their scale: float32 is exact.
    exact = spec.scale_dtype == "float32" or ".experts." in path or not spec.symmetric
    return np.float32 if exact else ml_dtypes.bfloat16


def _write_tensors(directory: Path, items: Iterable[Item], *, spec: Spec, shard_bytes: int) -> None:
    shard: dict[str, np.ndarray] = {}
    slices: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    total = 0

    def flush() -> None:
        save_file(shard, directory / f"shard-{len(shards):05d}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, value in items:
        entries = list(_stored_tensors(name, value, spec)) if isinstance(value, NestedTensor) else [(name, value)]
        size = sum(array.nbytes for _, array in entries)
        if shard and sum(array.nbytes for array in shard.values()) + size > shard_bytes:
            flush()
        # ascontiguousarray alone would turn a scalar into a vector
        shard.update((key, np.ascontiguousarray(array).reshape(array.shape)) for key, array in entries)
        total += size
        if isinstance(value, NestedTensor):
            for bits, affine in value.slices.items():
                for (key, dtype), part in zip(slice_tensors(name, bits, spec).items(), affine, strict=False):
                    slices[key] = part.astype(dtype)
    flush()
    if slices:
        save_file(slices, directory / SLICES)
    _name_shards(directory, shards, total, index=bool(slices))


def _name_shards(directory: Path, shards: list[list[str]], total: int, *, index: bool) -> None:
    """Give the shards their names; an index lists them if there are several, or if asked for.

    It is asked for beside slices: where there is none, vLLM takes every safetensors file for a part of the model.
    """
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for number, name in enumerate(names):
        (directory / f"shard-{number:05d}").rename(directory / name)
    if index or len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_bytes(json_bytes(content))


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened nested checkpoint: its records, and where each tensor lies. Numbers are read when asked for.

    config: config.json without quantization_config. ignore: linears left unquantised. shapes: path -> (N, K).
    mmap: files are mapped into memory; otherwise everything is read.
    """

    directory: Path
    config: Mapping[str, Any]
    spec: Spec
    ignore: tuple[str, ...]
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    mmap: bool = True
    handles: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # open files, by name
    headers: dict[str, tuple[int, Any]] = field(default_factory=dict, repr=False, compare=False)
    packed_sizes: dict[tuple[str, int], int] = field(default_factory=dict, repr=False, compare=False)  # rule extra

    def array(self, name: str) -> np.ndarray:
        """A stored tensor by its full name, as it lies in the file."""
        if not self.mmap:
            return self.mapped(name, DTYPES[self.stored_dtype(name)])
        file = self.files[name]
        if file not in self.handles:
            self.handles[file] = _open_tensors(self.directory / file)
        try:
            array: np.ndarray = self.handles[file].get_tensor(name)
        except (SafetensorError, AttributeError, TypeError, ValueError) as error:  # a dtype that numpy does not have
            raise InputError(f"{name} in {self.directory / file} cannot be read ({error}); {AGAIN}") from None
        return array

    def stored_dtype(self, name: str) -> str:
        """The dtype of a stored tensor as its file names it: F32, F16, BF16, I32, ..."""
        entry: dict[str, Any] = self._header(name)[1][name]
        return str(entry["dtype"])

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a stored tensor."""
        return tuple(self._header(name)[1][name]["shape"])

    def mapped(self, name: str, dtype: Any) -> np.ndarray:
        """A stored tensor of ``dtype`` as a read-only view of its file, which the system reads when it is looked at.

        Without ``mmap`` it is read now.
        """
        start, header = self._header(name)
        entry = header[name]
        shape, file = tuple(entry["shape"]), self.directory / self.files[name]
        if not self.mmap:
            return read_tensor(file, dtype, start=start + entry["data_offsets"][0], shape=shape)
        return np.memmap(file, dtype, "r", start + entry["data_offsets"][0], shape)

    def _header(self, name: str) -> tuple[int, Any]:
        """Where the data of a tensor's file begin, and its header; each file's is read once."""
        file = self.files[name]
        if file not in self.headers:
            with (self.directory / file).open("rb") as stream:  # safetensors checked it when the checkpoint was opened
                length = int.from_bytes(stream.read(8), "little")
                self.headers[file] = 8 + length, json.loads(stream.read(length))
        return self.headers[file]

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape, of all that is not quantised and, as ``path.weight`` [N, K], of all that is."""
        quantised = {f"{path}.weight": shape for path, shape in self.shapes.items()}
        return quantised | {name: self.stored_shape(name) for name in self.plain_names()}

    def plain_names(self) -> list[str]:
        """Names of the tensors that are not part of a quantised weight."""
        ours = {f"{path}.weight_{part}" for path in self.shapes for part in ("packed", "scale", "shape", "zero_point")}
        return [name for name, file in self.files.items() if name not in ours and file != SLICES]

    def nested(self, path: str, *, mapped: bool = False) -> NestedTensor:
        """The quantised weight at ``path``, numpy arrays; ``mapped``: codes are a read-only view of the file."""
        rows, columns = self.shapes[path]
        stored = self.spec.stored(path)
        scale = self.array(f"{path}.weight_scale").astype(np.float32) / 2 ** (MASTER_BITS - stored)
        zero = np.full_like(scale, 2 ** (MASTER_BITS - 1))
        if f"{path}.weight_zero_point" in self.files:
            zero = unpack(self.array(f"{path}.weight_zero_point").T, MASTER_BITS, rows).T.astype(np.float32)
            zero = np.ascontiguousarray(zero)
        slices = {}
        for bits in self.spec.slices:
            own = [self.array(name).astype(np.float32) for name in slice_tensors(path, bits, self.spec)]
            slices[bits] = own[0], own[1] if len(own) > 1 else np.full_like(own[0], middle(bits))
        packed = f"{path}.weight_packed"
        codes = unpack(self.mapped(packed, "<u4") if mapped else self.array(packed).view("<u4"), stored, columns)
        codes = codes << (MASTER_BITS - stored) if stored < MASTER_BITS else codes
        codes = labels_of(codes, grid=self.spec.grid)
        return NestedTensor(
            codes=codes, scale=scale, zero=zero, rule=self.spec.rule, slices=slices, grid=self.spec.grid
        )


def open_checkpoint(
    directory: Path | str, *, check_hashes: bool = True, check_sizes: bool | None = None, mmap: bool = True
) -> Checkpoint:
    """Open a nested checkpoint after checking its manifest (unless told not to) and its structure.

    check_sizes: of the files, which takes no time; None: with the hashes. mmap False: tensors are read into memory, so
    that a file that is truncated later does no harm.

    Raises InputError naming the file or tensor at fault and what would do.
    """
    check_types(directory=directory, check_hashes=check_hashes, mmap=mmap)
    where = Path(directory)
    check_sizes = check_hashes if check_sizes is None else check_sizes
    manifest = read_manifest(where)
    check_files(where, manifest["files"], sizes=check_sizes, hashes=check_hashes)
    return open_listed(where, manifest, mmap=mmap)


def open_listed(where: Path, manifest: Mapping[str, Any], *, mmap: bool = True) -> Checkpoint:
    """Open a checkpoint whose files have been compared with ``manifest``; InputError unless its structure is right."""
    listed = set(manifest["files"])
    config = read_object(where / "config.json", CONFIG)
    quantised = config.pop("quantization_config", None)
    record = quantised.get("matquant") if isinstance(quantised, dict) else None
    if not isinstance(quantised, dict) or not isinstance(record, dict):
        raise InputError(f'{where / "config.json"} has no "matquant" object; {MADE_BY}')
    spec = Spec.from_json(record, where=str(where / "config.json"))
    if record["format"] != manifest["format"]:
        found = f"{where} is in format {manifest['format']} by {MANIFEST} and in {record['format']} by config.json"
        raise InputError(f"{found}; {AGAIN}")
    listed = set(manifest["files"])
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(_open_tensors(where / file)) for file in _tensor_files(where, listed)}
        files = _tensor_names(where, handles)
        check_depth(config, len(files), where=where / "config.json")
        shapes = _check_structure(where, files, handles, spec)
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
    )


def _untie_stored_head(config: dict[str, Any], names: Mapping[str, str]) -> None:
    """Make ``config`` say that a head which is stored is served: then none is tied, as transformers has it too."""
    if any(name.endswith(HEAD) for name in names):
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part.get("tie_word_embeddings"):
                part["tie_word_embeddings"] = False


def verify_checkpoint(directory: Path | str) -> Checkpoint:
    """Check every hash, shape and scale; returns the checkpoint, or raises InputError."""
    checkpoint = open_checkpoint(directory)
    check_scales(checkpoint)
    return checkpoint


def check_scales(checkpoint: Checkpoint) -> None:
    """InputError naming the path of a scale or zero-point that is not a positive number."""
    for path in checkpoint.shapes:
        tensor = checkpoint.nested(path)
        for scale, zero in ((tensor.scale, tensor.zero), *tensor.slices.values()):
            if not (np.isfinite(scale).all() and np.isfinite(zero).all() and (scale > 0).all()):
                raise InputError(
                    f"{path} has a scale or zero that is not a positive number; write the checkpoint again"
                )


def check_plain(checkpoint: Checkpoint) -> None:
    """InputError naming an unquantised tensor that holds NaN or infinity: stored as it was, but of no use."""
    for name in checkpoint.plain_names():
        if checkpoint.stored_dtype(name) in ANY_FLOAT and not np.isfinite(checkpoint.array(name)).all():
            raise InputError(
                f"{name} of {checkpoint.directory} holds NaN or infinity; repair the float model and quantise it again"
            )


def manifest_sha256(directory: Path | str) -> str:
    """sha256 of a checkpoint's manifest, which holds the hashes of all its files: what a result was measured on."""
    return sha256(Path(directory) / MANIFEST)


def _tensor_files(where: Path, listed: set[str]) -> list[str]:
    """Names of the files that hold tensors: the model's shards and the slices. Only listed files are read."""
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
    return sorted(shards)


def _open_tensors(file: Path) -> Any:
    try:
        return safe_open(file, "np")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} cannot be read ({error}); {AGAIN}") from None


def _tensor_names(where: Path, handles: Mapping[str, Any]) -> dict[str, str]:
    """Tensor name -> file name."""
    files: dict[str, str] = {}
    for file, handle in handles.items():
        for name in handle.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
            if name in files:
                raise InputError(f"{where} has the tensor {name} in {files[name]} and in {file}; {DAMAGED}")
            files[name] = file
    return files


def _check_structure(
    where: Path, files: Mapping[str, str], handles: Mapping[str, Any], spec: Spec
) -> dict[str, tuple[int, int]]:
    """Path -> (N, K) of every quantised weight, after checking that all its tensors have the right shape and dtype."""
    shapes: dict[str, tuple[int, int]] = {}
    parts = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")
    paths = {name.removesuffix(part) for name in files for part in parts if name.endswith(part)}
    if not isinstance(spec.stored_bits, int) and set(spec.stored_bits) != paths:
        other = sorted(set(spec.stored_bits) ^ paths)[0]
        raise InputError(f"{where} has stored_bits of other weights than it holds: {other}; {DAMAGED}")
    for path in sorted(paths):
        name = f"{path}.weight_shape"
        if name not in files:
            raise InputError(f"{where} lacks the tensor {name}; {DAMAGED}")
        stored = handles[files[name]].get_tensor(name)
        if stored.dtype != np.int64:
            dtype = handles[files[name]].get_slice(name).get_dtype()
            raise InputError(f"{name} has dtype {dtype}, {path} needs I64; {DAMAGED}")
        if stored.shape != (2,) or (stored < 1).any():
            raise InputError(f"{name} is {stored.tolist()}, not the size of a matrix; {DAMAGED}")
        rows, columns = (int(n) for n in stored)
        if columns % (spec.group_size or 1):
            raise InputError(
                f"{where} has group_size={spec.group_size}, "
                f"which does not divide in_features={columns} of {path}; {DAMAGED}"
            )
        for name, wanted in _expected_tensors(path, rows, columns, spec).items():
            if name not in files:
                raise InputError(f"{where} lacks the tensor {name}; {DAMAGED}")
            entry = handles[files[name]].get_slice(name)
            if entry.get_dtype() != wanted[1]:
                raise InputError(f"{name} has dtype {entry.get_dtype()}, {path} needs {wanted[1]}; {DAMAGED}")
            if list(entry.get_shape()) != wanted[0]:
                raise InputError(
                    f"{name} has shape {list(entry.get_shape())}, "
                    f"{path} of {rows} x {columns} needs {wanted[0]}; {DAMAGED}"
                )
        shapes[path] = (rows, columns)
    if not shapes:
        raise InputError(f"{where} holds no quantised weight; {DAMAGED}")
    return shapes


def _expected_tensors(path: str, rows: int, columns: int, spec: Spec) -> dict[str, tuple[list[int], str]]:
    """Tensor name -> (shape, dtype) of a quantised weight, besides its weight_shape."""
    groups = columns // (spec.group_size or columns)
    scale_dtype = "F32" if _scale_dtype(path, spec) is np.float32 else "BF16"
    expected = {
        f"{path}.weight_packed": ([rows, words(columns, spec.stored(path))], "I32"),
        f"{path}.weight_scale": ([rows, groups], scale_dtype),
    }
    if not spec.symmetric:
        expected[f"{path}.weight_zero_point"] = ([words(rows, MASTER_BITS), groups], "I32")
    dtypes = {ml_dtypes.bfloat16: "BF16", np.float16: "F16"}
    for bits in spec.slices:
        for name, dtype in slice_tensors(path, bits, spec).items():
            expected[name] = ([rows, groups], dtypes[dtype])
    return expected


# ------------------------------------------------------------------------------------------------------------ sizes


def size_bytes(checkpoint: Checkpoint, path: str, bits: int) -> float:
    """Honest bytes of one weight served at ``bits`` bits: packed codes, its scale, its zero if stored, its shape.

    Under rule ``extra`` the codes take what core/overflow.py stores, counted once for each width (the paper's own
    count, r + overflow fraction bits, leaves out which weights overflow).
    """
    rows, columns = checkpoint.shapes[path]
    groups = columns // (checkpoint.spec.group_size or columns)
    if bits in checkpoint.spec.slices:
        dtypes = list(slice_tensors(path, bits, checkpoint.spec).values())
    else:
        dtypes = [_scale_dtype(path, checkpoint.spec), *([] if checkpoint.spec.symmetric else [np.uint8])]
    per_group = sum(int(np.dtype(dtype).itemsize) for dtype in dtypes)
    shape_entry = 16
    packed = rows * columns * min(bits, checkpoint.spec.stored(path)) / 8
    if checkpoint.spec.rule == "extra" and bits < MASTER_BITS:
        if (path, bits) not in checkpoint.packed_sizes:
            codes = slice_codes(checkpoint.nested(path).codes, bits, rule="extra")
            checkpoint.packed_sizes[path, bits] = packed_bytes(codes, bits)
        packed = checkpoint.packed_sizes[path, bits]
    return packed + rows * groups * per_group + shape_entry


def plan_bytes(checkpoint: Checkpoint, plan: Mapping[str, int]) -> float:
    """Honest bytes of all quantised weights at ``plan`` (path -> bits)."""
    return sum(size_bytes(checkpoint, path, bits) for path, bits in plan.items())


def bits_per_weight(checkpoint: Checkpoint, plan: Mapping[str, int]) -> float:
    """Honest bits per quantised weight of a whole model at ``plan`` (path -> bits)."""
    weights = sum(rows * columns for rows, columns in checkpoint.shapes.values())
    return 8 * plan_bytes(checkpoint, plan) / weights


def plain_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the tensors that are not quantised (embeddings, norms, biases, linears out of scope)."""
    return sum(checkpoint.array(name).nbytes for name in checkpoint.plain_names())
