"""Write big files tensor by tensor: safetensors shards whose tensors are made just before they are written.

A few threads make tensors a little ahead of the writer, so peak memory is a few tensors, however large the model.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from matquant.format.read import Checkpoint
from matquant.format.tensor_file import DTYPES
from matquant.system.files import json_bytes

AHEAD = 2  # number of threads, and of parts in memory besides the one being written
SHARD_BYTES = 5 * 10**9  # transformers' default
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
PYTORCH = {"format": "pt"}  # header entry that transformers expects
Report = Callable[[int], None]  # called with the bytes written since the last call


@dataclass(frozen=True)
class Slot:
    """A tensor to write: its name, its dtype as safetensors names it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return int(np.dtype(DTYPES[self.dtype]).itemsize) * math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """Tensors that are made together: their slots, and the function that makes them, in that order."""

    slots: tuple[Slot, ...]
    make: Callable[[], Sequence[np.ndarray]] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(slot.bytes for slot in self.slots)


def held(arrays: Mapping[str, np.ndarray]) -> list[Part]:
    """Return the parts of tensors in memory, in the order of ``sorted_parts``."""

    def part(name: str, array: np.ndarray) -> Part:
        return Part((Slot(name, NAMES[array.dtype], array.shape),), lambda: [array])

    return sorted_parts(part(name, array) for name, array in arrays.items())


def sorted_parts(parts: Iterable[Part]) -> list[Part]:
    """Return parts in the order of the safetensors package: wide dtypes first, then by name.

    So every tensor begins at a multiple of its item size.
    """
    ranks = {name: rank for rank, name in enumerate(DTYPES)}
    return sorted(parts, key=lambda found: (-ranks[found.slots[0].dtype], found.slots[0].name))


def as_stored(checkpoint: Checkpoint, name: str) -> Part:
    """Return a tensor of the checkpoint unchanged."""
    slot = Slot(name, checkpoint.stored_dtype(name), checkpoint.stored_shape(name))
    return Part((slot,), lambda: [checkpoint.array(name)])


def shard_names(count: int) -> list[str]:
    """Return the file names of a model in ``count`` shards."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def made(parts: Iterable[Part]) -> Iterator[tuple[Part, Sequence[np.ndarray]]]:
    """Yield every part with its arrays, in order; threads make at most AHEAD parts besides the one yielded."""
    waiting: deque[tuple[Part, Any]] = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        for part in parts:
            waiting.append((part, pool.submit(part.make)))
            if len(waiting) > AHEAD:
                first, arrays = waiting.popleft()
                yield first, arrays.result()
        while waiting:
            first, arrays = waiting.popleft()
            yield first, arrays.result()


def write_shards(
    directory: Path, parts: Sequence[Part], *, report: Report, index: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write all parts as model.safetensors in ``directory``, or as shards. index: write one even for a single shard."""
    shards: list[list[Part]] = [[]]
    for part in parts:
        if shards[-1] and sum(p.bytes for p in shards[-1]) + part.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(part)
    names = shard_names(len(shards))
    if index or len(shards) > 1:
        places = zip(names, shards, strict=True)
        weight_map = {slot.name: name for name, shard in places for part in shard for slot in part.slots}
        content = {"metadata": {"total_size": sum(part.bytes for part in parts)}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_bytes(json_bytes(content))
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard, report=report)


def write_safetensors(
    file: Path,
    parts: Sequence[Part],
    *,
    report: Report = lambda written: None,
    metadata: Mapping[str, str] | None = PYTORCH,
) -> None:
    """Write one safetensors file, part by part. metadata: goes into its header."""
    with file.open("wb") as stream:
        stream.write(_header(parts, metadata))
        for part, arrays in made(parts):
            for slot, array in zip(part.slots, arrays, strict=True):
                assert (array.dtype, array.shape) == (DTYPES[slot.dtype], slot.shape), (slot, array.dtype, array.shape)
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            report(part.bytes)


def write_zeros(file: Path, parts: Sequence[Part]) -> None:
    """Write a safetensors file with these names, dtypes and shapes whose numbers are all 0 and take no space."""
    header = _header(parts, PYTORCH)
    with file.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + sum(part.bytes for part in parts))


def _header(parts: Sequence[Part], metadata: Mapping[str, str] | None) -> bytes:
    """Return the start of a safetensors file, up to its data."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for slot in (slot for part in parts for slot in part.slots):
        header[slot.name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": [end, end + slot.bytes]}
        end += slot.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data start at a multiple of 8
    return len(text).to_bytes(8, "little") + text
