"""Show an evaluation: a table for people, a record for programs, a picture for slides."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from rich.table import Table

from matquant.system.errors import InputError
from matquant.system.files import json_text, replace_when_done, write_atomically


def width_table(
    title: str,
    log_perplexity: Mapping[str, float],
    bits_per_weight: Mapping[str, float],
    *,
    compared: Mapping[str, Mapping[str, float]] | None = None,
) -> Table:
    """Return a row per width: log-perplexity in nats per token, perplexity, bits per weight (all overhead included).

    compared: "kld" -> width -> KL divergence from the reference in nats per token, "top1" -> width -> share of tokens
    with the same best token.
    """
    table = Table(title=title, title_justify="left")
    more = compared or {}
    names = {"kld": "KL divergence", "top1": "same top token"}
    for column in ("width", "log-perplexity", "perplexity", *(names[metric] for metric in more), "bits per weight"):
        table.add_column(column, justify="right")
    for width, value in log_perplexity.items():
        bits = f"{bits_per_weight[width]:.3f}" if width in bits_per_weight else ""
        name = f"int{width}" if width.isdigit() else width
        cells = [_compared(metric, values.get(width)) for metric, values in more.items()]
        table.add_row(name, f"{value:.4f}", f"{np.exp(min(value, 700)):.3f}", *cells, bits)
    return table


def _compared(metric: str, value: float | None) -> str:
    """Format a comparison with the reference; "" for the reference itself."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if metric == "top1" else f"{value:.5f}"


def task_table(title: str, tasks: Mapping[str, Mapping[str, Any]], average: Mapping[str, float]) -> Table:
    """Return a row per width, in percent: the metric of every task that enters Task Avg., and that mean."""
    table = Table(title=title, title_justify="left")
    names = list(dict.fromkeys(name for results in tasks.values() for name in results))
    for column in ("width", *names, "Task Avg."):
        table.add_column(column, justify="right", overflow="fold")
    for width, results in tasks.items():
        values = [results[name]["metrics"][results[name]["metric"]] for name in names]
        cells = [f"{100 * value:.2f}" for value in (*values, average[width])]
        table.add_row(f"int{width}" if width.isdigit() else width, *cells)
    return table


def write_json(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record as one JSON object, atomically."""
    write_atomically(file, (json_text(record) + "\n").encode())


def check_picture(file: Path) -> None:
    """Raise InputError unless ``file`` is the name of a picture that matplotlib can write."""
    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.is_dir() or file.suffix.lstrip(".").lower() not in kinds:
        raise InputError(f"--plot {file} is not the name of a picture; use a name that ends in .png, .svg or .pdf")


def plot_widths(
    file: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, reference: float | None
) -> None:
    """Plot curves, name -> (bits per weight, log-perplexity); reference: the float model's log-perplexity."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")  # without pyplot: no backend to choose, nothing to close
    axes = figure.subplots()
    for (name, (x, y)), marker in zip(curves.items(), itertools.cycle("osD^vP*X"), strict=False):
        order = np.argsort(x)
        axes.plot(np.asarray(x)[order], np.asarray(y)[order], marker=marker, label=name)
    lowest = min(min(y) for _, y in curves.values())
    if reference is not None:
        axes.axhline(reference, color="black", linestyle=":", label="float model")
        lowest = min(lowest, reference)
    axes.set(xlabel="bits per quantised weight (all overhead included)", ylabel="log-perplexity (nats per token)")
    axes.set_ylim(lowest - 0.05, min(max(max(y) for _, y in curves.values()), lowest + 3) + 0.05)
    axes.legend(fontsize="small" if len(curves) > 8 else None)
    _save(figure, file)


def plot_histograms(file: Path, codes: Mapping[str, np.ndarray]) -> None:
    """Plot histograms of 8-bit codes (the paper's Fig. 1c): name -> counts of the 256 codes."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, counts in codes.items():
        share = counts / counts.sum()
        mean = float((np.arange(len(counts)) * share).sum())
        axes.stairs(share, np.arange(len(counts) + 1), label=f"{name} (mean code {mean:.1f})", fill=True, alpha=0.45)
    axes.set(xlabel="8-bit code", ylabel="share of weights")
    axes.legend()
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace_when_done(file) as partial:
        figure.savefig(partial, format=file.suffix.lstrip(".") or "png", dpi=130)
