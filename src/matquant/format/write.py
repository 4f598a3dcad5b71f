"""Write a nested checkpoint: a Hugging Face directory that other tools read as a stock int8 model.

It holds the tensors of layout.py in shards, the stock quantization_config with our Spec as the extra key "matquant",
and a manifest of sha256 sums. Everything goes shard by shard into a temporary sibling directory, is synced, hashed,
then renamed into place: a crash leaves the old checkpoint or the new one. One shard is in memory at a time. Pickle is
never used. docs/format.md specifies the files byte by byte.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.format.layout import SLICES, slice_tensors, stored_tensors
from matquant.format.manifest import INDEX, MANIFEST, write_manifest
from matquant.format.shards import SHARD_BYTES, held, shard_names, write_safetensors
from matquant.system.arguments import check_types
from matquant.system.files import check_replaceable, json_bytes, replace_directory_when_done
from matquant.system.locks import check_place

Item = tuple[str, "np.ndarray | NestedTensor"]
# A quantization_config that stock transformers rejects, with up to 50 characters of the status. Otherwise it would
# leave experts that it does not find with random numbers, and only log a warning.
NOT_STOCK = {
    "quant_method": "compressed-tensors",
    "format": "matquant",
    "quantization_status": "load with matquant.MatQuantConfig",
    "config_groups": {"group_0": {"targets": ["Linear"]}},
}


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
    config: the model's config.json; ignore: module names of linear layers that stay unquantised; files: further files
    by name (tokenizer, logs). Raises InputError, and leaves nothing behind, if ``directory`` exists and ``overwrite``
    is false, or the disk is full.
    """
    check_types(directory=directory, overwrite=overwrite)
    target = check_place(directory)  # a link is followed: the checkpoint it points to is replaced
    with replace_directory_when_done(target, lambda: check_writable(target, overwrite=overwrite)) as partial:
        exact = spec.head_bits is not None and config.get("dtype") != "bfloat16"
        _write_tensors(partial, items, spec=spec, shard_bytes=shard_bytes, exact=exact)
        quantised = {**config, "quantization_config": quantization_config(spec, ignore)}
        (partial / "config.json").write_bytes(json_bytes(quantised))
        for name, content in files.items():
            (partial / name).write_bytes(content)
        write_manifest(partial, spec)


def check_writable(target: Path, *, overwrite: bool) -> None:
    """Raise InputError if ``target`` exists without ``overwrite``, or is not a checkpoint of ours."""
    check_replaceable(target, MANIFEST, "a matquant checkpoint", overwrite=overwrite)


def quantization_config(spec: Spec, ignore: Iterable[str]) -> dict[str, Any]:
    """Return the stock compressed-tensors quantization_config, with our Spec as the extra key "matquant"."""
    stored = spec.stored_bits
    widths = {stored} if isinstance(stored, int) else set(stored.values())
    groups = {
        (bits, spec.symmetric): [] if isinstance(stored, int) else [path for path in stored if stored[path] == bits]
        for bits in sorted(widths, reverse=True)
    }
    kinds = ("Linear",) if spec.head_bits is None else ("Linear", "Embedding")
    config = stock_config(groups, group_size=spec.group_size, ignore=ignore, kinds=kinds)
    if not spec.symmetric or spec.head_bits is not None:
        # Unless it dequantises while loading, transformers 5.23 gives packed zero-points wrong shapes, does not
        # decompress embeddings and does not tie a compressed head.
        config["dequantize"] = True
    if spec.experts is not None and not spec.experts.stock:
        config = NOT_STOCK | {"ignore": config["ignore"]}
    return config | {"matquant": spec.to_json()}


def stock_config(
    groups: Mapping[tuple[int, bool], Sequence[str]],
    *,
    group_size: int | None,
    ignore: Iterable[str],
    kinds: Sequence[str] = ("Linear",),
) -> dict[str, Any]:
    """Return a quantization_config of compressed-tensors, ``pack-quantized``.

    groups: (bits, symmetric) -> the paths stored so; the paths of a single group are not listed: it holds all modules
    of these kinds.
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
        targets = list(kinds) if len(groups) == 1 else [f"re:^{re.escape(path)}$" for path in paths]
        config_groups[f"group_{number}"] = {"targets": targets, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": sorted(ignore),
    }


def _write_tensors(directory: Path, items: Iterable[Item], *, spec: Spec, shard_bytes: int, exact: bool) -> None:
    shard: dict[str, np.ndarray] = {}
    slices: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    total = 0

    def flush() -> None:
        write_safetensors(directory / f"shard-{len(shards):05d}", held(shard))
        shards.append(list(shard))
        shard.clear()

    for name, value in items:
        entries = _entries(name, value, spec, exact=exact)
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
        write_safetensors(directory / SLICES, held(slices), metadata=None)
    _name_shards(directory, shards, total, index=bool(slices))


def _entries(name: str, value: np.ndarray | NestedTensor, spec: Spec, *, exact: bool) -> list[tuple[str, np.ndarray]]:
    """Return the tensors of an item that go into the shards."""
    return list(stored_tensors(name, value, spec, exact=exact)) if isinstance(value, NestedTensor) else [(name, value)]


def _name_shards(directory: Path, shards: list[list[str]], total: int, *, index: bool) -> None:
    """Name the shards; write an index if there are several, or with ``index``.

    Slices need an index: without one, vLLM reads every safetensors file as a part of the model.
    """
    names = shard_names(len(shards))
    for number, name in enumerate(names):
        (directory / f"shard-{number:05d}").rename(directory / name)
    if index or len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_bytes(json_bytes(content))
