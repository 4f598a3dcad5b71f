"""The paper's Figure 2 for one checkpoint: log-perplexity against bits per weight, for all strategies.

Curves of (bits per weight, log-perplexity on the calibration text), all overhead included: trained widths, interpolated
widths, the four strategies, the search, and dedicated baselines measured elsewhere on the same text.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from matquant.format.read import Checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.planning.budget import bits_budget, check_widths
from matquant.planning.run import SEARCH, SEARCHED_WIDTHS, check_output, describe, make_plan
from matquant.planning.search import EVALUATIONS, PAPER_WIDTHS
from matquant.planning.sensitivity import Losses
from matquant.planning.strategies import STRATEGIES
from matquant.report.plots import check_picture, plot_widths
from matquant.report.tables import write_json
from matquant.system.errors import InputError
from matquant.system.files import read_json
from matquant.system.locks import holding

POINTS = 13  # 2, 2.5, ... 8 bits, plus the overhead of scales
Curve = tuple[list[float], list[float]]


def measure_curves(
    checkpoint: Checkpoint,
    losses: Losses,
    *,
    widths: Sequence[int] = SEARCHED_WIDTHS,
    fused: bool = False,
    evaluations: int,
) -> dict[str, list[dict[str, Any]]]:
    """Measure curve name -> [{"bits_per_weight", "bytes", "loss", "log_perplexity", "bits": {path: width}}]."""
    curves: dict[str, list[dict[str, Any]]] = {}

    def add(name: str, plan: Mapping[str, int]) -> float:
        point = {**describe(checkpoint, plan, losses), "bits": dict(plan)}
        if point not in curves.setdefault(name, []):
            curves[name].append(point)
        return bits_per_weight(checkpoint, plan)

    uniform = {}
    for bits in sorted({*widths, *checkpoint.spec.widths}):
        kind = "trained" if bits in checkpoint.spec.widths else "interpolated"
        uniform[bits] = add(f"uniform, {kind}", checkpoint.widths(bits))
    for limit in np.linspace(uniform[min(widths)], uniform[max(widths)], POINTS):
        budget = bits_budget(checkpoint, float(limit), widths=sorted({*widths, *PAPER_WIDTHS}))
        for strategy in STRATEGIES:
            if uniform.get(PAPER_WIDTHS[0], np.inf) <= limit:
                add(strategy, make_plan(checkpoint, budget, strategy=strategy, widths=PAPER_WIDTHS)[0])
        add(
            SEARCH,
            make_plan(checkpoint, budget, widths=widths, losses=losses, fused=fused, evaluations=evaluations)[0],
        )
    return curves


@holding("out")
def run(
    directory: Path,
    out: Path,
    *,
    losses: Losses,
    widths: Sequence[int] | None = None,
    fused: bool = False,
    evaluations: int = EVALUATIONS,
    baselines: Path | None = None,
    plot: Path | None = None,
    show: Callable[[RenderableType], None] = lambda table: None,
) -> dict[str, Any]:
    """Measure the curves, write them to ``out``, draw them, and return the record."""
    check_output(out, "-o")
    picture = plot or out.with_suffix(".png")
    check_picture(picture)
    if evaluations < 0:
        raise InputError(f"--evaluations {evaluations} is not valid; use a number of at least 0")
    mixed = SEARCHED_WIDTHS if widths is None else tuple(widths)
    check_widths(mixed)
    dedicated = {} if baselines is None else read_baselines(baselines)
    began = time.perf_counter()
    curves = measure_curves(losses.checkpoint, losses, widths=mixed, fused=fused, evaluations=evaluations)
    record = {
        "curves": curves,
        "baselines": dedicated,
        "evaluations": losses.evaluations,
        "seconds": round(time.perf_counter() - began, 2),
    }
    draw(picture, curves, dedicated)
    write_json(out, record)
    table = Table(title=f"{directory}: log-perplexity on the calibration text", title_justify="left")
    for name in ("curve", "bits per weight", "KL", "log-perplexity"):
        table.add_column(name, justify="right")
    for name, points in curves.items():
        for point in points:
            row = (f"{point['bits_per_weight']:.3f}", f"{point['loss']:.4f}", f"{point['log_perplexity']:.4f}")
            table.add_row(name, *row)
    show(table)
    return {
        "out": str(out),
        "picture": str(picture),
        "evaluations": record["evaluations"],
        "seconds": record["seconds"],
    }


def read_baselines(file: Path) -> dict[str, Curve]:
    """Read {"name": [[bits per weight, log-perplexity], ...]} from a JSON file."""
    give = 'a JSON file {"name": [[bits per weight, log-perplexity], ...]}'
    values = read_json(file, "--baselines", give=give)
    try:
        return {
            str(name): ([float(bits) for bits, _ in points], [float(value) for _, value in points])
            for name, points in values.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"--baselines {file} holds no points ({error}); give {give}") from None


def draw(file: Path, curves: Mapping[str, list[dict[str, Any]]], baselines: Mapping[str, Curve]) -> None:
    """Draw the curves and the baselines."""
    lines = {
        name: ([p["bits_per_weight"] for p in points], [p["log_perplexity"] for p in points])
        for name, points in curves.items()
    }
    plot_widths(file, {**lines, **baselines}, reference=None)
