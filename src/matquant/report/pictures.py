"""Compute the coordinates of the report's pictures: a line chart and histograms of codes."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.nest import MASTER_BITS
from matquant.format.contents import slice_counts
from matquant.format.read import Checkpoint
from matquant.report.facts import shown_widths
from matquant.report.values import is_number, numbers, plan_name, read_object

MASTER_CODES = 2**MASTER_BITS
SPAN = 3.0  # nats above the best value that a picture shows, as in matquant eval --plot
CHART = (480, 320)  # a picture's own units; left and lower margins below hold the labels
MARGIN = (58, 12, 12, 44)  # left, top, right, bottom
Curves = dict[str, list[tuple[float, float]]]  # name -> (bits per weight, nats)


def curves(pareto: Path | None, records: Mapping[str, Mapping[str, Any]]) -> tuple[Curves, float | None]:
    """Return name -> [(bits per weight, nats)] from the Pareto file or the evaluations, and the float model's nats."""
    found: Curves = {}
    if pareto is not None:
        values = read_object(pareto, "--pareto", "curves")
        baselines = values.get("baselines")
        for name, curve in (*values["curves"].items(), *(baselines.items() if isinstance(baselines, dict) else ())):
            if isinstance(curve, list) and all(isinstance(point, dict) for point in curve):
                found[str(name)] = _points((p.get("bits_per_weight"), p.get("log_perplexity")) for p in curve)
            elif isinstance(curve, list) and len(curve) == 2 and all(isinstance(side, list) for side in curve):
                found[str(name)] = _points(zip(*curve, strict=False))
        reference = values.get("reference")
    else:
        for name, record in records.items():
            losses, sizes = numbers(record.get("log_perplexity")), numbers(record.get("bits_per_weight"))
            pairs = {width: (sizes[width], loss) for width, loss in losses.items() if width in sizes}
            found[f"{name}, uniform widths"] = _points(pair for width, pair in pairs.items() if width.isdigit())
            label = plan_name(record)
            found[f"{name}, {label}" if label != name else name] = _points(
                pair for width, pair in pairs.items() if not width.isdigit()
            )
        reference = next((record["reference"] for record in records.values() if record.get("reference")), None)
    return {name: points for name, points in found.items() if points}, reference if is_number(reference) else None


def _points(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    return sorted((float(x), float(y)) for x, y in pairs if is_number(x) and is_number(y))


def chart(curves: Curves, reference: float | None) -> dict[str, Any] | None:
    """Return the coordinates of a line chart in CHART units: axes, ticks, and a polyline with marks for every curve."""
    if not curves:
        return None
    points = [point for curve in curves.values() for point in curve]
    lowest = min([y for _, y in points] + ([reference] if reference is not None else []))
    y_low, y_high = lowest - 0.05, min(max(y for _, y in points), lowest + SPAN) + 0.05
    x_low, x_high = math.floor(min(x for x, _ in points)), math.ceil(max(x for x, _ in points))
    x_high = max(x_high, x_low + 1)
    left, top, right, bottom = MARGIN
    width, height = CHART

    def across(x: float) -> float:
        return round(left + (x - x_low) / (x_high - x_low) * (width - left - right), 1)

    def down(y: float) -> float:
        return round(height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom), 1)

    return {
        "size": CHART,
        "box": (left, top, width - left - right, height - top - bottom),
        "x_ticks": [(across(x), x) for x in range(x_low, x_high + 1)],
        "y_ticks": [(down(y), f"{y:.2f}") for y in _ticks(y_low, y_high)],
        "reference": (down(reference), f"{reference:.3f}") if reference is not None else None,
        "beyond": sum(y > y_high for _, y in points),
        "top": f"{y_high:.2f}",
        "curves": [
            {
                "name": name,
                "line": " ".join(f"{across(x)},{down(y)}" for x, y in curve),
                "marks": [(across(x), down(y), f"{name}: {x:.3f} bits, {y:.4f} nats") for x, y in curve if y <= y_high],
                "points": [(f"{x:.3f}", f"{y:.4f}") for x, y in curve],
            }
            for name, curve in curves.items()
        ],
    }


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between ``low`` and ``high``."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def histograms(checkpoint: Checkpoint, counts: np.ndarray) -> list[dict[str, Any]]:
    """Return the histogram of codes at each shown width: bars as (x, y, width, height) in a box of 256 x 100."""
    pictures = []
    for bits in shown_widths(checkpoint):
        histogram = slice_counts(counts, bits, rule=checkpoint.spec.rule)
        step = MASTER_CODES / len(histogram)
        heights = 100 * histogram / histogram.max()
        mean = float((np.arange(len(histogram)) * histogram).sum() / histogram.sum())
        pictures.append(
            {
                "name": f"int{bits}",
                "levels": len(histogram),
                "mean": f"{mean:.1f}" if bits == MASTER_BITS else f"{mean:.2f}",
                "largest": f"{histogram.max() / histogram.sum():.1%}",
                "bars": [
                    (round(index * step, 2), round(100 - bar, 2), round(step, 2), round(bar, 2))
                    for index, bar in enumerate(heights.tolist())
                    if bar > 0
                ],
            }
        )
    return pictures
