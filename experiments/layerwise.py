"""Nested GPTQ against dedicated GPTQ on a few layers of a real model: output error per width, in minutes.

    error of width r = tr(D H D^T) / tr(W H W^T),   D = W - read_r,   H = X^T X of the layer's inputs

Three query and three gate projections (first ROWS rows), H from 16,384 tokens of calibration text; geometric means over
the six. A candidate is a grid and a lambda per width; a dedicated model has one width and a clipping search, on either
grid. Hessians are kept in --cache, so that later runs need no model.

    python experiments/layerwise.py MODEL TEXT [--cache FILE] [--group-size 64] [--sweeps 3] [--only NAME]

The last line is JSON.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matquant.core.nest import CENTRE, COMPANDED, UNIFORM
from matquant.hf.text import cut_windows, read_documents, token_stream
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.methods.gptq import nested_gptq
from matquant.methods.parts.fake import Grid
from matquant.methods.quantize import AFFINE_WIDTHS
from matquant.options.gptq import default_lambda
from matquant.options.recipes import WIDE

WIDTHS = (8, 6, 5, 4, 3, 2)
ROWS, TOKENS, WINDOW = 128, 16384, 1024
PATHS = [f"model.layers.{layer}.{name}" for name in ("self_attn.q_proj", "mlp.gate_proj") for layer in (2, 15, 27)]


def collect(model: str, text: Path) -> dict[str, np.ndarray]:
    """ "PATH/weight" [ROWS, K] and "PATH/hessian" [K, K] of PATHS, float32."""
    source = load_float(model).float()
    stream = token_stream(read_documents([text]), load_tokenizer(model))
    windows = torch.from_numpy(cut_windows(stream, WINDOW)[: TOKENS // WINDOW, :-1])
    hessians: dict[str, torch.Tensor] = {}

    def add(path: str, inputs: torch.Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        hessians[path] = hessians.get(path, 0) + flat.T @ flat

    modules = dict(source.named_modules())
    for path in PATHS:
        modules[path].register_forward_pre_hook(lambda _, args, path=path: add(path, args[0]))
    with torch.no_grad():
        for window in windows:
            source.get_decoder()(input_ids=window[None], use_cache=False)
    arrays = {f"{path}/hessian": hessians[path].numpy() for path in PATHS}
    return arrays | {f"{path}/weight": modules[path].weight.detach()[:ROWS].numpy() for path in PATHS}


def errors(arrays: dict[str, np.ndarray], grid: Grid, lambdas: dict[int, float], *, sweeps: int) -> dict[int, float]:
    """Width -> relative output error, geometric mean over PATHS."""
    logs: dict[int, list[float]] = {bits: [] for bits in lambdas}
    for path in PATHS:
        weight, hessian = (torch.from_numpy(arrays[f"{path}/{part}"]) for part in ("weight", "hessian"))
        tensor = nested_gptq(weight, hessian, grid, lambdas, sweeps=sweeps, name=path)
        whole = float(((weight @ hessian) * weight).sum())
        for bits in lambdas:
            error = weight - tensor.read(bits)
            logs[bits].append(math.log(float(((error @ hessian) * error).sum()) / whole))
    return {bits: math.exp(float(np.mean(values))) for bits, values in logs.items()}


def candidates(dedicated: dict[int, float]) -> dict[str, dict[int, float]]:
    """Name -> lambdas, given the errors of dedicated models."""
    ratios = {bits: dedicated[2] / dedicated[bits] for bits in WIDTHS}
    powers = {f"power {power}": {bits: ratios[bits] ** power for bits in WIDTHS} for power in (0.35, 0.5, 0.7)}
    wide = dict(zip(WIDTHS, WIDE, strict=True))
    return {"gptq's default": {bits: default_lambda(bits) for bits in WIDTHS}, "the recipes'": wide, **powers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("out/layerwise.npz"))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sweeps", type=int, default=3)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    if not args.cache.is_file():
        args.cache.parent.mkdir(parents=True, exist_ok=True)
        collected: dict[str, Any] = collect(args.model, args.text)
        np.savez(args.cache, **collected)
    arrays = dict(np.load(args.cache))
    grid = Grid(rule="prefix", group_size=args.group_size, affine="refit", zeros=CENTRE, sliced=AFFINE_WIDTHS)
    rows: dict[str, dict[int, float]] = {}

    def show(name: str, found: dict[int, float], began: float) -> None:
        rows[name] = found
        base = rows["dedicated, uniform"]
        cells = [f"{found[bits]:.2e} ({found[bits] / base[bits] - 1:+4.0%})" for bits in found]
        print(f"{name:34}", *cells, f"{time.perf_counter() - began:5.0f} s", flush=True)

    for kind in (UNIFORM, COMPANDED):
        began = time.perf_counter()
        found: dict[int, float] = {}
        for bits in WIDTHS:
            one = dataclasses.replace(grid, kind=kind, bits=bits, sliced=(bits,) if bits < 8 else ())
            found |= errors(arrays, one, {bits: 1.0}, sweeps=args.sweeps)
        rows.setdefault("dedicated, uniform", found)
        show(f"dedicated, {kind}", found, began)
    for kind in (UNIFORM, COMPANDED):
        for name, lambdas in candidates(rows["dedicated, uniform"]).items():
            if args.only in f"{kind}, {name}":
                began = time.perf_counter()
                found = errors(arrays, dataclasses.replace(grid, kind=kind), lambdas, sweeps=args.sweeps)
                show(f"nested, {kind}, {name}", found, began)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
