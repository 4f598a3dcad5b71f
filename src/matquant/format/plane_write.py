"""Write the planes of a checkpoint, and assemble the checkpoint from them again, byte for byte.

Every part and every shard is written tensor by tensor, so memory is that of a few weights. Before a weight is cut into
planes it is checked that its codes can be put together again as they were stored.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.nest import MASTER_BITS, stored_codes
from matquant.core.packing import pack, words
from matquant.format.manifest import AGAIN, FOLDER, check_files, hashed, read_manifest, regular_file
from matquant.format.plane_files import (
    FORMAT,
    PLANE_BITS,
    RECORD,
    find_planes,
    header_name,
    kind_of,
    pack_plane,
    part_name,
    parts_of,
    plane_tensors,
    planes_read,
)
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.format.shards import Part, Report, Slot, as_stored, made, sorted_parts, write_safetensors
from matquant.format.tensor_file import DTYPES
from matquant.system.errors import InputError
from matquant.system.files import check_space, json_bytes, replace_when_done, sha256
from matquant.system.locks import hold

PACKED = ".weight_packed"


# ------------------------------------------------------------------------------------------------------------- writing


def write_planes(checkpoint: Checkpoint, folder: Path, *, report: Report = lambda written: None) -> None:
    """Write all parts of a checkpoint and their record into ``folder``/planes, which must not exist.

    report: called with the bytes written since the last call. InputError if codes were stored in a way that cannot be
    restored from planes (bits in the padding, codes that the grid does not use).
    """
    (folder / FOLDER).mkdir()
    shards = shards_of(checkpoint)
    for number, shard in enumerate(shards, 1):
        names = [name for name, file in checkpoint.files.items() if file == shard]
        for kind, parts in _parts(checkpoint, shard, names).items():
            if parts:
                write_safetensors(folder / FOLDER / part_name(kind, number), parts, report=report, metadata=None)
    entries = read_manifest(checkpoint.directory)["files"]
    record = {
        "format": FORMAT,
        "files": hashed(sorted((folder / FOLDER).iterdir())),
        "shards": {shard: entries[shard] for shard in shards},
    }
    (folder / RECORD).write_bytes(json_bytes(record))


def shards_of(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the files that hold codes and other tensors of the model, sorted."""
    packed = {file for name, file in checkpoint.files.items() if name.endswith(PACKED)}
    return sorted(packed | {checkpoint.files[name] for name in checkpoint.plain_names()})


def _parts(checkpoint: Checkpoint, shard: str, names: Sequence[str]) -> dict[str, list[Part]]:
    """Return the tensors of each kind of part of a shard, in the order of its file."""
    header = np.frombuffer(_header(checkpoint.directory / shard), np.uint8)
    kinds: dict[str, list[Part]] = {"rest": [Part((Slot(header_name(shard), "U8", header.shape),), lambda: [header])]}
    kinds |= {f"p{plane}": [] for plane in range(len(PLANE_BITS))}
    for name in names:
        path = name.removesuffix(PACKED)
        if path not in checkpoint.shapes or path == name:
            if checkpoint.stored_dtype(name) not in DTYPES:
                raise InputError(f"{name} has dtype {checkpoint.stored_dtype(name)}; use one of {', '.join(DTYPES)}")
            kinds["rest"].append(as_stored(checkpoint, name))
            continue
        for plane, (tensor, shape) in enumerate(plane_tensors(path, checkpoint.shapes[path], checkpoint.spec).items()):
            part = Part((Slot(tensor, "U8", shape),), _maker(checkpoint, path, plane))
            kinds[kind_of(path, plane, checkpoint.spec)].append(part)
    return {kind: sorted_parts(parts) for kind, parts in kinds.items()}


def _maker(checkpoint: Checkpoint, path: str, plane: int) -> Callable[[], Sequence[np.ndarray]]:
    def make() -> Sequence[np.ndarray]:
        codes_NK = checkpoint.nested(path, mapped=True).codes
        if plane == 0 and not np.array_equal(
            _words(checkpoint, path, codes_NK), checkpoint.mapped(f"{path}{PACKED}", "<i4")
        ):
            raise InputError(
                f"{path}{PACKED} of {checkpoint.directory} has bits that no code uses, which planes do not keep; "
                "write the checkpoint again"
            )
        return [pack_plane(codes_NK, plane)]

    return make


