"""Show an evaluation: tables for people, a record for programs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from matquant.system.files import json_text, write_atomically


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
    names = {"kld": "KLD", "top1": "top-1"}
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
