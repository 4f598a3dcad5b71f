"""The two maps of the report: the widths of a plan by layer, and the sensitivity of every module path."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matquant.core.nest import MASTER_BITS
from matquant.format.read import Checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.report.values import is_number, numbers, read_object, width_order
from matquant.system.errors import InputError

HEATS = 9  # shades of the heat map


def width_map(name: str, bits: Mapping[str, int], checkpoint: Checkpoint) -> dict[str, Any]:
    """Return a plan's widths, decoder layers x linear layers; a range if a fused block has several widths."""
    cells: dict[str, dict[str, list[int]]] = {}
    for path, width in bits.items():
        layer, kind = _place(path)
        cells.setdefault(layer, {}).setdefault(kind, []).append(width)
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))

    def cell(widths: list[int] | None) -> tuple[str, int]:
        if not widths:
            return "", 0
        low, high = min(widths), max(widths)
        return (f"{low}" if low == high else f"{low}–{high}"), round(sum(widths) / len(widths))

    layers = sorted(cells, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0, layer))
    return {
        "name": name,
        "bits_per_weight": bits_per_weight(checkpoint, bits),
        "kinds": kinds,
        "rows": [(layer, [cell(cells[layer].get(kind)) for kind in kinds]) for layer in layers],
    }


def _place(path: str) -> tuple[str, str]:
    """Return (decoder layer, linear layer within it) of a path; experts share one name."""
    found = re.search(r"\.(\d+)\.(.+)", f".{path}")
    return (found[1], re.sub(r"\.\d+(?=\.|$)", ".*", found[2])) if found else ("other", path)


def sensitivities(file: Path, sha256: str) -> Mapping[str, Any]:
    """Return path -> {width: KL} from {"sensitivity": ...}, or from the losses that matquant plan stores beside a
    checkpoint.

    Stored losses belong to whole plans: one digit per width, in the order of "paths". A path's sensitivity is that of
    the smallest group within a decoder layer that contains it and had the width while all else was at 8 bits.
    """
    values = read_object(file, "--sensitivity")
    if isinstance(values.get("sensitivity"), dict):
        return dict(values["sensitivity"])
    paths, sets = values.get("paths"), values.get("losses")
    if not isinstance(paths, list) or not isinstance(sets, list):
        raise InputError(
            f'--sensitivity {file} has neither "sensitivity" nor "losses"; '
            'give {"sensitivity": {path: {width: KL}}} or the file that matquant plan stores beside the checkpoint'
        )
    names = [str(path) for path in paths]
    ours = [known for known in sets if isinstance(known, dict) and known.get("checkpoint_sha256") == sha256]
    measured = ours[-1].get("measured") if ours else None
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    sizes: dict[tuple[str, str], int] = {}
    for digits, losses in measured.items() if isinstance(measured, dict) else ():
        group = [name for name, digit in zip(names, str(digits), strict=False) if digit != str(MASTER_BITS)]
        widths = set(str(digits)) - {str(MASTER_BITS)}
        layers = {_place(name)[0] for name in group}
        if len(widths) == 1 and len(layers) == 1 and isinstance(losses, list) and losses and is_number(losses[0]):
            width = widths.pop()
            for name in group:
                if len(group) < sizes.get((name, width), len(names) + 1):
                    sizes[name, width] = len(group)
                    found[name][width] = losses[0]
    return found


def heat_map(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return KL and its shade, paths x widths, logarithmic from smallest to largest; None without numbers."""
    table = {str(path): numbers(row) for path, row in values.items()}
    widths = sorted({width for row in table.values() for width in row}, key=width_order)
    positive = [value for row in table.values() for value in row.values() if value > 0]
    if not positive:
        return None
    low, high = math.log(min(positive)), math.log(max(positive))

    def cell(value: float | None) -> tuple[str, int]:
        if value is None:
            return "", -1
        place = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
        return f"{value:.2g}", min(int(place * HEATS), HEATS - 1)

    return {
        "widths": widths,
        "rows": [(path, [cell(row.get(width)) for width in widths]) for path, row in table.items()],
    }