def _words(checkpoint: Checkpoint, path: str, codes_NK: np.ndarray) -> np.ndarray:
    """Return the words in which the labels of a weight are stored, int32 [N, ceil(K * stored bits / 32)]."""
    stored = checkpoint.spec.stored(path)
    return pack(stored_codes(codes_NK, grid=checkpoint.spec.grid) >> (MASTER_BITS - stored), stored).view("<i4")


def _header(file: Path) -> bytes:
    """Return the start of a safetensors file, up to its data."""
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


def keep_planes(folder: Path, *, bits: int, rule: str) -> None:
    """Delete the parts that widths up to ``bits`` do not need."""
    names = json.loads((folder / RECORD).read_bytes())["files"]
    for name in set(names) - set(parts_of(names, planes_read(bits, rule))):
        (folder / FOLDER / name).unlink()


# ----------------------------------------------------------------------------------------------------------- assembling


def assemble(directory: Path | str, *, report: Report = lambda written: None) -> list[str]:
    """Replace the planes of a checkpoint by the shards that they were made of, byte for byte; return their names.

    All planes must be there. Every shard is compared with its sha256 in the manifest before it takes its name; an
    interrupted run continues where it was. InputError otherwise, and nothing is changed.
    """
    where = Path(directory)
    manifest = read_manifest(where)
    with hold(where, again=True):
        planes = find_planes(where, manifest)
        if planes is None and regular_file(where, RECORD) is None:
            raise InputError(f"{where} has no planes to assemble; give a directory that matquant pull wrote")
        names = [] if planes is None else list(planes.shards)
        if planes is not None:
            checkpoint = open_checkpoint(where)
            missing = [name for name in names if not _is_there(where, name, planes.shards[name])]
            check_space(where, sum(planes.shards[name]["bytes"] for name in missing))
            for name in missing:
                with replace_when_done(where / name) as partial:
                    _write_shard(checkpoint, name, partial, planes.shards[name], report)
        check_files(where, manifest["files"], hashes=planes is None)
        shutil.rmtree(where / FOLDER)
    return names


def _is_there(where: Path, name: str, entry: Mapping[str, Any]) -> bool:
    """Return whether an interrupted run has written a shard."""
    file = regular_file(where, name)
    return file is not None and file.stat().st_size == entry["bytes"] and sha256(file) == entry["sha256"]


def _write_shard(checkpoint: Checkpoint, shard: str, file: Path, entry: Mapping[str, Any], report: Report) -> None:
    """Write a shard from its planes; InputError if it is not the one that the manifest lists."""
    header = checkpoint.array(header_name(shard)).tobytes()
    digest = hashlib.sha256(header)
    with file.open("wb") as stream:
        stream.write(header)
        for part, (array,) in made(_shard_parts(checkpoint, shard, header)):
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            stream.write(content)
            digest.update(content)
            report(part.bytes)
    if digest.hexdigest() != entry["sha256"]:
        raise InputError(
            f"the planes in {checkpoint.directory / FOLDER} do not make the {shard} that the manifest lists; {AGAIN}"
        )


def _shard_parts(checkpoint: Checkpoint, shard: str, header: bytes) -> Iterator[Part]:
    """Yield the tensors of a shard in the order of its file."""
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InputError(f"{header_name(shard)} is not the header of a shard; {AGAIN}") from None
    for name in names:
        path = name.removesuffix(PACKED)
        if path != name and path in checkpoint.shapes:
            rows, columns = checkpoint.shapes[path]
            slot = Slot(name, "I32", (rows, words(columns, checkpoint.spec.stored(path))))
            yield Part((slot,), _assembler(checkpoint, path))
        elif name in checkpoint.files:
            yield as_stored(checkpoint, name)
        else:
            raise InputError(f"{checkpoint.directory / FOLDER} lacks the tensor {name} of {shard}; {AGAIN}")


def _assembler(checkpoint: Checkpoint, path: str) -> Callable[[], Sequence[np.ndarray]]:
    return lambda: [_words(checkpoint, path, checkpoint.nested(path, mapped=True).codes)]
