"""Save an interrupted run's tensors with a hash over all tensors and metadata.

The file is safetensors with one additional metadata entry, SEAL: the sha256 over the other metadata and, by name, the
dtype, shape and bytes of every tensor. If any bit has flipped, reading fails.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from matquant.format.shards import held, write_safetensors
from matquant.hf_torch.arrays import to_numpy
from matquant.system.errors import InputError
from matquant.system.files import replace_when_done

SEAL = "sha256"


def save_sealed(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to ``file``, atomically."""
    kept = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    with replace_when_done(file) as partial:
        arrays = {name: to_numpy(tensor) for name, tensor in kept.items()}
        write_safetensors(partial, held(arrays), metadata={**metadata, SEAL: _digest(metadata, kept.items())})


@contextlib.contextmanager
def open_sealed(file: Path, *, remedy: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Open a file that ``save_sealed`` wrote; yield it as ``safe_open`` does, and its metadata.

    Reads the whole file first, one tensor in memory at a time. InputError if a bit has changed; remedy: what to do
    then.
    """
    try:
        opened = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged ({error}); {remedy}") from None
    with opened as stored:
        metadata = dict(stored.metadata() or {})
        expected = metadata.pop(SEAL, None)
        found = _digest(metadata, ((name, stored.get_tensor(name)) for name in sorted(stored.keys())))
        if expected is None:
            raise InputError(f"{file} is damaged (it holds no hash); {remedy}")
        if found != expected:
            raise InputError(f"{file} is damaged (sha256 {found[:12]}…, recorded {expected[:12]}…); {remedy}")
        yield stored, metadata


def _digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    result = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in tensors:
        result.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        result.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
