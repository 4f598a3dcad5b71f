"""Draw pictures with matplotlib: quality against size, and histograms."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from matquant.system.errors import InputError
from matquant.system.files import replace_when_done


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
