"""The float grid against the others, and int4 of it against MXFP4 made directly: the tables of docs/concepts.md.

    python experiments/float_grid.py MODEL CALIBRATION VALID [--methods rtn,gptq] [--windows 20]

Of every grid and group size, all linear layers: log-perplexity per width, and for round to nearest the relative squared
error of the weights; that also for E2M5 cut to its first bits, the grid that the float grid is not (nest.py). Then, for
round to nearest, int4 as MXFP4: the slice in groups of 32, which is MXFP4; slices of other group sizes after
``--requantise``; and MXFP4 of the float weights, with the scale of OCP's specification and with the best of that, its
half and its double. The last line is JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import matquant
from matquant.core.grid import BLOCK, decode, encode
from matquant.core.nest import FLOAT, GRIDS, middle, positions
from matquant.export.requantise import blocks
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.hf.text import read_documents, token_stream
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.loading import load_float, load_tokenizer

WIDTHS = (8, 6, 4, 3, 2)
SIZES = {"per channel": None, "groups of 64": 64, "groups of 32": BLOCK}
CALIBRATION: dict[str, Any] = {"samples": 64, "seq_len": 512}


def mxfp4(weight_NK: np.ndarray, tries: tuple[int, ...]) -> np.ndarray:
    """Weights rounded to MXFP4, with the best scale of 2^tries times the usual one in each block."""
    weight = weight_NK.reshape(len(weight_NK), -1, BLOCK)
    usual = np.floor(np.log2(np.abs(weight).max(-1))) - 2
    zero = np.full_like(usual, middle(4))
    best, least = weight_NK, np.full(usual.shape, np.inf)
    for more in tries:
        scale = np.exp2(usual + more).astype(np.float32)
        found = decode(positions(encode(weight_NK, scale, zero, bits=4, grid=FLOAT), 4, grid=FLOAT), scale, zero)
        error = np.square(found.reshape(weight.shape) - weight).sum(-1)
        best = np.where(np.repeat(error < least, BLOCK, axis=1), found, best)
        least = np.minimum(error, least)
    return best


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
    parser.add_argument("calibration", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("--methods", default="rtn,gptq")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--windows", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    source = load_float(args.model).float()
    parameters = dict(source.named_parameters())
    views = select_linears(source, "linears")
    weights = {path: view.of(parameters[view.parameter].detach()).numpy() for path, view in views.items()}
    stream = token_stream(read_documents([args.valid]), load_tokenizer(args.model))[: args.windows * 512 + 1]
    rows: dict[str, list[float]] = {}

    def show(name: str, values: list[float]) -> None:
        rows[name] = values
        print(f"{name:52}", *(f"{value:9.4f}" if value > 0.5 else f"{value:9.2e}" for value in values), flush=True)

    for tries in ((0,), (0, -1, 1)):
        direct = [(mxfp4(weight, tries), weight) for weight in weights.values()]
        show(f"MXFP4 of the float weights, {len(tries)} scales, error", [relative(direct)])
    for size, group in SIZES.items():
        cuts = {bits: [(cut(weight, bits, group), weight) for weight in weights.values()] for bits in WIDTHS}
        show(f"E2M5 cut, {size}, error", [relative(cuts[bits]) for bits in WIDTHS])
    for method in args.methods.split(","):
        text = {} if method == "rtn" else {"text": [args.calibration], **CALIBRATION}
        for size in args.sizes.split(","):
            for grid in GRIDS:
                group = SIZES[size]
                name = f"{method}, {size}, {grid}"
                with tempfile.TemporaryDirectory() as folder:
                    options = {"group_size": group, "grid": grid, "zero_point": "midrange", "symmetric": True, **text}
                    out = matquant.quantize(args.model, Path(folder) / "out", method=method, scope="linears", **options)
                    checkpoint = open_checkpoint(out)
                    tensors = {path: checkpoint.nested(path) for path in weights}
                    show(
                        f"{name}, bits per weight",
                        [bits_per_weight(checkpoint, checkpoint.widths(bits)) for bits in WIDTHS],
                    )
                    if method == "rtn":
                        reads = {
                            bits: [(tensor.read(bits), weights[path]) for path, tensor in tensors.items()]
                            for bits in WIDTHS
                        }
                        show(f"{name}, error", [relative(reads[bits]) for bits in WIDTHS])
                    if method == "rtn" and grid == FLOAT:
                        fitted = [(blocks(tensor).read(4), tensor, weights[path]) for path, tensor in tensors.items()]
                        loss = relative([(found, tensor.read(4)) for found, tensor, _ in fitted])
                        show(f"{name}, requantised: loss, error", [loss, relative([(f, w) for f, _, w in fitted])])
                    model = matquant.load(out, kernels="none", dtype=torch.float32)
                    found = matquant.evaluate(model, stream, bits=WIDTHS, context=512)
                    show(f"{name}, log-perplexity", [found[str(bits)] for bits in WIDTHS])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
