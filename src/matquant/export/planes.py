"""The planes layout: the same checkpoint in files that can be fetched from the top bits down (plane_files.py)."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matquant.core.nest import MASTER_BITS, check_bits
from matquant.format.manifest import FOLDER, MANIFEST, read_manifest
from matquant.format.plane_write import keep_planes, shards_of, write_planes
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.format.write import check_writable
from matquant.system.errors import InputError
from matquant.system.files import check_space, replace_directory_when_done
from matquant.system.locks import check_place

NAME = "planes"  # of the format
SPARE_BYTES = 10**6  # space for the small files


def export_planes(
    directory: Path | str,
    out: Path | str,
    *,
    bits: int = MASTER_BITS,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a checkpoint's small files and its planes, those that widths up to ``bits`` need.

    ``matquant assemble`` makes the checkpoint of it again, byte for byte. report: called with the bytes written so far
    and the total. Returns what ``export`` does.
    """
    began = time.perf_counter()
    check_bits(bits)
    target = check_place(out)
    check_writable(target, overwrite=overwrite)
    checkpoint = open_checkpoint(directory)
    if checkpoint.planes is not None:
        raise InputError(f"{directory} holds planes already; copy it, or make the shards first with: matquant assemble")
    shards = shards_of(checkpoint)
    total = sum((checkpoint.directory / name).stat().st_size for name in shards)
    check_space(target, total + SPARE_BYTES)
    written = 0

    def count(size: int) -> None:
        nonlocal written
        written += size
        report(min(written, total), total)

    with replace_directory_when_done(target, lambda: check_writable(target, overwrite=overwrite)) as partial:
        for name in [MANIFEST, *read_manifest(checkpoint.directory)["files"]]:
            if name not in shards:
                shutil.copyfile(checkpoint.directory / name, partial / name)
        write_planes(checkpoint, partial, report=count)
        keep_planes(partial, bits=bits, rule=checkpoint.spec.rule)
        kept = sum(file.stat().st_size for file in (partial / FOLDER).iterdir())
    return {
        "out": str(target),
        "bytes": kept,
        "seconds": time.perf_counter() - began,
        "bits_per_weight": bits_per_weight(checkpoint, checkpoint.widths(bits)),
        "containers": {f"planes of int{bits}": len(checkpoint.shapes)},
    }
