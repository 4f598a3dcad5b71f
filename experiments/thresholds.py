"""The picture and the table of docs/concepts.md: where int2 and int3 cut real weights, on both grids.

    python experiments/thresholds.py [MODEL] [--group-size 64] [-o docs/grids.png]

Weights are those of all linear layers of MODEL's decoder, each divided by the largest magnitude of its group. The table
has the relative squared error of rounding to nearest per width, with a least-squares scale for each group at 2 to 4
bits, and that of a uniform quantiser of that width alone with the best of CLIPS for each group.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from matquant.core.nest import COMPANDED, MASTER_BITS, UNIFORM, nearest_codes, position_table, slice_positions
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.loading import load_float

CLIPS = tuple(1 - step / 20 for step in range(14))
WIDTHS = (8, 6, 4, 3, 2)


def read_groups(model: str, size: int) -> np.ndarray:
    """All weights as groups [G, size], float32, divided by their largest magnitude."""
    source = load_float(model).float()
    parameters = dict(source.named_parameters())
    views = select_linears(source, "linears")
    weights = [view.of(parameters[view.parameter].detach()).numpy().reshape(-1, size) for view in views.values()]
    groups = np.concatenate(weights)
    scaled: np.ndarray = groups / np.maximum(np.abs(groups).max(1, keepdims=True), 1e-12)
    return scaled


def nested_error(groups: np.ndarray, grid: str, bits: int) -> float:
    """Relative squared error of the ``bits``-bit slice of 8-bit codes that cover every group."""
    stored = 127.5 / 127 if bits == MASTER_BITS else 1.0  # 8 bits: the stored int8, whose zero is 128
    codes = nearest_codes(groups * 127.5 / stored + (128 if bits == MASTER_BITS else 127.5), MASTER_BITS, grid=grid)
    position = slice_positions(codes, bits, grid=grid)
    centred = position - (128 if bits == MASTER_BITS else (2**bits - 1) / 2)
    return _error(groups, centred, bits, stored / 127.5 * 2 ** (MASTER_BITS - bits))


def dedicated_error(groups: np.ndarray, bits: int) -> float:
    """The same of a uniform quantiser of ``bits`` bits alone, clipped as is best for each group."""
    middle, best = (2**bits - 1) / 2, np.full(len(groups), np.inf)
    for clip in CLIPS:
        step = clip / middle
        centred = np.clip(np.floor(groups / step + middle + 0.5), 0, 2**bits - 1) - middle
        best = np.minimum(best, ((groups - step * centred) ** 2).sum(1))
    return float(best.sum() / (groups**2).sum())


def _error(groups: np.ndarray, centred: np.ndarray, bits: int, scale: float) -> float:
    fitted: np.ndarray | float = scale
    if bits <= 4:
        fitted = (groups * centred).sum(1, keepdims=True) / (centred**2).sum(1, keepdims=True)
    return float(((groups - fitted * centred) ** 2).sum() / (groups**2).sum())


def thresholds(grid: str, bits: int) -> np.ndarray:
    """Where neighbouring slices meet, as shares of the largest magnitude."""
    table = position_table(MASTER_BITS, grid).reshape(2**bits, -1)
    edges: np.ndarray = ((table[1:, 0] + table[:-1, -1]) / 2 - 127.5) / 127.5
    return edges


def draw(groups: np.ndarray, file: Path) -> None:
    """A histogram of the weights with the thresholds of int2 and int3 on both grids."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, grid in zip(axes, (UNIFORM, COMPANDED), strict=True):
        axis.hist(groups.ravel()[:: max(1, groups.size // 10**6)], bins=127, color="#9bb8d3", density=True)
        for edge in thresholds(grid, 3):
            axis.axvline(edge, color="#d98c5f", linewidth=0.8)
        for edge in thresholds(grid, 2):
            axis.axvline(edge, color="#8c2d04", linewidth=1.8)
        axis.set_title(f"{grid}: thresholds of int2 (bold) and int3", fontsize=10)
        axis.set_xlabel("weight / largest of its group")
    axes[0].set_ylabel("density")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="examples/reference/model")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/grids.png"))
    args = parser.parse_args()
    groups = read_groups(args.model, args.group_size)
    print("| | int8 | int6 | int4 | int3 | int2 |\n|---|---|---|---|---|---|")
    print("| dedicated, one quantiser per width |", *(f"{dedicated_error(groups, bits):.2e} |" for bits in WIDTHS))
    for grid in (UNIFORM, COMPANDED):
        print(f"| nested, {grid} |", *(f"{nested_error(groups, grid, bits):.2e} |" for bits in WIDTHS))
    draw(groups, args.out)


if __name__ == "__main__":
    main()
