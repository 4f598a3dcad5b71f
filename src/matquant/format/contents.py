"""Summarise a checkpoint: rule, bits per weight (all overhead included), overflow, histograms. Needs no torch."""

from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from matquant.core.nest import MASTER_BITS, OWN, slice_codes
from matquant.format.read import Checkpoint
from matquant.format.sizes import bits_per_weight, plain_bytes, plan_bytes

BARS = " ▁▂▃▄▅▆▇█"
WIDEST_HISTOGRAM = 32  # columns


def summarise(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return sizes, bits per weight, overflow and histograms of the codes at every width that is there, 8..1.

    bits_per_weight and bytes include packed codes, scales, zero-points, shapes and (rule ``extra``) the overflow set as
    core/overflow.py counts it. ``paper_bits`` is the paper's count, r + overflow fraction (2.05 at int2 in Table 7),
    without scales and without the positions of overflowing weights.
    """
    counts = code_counts(checkpoint)
    total = int(counts.sum())
    rest = plain_bytes(checkpoint)
    widths = {}
    for bits in range(checkpoint.max_bits, 0, -1):
        plan = checkpoint.widths(bits)
        histogram = slice_counts(counts, bits, rule=checkpoint.spec.rule)
        overflow = float(histogram[2**bits :].sum()) / total
        size = plan_bytes(checkpoint, plan)
        widths[bits] = {
            "bytes": size,
            "model_bytes": size + rest,
            "bits_per_weight": bits_per_weight(checkpoint, plan),
            "overflow": overflow,
            "paper_bits": bits + overflow,
            "histogram": histogram.tolist(),
        }
    return {"weights": total, "plain_bytes": rest, "file_bytes": file_bytes(checkpoint), "widths": widths}


def code_counts(checkpoint: Checkpoint) -> np.ndarray:
    """Count how often each of the 256 codes occurs, over all quantised weights."""
    counts = np.zeros(256, dtype=np.int64)
    for path in checkpoint.shapes:
        counts += np.bincount(checkpoint.nested(path).codes.ravel(), minlength=256)
    return counts


def slice_counts(counts: np.ndarray, bits: int, *, rule: str) -> np.ndarray:
    """Return how often each ``bits``-bit code occurs, int64, from the counts of the 256 codes."""
    sliced = slice_codes(np.arange(256, dtype=np.uint8), bits, rule=rule)
    return np.bincount(sliced, weights=counts).astype(np.int64)


def render(checkpoint: Checkpoint, summary: dict[str, Any]) -> RenderableType:
    """Return the summary as tables: facts first, then one row per width."""
    spec = checkpoint.spec
    facts = Table.grid(padding=(0, 2))
    own = ", ".join(map(str, spec.slices)) or "none"
    kind = "affines" if spec.zeros == OWN else "scales"
    group = "one per output channel" if spec.group_size is None else f"{spec.group_size} weights"
    for name, value in (
        ("checkpoint", str(checkpoint.directory)),
        (
            "method",
            f"{spec.method} {spec.objective}" + (f" baseline int{spec.baseline_bits}" if spec.baseline_bits else ""),
        ),
        ("trained widths", ", ".join(map(str, spec.widths)) or "none"),
        ("rule", f"{spec.rule}, grid {spec.grid}"),
        ("grid", f"{'symmetric' if spec.symmetric else 'asymmetric'}, groups: {group}; per-width {kind} at: {own}"),
        ("quantised", f"{summary['weights']:,} weights in {len(checkpoint.shapes)} layers ({spec.scope})"),
        ("not quantised", f"{summary['plain_bytes']:,} bytes"),
        ("on disk", f"{summary['file_bytes']:,} bytes of tensors for {_held(checkpoint)}"),
    ):
        facts.add_row(name, value)
    table = Table()
    for column in ("width", "bytes", "whole model", "bits/weight"):
        table.add_column(column, justify="right")
    if spec.rule == "extra":
        table.add_column("paper's bits", justify="right")
        table.add_column("overflow", justify="right")
    table.add_column("codes 0 … top")
    for bits, row in summary["widths"].items():
        cells = [f"int{bits}", f"{row['bytes']:,.0f}", f"{row['model_bytes']:,.0f}", f"{row['bits_per_weight']:.3f}"]
        if spec.rule == "extra":
            cells += [f"{row['paper_bits']:.3f}", f"{row['overflow']:.2%}"]
        table.add_row(*cells, sparkline(row["histogram"]))
    return Group(facts, table)


def _held(checkpoint: Checkpoint) -> str:
    """Return which widths are on disk."""
    if checkpoint.max_bits == MASTER_BITS:
        return "all widths" if checkpoint.planes is None else "all widths, as planes"
    return f"widths up to int{checkpoint.max_bits}, as planes"


def sparkline(counts: list[int]) -> str:
    """Return a histogram as a line of at most WIDEST_HISTOGRAM block characters, the tallest bar full."""
    values = np.asarray(counts, dtype=np.float64)
    if len(values) > WIDEST_HISTOGRAM:
        values = np.array([part.sum() for part in np.array_split(values, WIDEST_HISTOGRAM)])
    heights = np.ceil(values / values.max() * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights)


def file_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the tensor files on disk, which hold all widths."""
    files = {checkpoint.directory / file for file in checkpoint.files.values()}
    return sum(file.stat().st_size for file in files)
