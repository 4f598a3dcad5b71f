"""The float grid against the others, and its int4 against MXFP4 made directly: the tables of docs/concepts.md.

    python experiments/float_grid.py MODEL

Relative squared error of round to nearest, all linear layers: of every grid and group size; of E2M5 cut to its first
bits, the grid that the float grid is not (nest.py), with a least-squares scale for each group and width; and of int4 as
MXFP4: the slice of the float grid in groups of 32, which is MXFP4; slices of other group sizes after ``--requantise``;
and MXFP4 of the float weights, with the scale of OCP's specification and with the best of it, its half and its double.
The last line is JSON.
"""

import argparse
import json

import numpy as np
import torch

from matquant.core.grid import BLOCK, decode, encode
from matquant.core.nest import CENTRE, FLOAT, GRIDS, middle, positions
from matquant.export.requantise import blocks, fit_blocks
from matquant.hf_torch.arrays import nested_to_numpy
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.loading import load_float
from matquant.methods.parts.fake import Grid, nest

WIDTHS = (8, 6, 4, 3, 2)
SIZES = {"per channel": None, "groups of 64": 64, "groups of 32": BLOCK}


def mxfp4(weight_NK: np.ndarray, tries: tuple[int, ...]) -> np.ndarray:
    """Weights rounded to MXFP4, with the best scale of 2^tries times the usual one in each block."""
    scale = fit_blocks(weight_NK, tries)
    zero = np.full_like(scale, middle(4))
    return np.asarray(decode(positions(encode(weight_NK, scale, zero, bits=4, grid=FLOAT), 4, grid=FLOAT), scale, zero))


def cut(weight_NK: np.ndarray, bits: int, group: int | None) -> np.ndarray:
    """Weights rounded to E2M5 and cut to E2Mx of ``bits`` bits, with a least-squares scale for each group."""
    codes = np.arange(129)
    values = np.where(codes < 32, codes / 32, 2.0 ** (codes // 32 - 1) * (1 + codes % 32 / 32))
    weight = weight_NK.reshape(-1, group or weight_NK.shape[1])
    scaled = np.abs(weight) / np.abs(weight).max(1, keepdims=True) * values[127]
    nearest = np.searchsorted((values[1:128] + values[:127]) / 2, scaled)
    number = np.sign(weight) * values[nearest >> (8 - bits) << (8 - bits)]
    found: np.ndarray = number * (weight * number).sum(1, keepdims=True) / np.square(number).sum(1, keepdims=True)
    return found.reshape(weight_NK.shape)


def relative(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Squared distance of the first of each pair to the second, over the squared second."""
    distance = sum(float(np.square(found - wanted).sum()) for found, wanted in pairs)
    return distance / sum(float(np.square(wanted).sum()) for _, wanted in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    source = load_float(parser.parse_args().model).float()
    parameters = dict(source.named_parameters())
    views = select_linears(source, "linears").values()
    weights = [view.of(parameters[view.parameter].detach()).numpy() for view in views]
    rows: dict[str, list[float]] = {}

    def show(name: str, values: list[float]) -> None:
        rows[name] = values
        print(f"{name:44}", *(f"{value:.2e}" for value in values), flush=True)

    for tries in ((0,), (0, -1, 1)):
        direct = [(mxfp4(weight, tries), weight) for weight in weights]
        show(f"MXFP4 of the float weights, {len(tries)} scales", [relative(direct)])
    for size, group in SIZES.items():
        for kind in GRIDS:
            sliced = (2, 3) if kind == FLOAT else (2, 3, 4)
            grid = Grid(rule="prefix", group_size=group, zeros=CENTRE, sliced=sliced, kind=kind)
            tensors = [nested_to_numpy(nest(torch.from_numpy(weight), grid)) for weight in weights]
            reads = {bits: [tensor.read(bits) for tensor in tensors] for bits in WIDTHS}
            show(f"{size}, {kind}", [relative(list(zip(reads[bits], weights, strict=True))) for bits in WIDTHS])
            if kind == FLOAT:
                fitted = [blocks(tensor, fit_blocks(tensor.read(4))).read(4) for tensor in tensors]
                pairs = [list(zip(fitted, wanted, strict=True)) for wanted in (reads[4], weights)]
                show(f"{size}, requantised: loss, error", [relative(found) for found in pairs])
        cuts = {bits: [(cut(weight, bits, group), weight) for weight in weights] for bits in WIDTHS}
        show(f"{size}, E2M5 cut", [relative(cuts[bits]) for bits in WIDTHS])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
