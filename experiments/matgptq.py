"""Output error of nested GPTQ against MatGPTQ, the published way to choose one 8-bit code for several widths.

    python experiments/matgptq.py [--case NAME]... [--model NAME]... [--tokens N]

The output error of a layer at one width is ||W - read||_H^2 / ||W||_H^2 with H = X^T X of the layer's own inputs, not
damped; a total divides sums over layers. MatGPTQ (arXiv 2602.03537) keeps one running weight for all widths, takes the
code that is best for it at all widths together, and propagates the plain mean of the widths' errors. Its search over
256 codes is a look-up here: with one running weight the best code depends on its position on the grid alone, and the
look-up is first shown equal to the search. Both sides get the same Hessians, damping and starting grid.

Variants, each with one change to a line above it:

    rounded            8-bit round to nearest, sliced by Eq. 6
    MatGPTQ            as published: Eq. 6, min-max grid, natural order of columns, one scale and zero-point
    ... refitted       its codes, per-width scales and zero-points refitted in the norm of H
    ... prefix         the prefix rule in place of Eq. 6
    ... with ours      prefix, refit, our order of columns and clipped grid: what is left is the shared error
    ours, round        nested GPTQ under Eq. 6
    ours               nested GPTQ under prefix
    one width each     dedicated GPTQ per width: what nesting costs

The figures go to experiments/matgptq.json, from where experiments/results.py takes them.
Shapes: N out features, K in features, G groups, T tokens, C = 256 codes.
"""

import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from matquant.core.grid import encode, fit_grid
from matquant.core.nest import MASTER_BITS, slice_codes, slice_values
from matquant.core.tensor import NestedTensor
from matquant.hf.text import cut_windows, read_documents, token_stream
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.methods.gptq import nested_gptq
from matquant.methods.parts.affines import refit_affine
from matquant.methods.parts.fake import Grid

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from gptq import DATA, EMBEDDED, SETS, TRAINING_TEXT, provenance
from origin import ROOT

RECORD = ROOT / "experiments" / "matgptq.json"
DAMP = 0.01  # of the mean diagonal, GPTQ's own default and nested_gptq's
WINDOW = 256  # tokens of one calibration window

# name -> (model, its calibration text, group size where it divides)
MODELS: dict[str, tuple[Path, Path, int | None]] = {
    "reference": (EMBEDDED, TRAINING_TEXT, None),
    "reference, groups of 128": (EMBEDDED, TRAINING_TEXT, 128),
    "stories260K": (DATA / "models/stories260K", DATA / "text/tinystories-train.txt", None),
}

Errors = dict[str, dict[int, list[float]]]  # variant -> width -> squared error of each layer


# -------------------------------------------------------------------------------------------------------------- MatGPTQ


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """The best code for a position p = w/scale + zero: the lower envelope of 256 parabolas that differ by lines.

    sum_r lambda_r (p - value_r(q))^2 = p^2 sum_r lambda_r - 2 p a_q + b_q with a_q = sum_r lambda_r value_r(q) and
    b_q = sum_r lambda_r value_r(q)^2. borders: where the next code takes over; codes: one more than borders.
    """

    borders: torch.Tensor
    codes: torch.Tensor

    def __call__(self, position: torch.Tensor) -> torch.Tensor:
        return self.codes[torch.bucketize(position, self.borders)]


def lookup(weights: Mapping[int, float], rule: str) -> Lookup:
    """The envelope; of equally cheap codes the smallest."""
    every = torch.arange(2**MASTER_BITS)
    values = {bits: slice_values(every, bits, rule=rule).double() for bits in weights}
    slopes = sum((weight * values[bits] for bits, weight in weights.items()), torch.zeros(len(every)).double())
    offsets = sum((weight * values[bits] ** 2 for bits, weight in weights.items()), torch.zeros(len(every)).double())
    lines = sorted(zip(slopes.tolist(), offsets.tolist(), every.tolist(), strict=True))
    kept: list[tuple[float, float, int]] = []
    borders: list[float] = []
    for slope, offset, code in lines:
        if kept and slope == kept[-1][0]:
            continue  # equal values at every width, or dearer everywhere
        while kept:
            border = (offset - kept[-1][1]) / (2 * (slope - kept[-1][0]))
            if not borders or border > borders[-1]:
                borders.append(border)
                break
            kept.pop()
            borders.pop()
        kept.append((slope, offset, code))
    return Lookup(borders=torch.tensor(borders).double(), codes=torch.tensor([code for *_, code in kept]))


def matgptq_codes(
    weight_NK: torch.Tensor,
    hessian_KK: torch.Tensor,
    scale_NG: torch.Tensor,
    zero: float,
    weights: Mapping[int, float],
    *,
    rule: str = "round",
    reorder: bool = False,
    damp: float = DAMP,
) -> torch.Tensor:
    """MatGPTQ's codes, uint8 [N, K], in float64. reorder: columns by falling diagonal of H, not in their own order."""
    rows, columns = weight_NK.shape
    order = hessian_KK.diagonal().argsort(descending=True, stable=True) if reorder else torch.arange(columns)
    hessian = hessian_KK.double()[order][:, order]
    mean = hessian.diagonal().mean()
    hessian = hessian + torch.diag(mean * (damp + (hessian.diagonal() == 0)))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    # Columns first, so that one column of all rows is contiguous.
    running_KN = weight_NK.double().T[order].contiguous()
    scale_KN = scale_NG.double().T.repeat_interleave(columns // scale_NG.shape[1], dim=0)[order].contiguous()
    best = lookup(weights, rule)
    every = torch.arange(2**MASTER_BITS)
    mean_value = torch.stack([slice_values(every, bits, rule=rule).double() for bits in weights]).mean(0)
    codes_KN = torch.empty(columns, rows, dtype=torch.uint8)
    for column in range(columns):
        code = best(running_KN[column] / scale_KN[column] + zero)
        read = scale_KN[column] * (mean_value[code] - zero)  # w minus the mean read is the mean error
        error = (running_KN[column] - read) / upper[column, column]
        running_KN[column + 1 :].addr_(upper[column, column + 1 :], error, alpha=-1)
        codes_KN[column] = code.to(torch.uint8)
    restored = torch.empty_like(codes_KN)
    restored[order] = codes_KN
    return restored.T.contiguous()


def check_lookup() -> None:
    """The look-up against the search over all codes; AssertionError where a code costs more than the cheapest."""
    position = torch.linspace(-40, 300, 20_011, dtype=torch.float64)
    for weights in SETS.values():
        for rule in ("round", "prefix"):
            every = torch.arange(2**MASTER_BITS)
            cost = torch.zeros(len(position), len(every), dtype=torch.float64)
            for bits, weight in weights.items():
                cost += weight * (position[:, None] - slice_values(every, bits, rule=rule)) ** 2
            found = cost.gather(1, lookup(weights, rule)(position)[:, None])[:, 0]
            assert bool((found <= cost.amin(1) * (1 + 1e-12) + 1e-12).all()), f"look-up of {weights} under {rule}"


# ------------------------------------------------------------------------------------------------------------- variants


def refitted(
    weight_NK: torch.Tensor, hessian_KK: torch.Tensor, tensor: NestedTensor, widths: Mapping[int, float]
) -> NestedTensor:
    """The same codes with our affines for the widths below 8."""
    slices = {
        bits: refit_affine(
            weight_NK,
            slice_codes(tensor.codes, bits, rule=tensor.rule),
            hessian_KK,
            fallback=tensor.affine(bits),
        )
        for bits in widths
        if bits < MASTER_BITS
    }
    return NestedTensor(codes=tensor.codes, scale=tensor.scale, zero=tensor.zero, rule=tensor.rule, slices=slices)


def variants(
    weight_NK: torch.Tensor, hessian_KK: torch.Tensor, weights: Mapping[int, float], group_size: int | None
) -> Iterator[tuple[str, Callable[[int], torch.Tensor]]]:
    """Name and a reader, width -> weights [N, K], of everything compared."""
    own = tuple(bits for bits in weights if bits < MASTER_BITS)
    scale, zero = fit_grid(weight_NK, group_size=group_size)
    middle = float(2 ** (MASTER_BITS - 1))

    def published(rule: str, grid_scale: torch.Tensor, *, reorder: bool = False) -> NestedTensor:
        codes = matgptq_codes(weight_NK, hessian_KK, grid_scale, middle, weights, rule=rule, reorder=reorder)
        return NestedTensor(codes=codes, scale=grid_scale, zero=torch.full_like(grid_scale, middle), rule=rule)

    def ours(rule: str, bits: int = MASTER_BITS) -> NestedTensor:
        sliced = own if bits == MASTER_BITS else (bits,)
        grid = Grid(rule=rule, bits=bits, group_size=group_size, affine="refit", sliced=sliced)
        lambdas = weights if bits == MASTER_BITS else {bits: 1.0}
        return nested_gptq(weight_NK, hessian_KK, grid, lambdas)

    yield "rounded", NestedTensor(codes=encode(weight_NK, scale, zero), scale=scale, zero=zero, rule="round").read
    theirs = published("round", scale)
    yield "MatGPTQ", theirs.read
    yield "... refitted", refitted(weight_NK, hessian_KK, theirs, weights).read
    yield "... prefix", published("prefix", scale).read
    best = ours("prefix")
    shared = published("prefix", best.scale, reorder=True)
    yield "... with ours", refitted(weight_NK, hessian_KK, shared, weights).read
    yield "ours, round", ours("round").read
    yield "ours", best.read
    grid = Grid(rule="prefix", group_size=group_size)
    eight = nested_gptq(weight_NK, hessian_KK, grid, {MASTER_BITS: 1.0})
    dedicated = {bits: ours("prefix", bits) if bits < MASTER_BITS else eight for bits in weights}
    yield "one width each", lambda bits: dedicated[bits].read(bits)


# --------------------------------------------------------------------------------------------------------------- errors


def layers(model_path: Path, text: Path, tokens: int) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Path, weight and Hessian X^T X of every linear, from ``tokens`` tokens of the text through the float model."""
    model = load_float(model_path, dtype=torch.float32)
    stream = token_stream(read_documents([text]), load_tokenizer(model_path))
    windows = torch.from_numpy(cut_windows(stream, WINDOW)[: tokens // WINDOW, :-1])
    assert windows.numel() == tokens, f"{text} has {windows.numel()} tokens in whole windows, {tokens} were asked for"
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    weights: dict[str, torch.Tensor] = {}
    hessians: dict[str, torch.Tensor] = {}

    def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], path: str) -> None:
        flat = args[0].reshape(-1, args[0].shape[-1])
        hessians[path].addmm_(flat.T, flat)

    for path, view in select_linears(model, "linears").items():
        weights[path] = view.of(parameters[view.parameter].detach()).contiguous()
        hessians[path] = torch.zeros(view.shape[1], view.shape[1])
        modules[view.parameter.removesuffix(".weight")].register_forward_pre_hook(functools.partial(add, path=path))
    with torch.no_grad():
        for start in range(0, len(windows), 8):
            model(input_ids=windows[start : start + 8], use_cache=False)
    return [(path, weights[path], hessians[path]) for path in weights]


def squared(weight_NK: torch.Tensor, hessian_KK: torch.Tensor) -> float:
    """Sum over rows of w H w^T, in float64."""
    weight = weight_NK.double()
    return float(((weight @ hessian_KK.double()) * weight).sum())


def compare(
    linears: list[tuple[str, torch.Tensor, torch.Tensor]], weights: Mapping[int, float], group_size: int | None
) -> tuple[Errors, list[float]]:
    """Errors of all variants, and ||W||_H^2 of each layer."""
    errors: Errors = {}
    for _, weight, hessian in linears:
        fits = group_size if group_size is not None and weight.shape[1] % group_size == 0 else None
        for name, read in variants(weight, hessian, weights, fits):
            for bits in weights:
                mine = errors.setdefault(name, {}).setdefault(bits, [])
                mine.append(squared(weight - read(bits), hessian))
    return errors, [squared(weight, hessian) for _, weight, hessian in linears]


def summary(errors: Errors, norms: list[float], weights: Mapping[int, float]) -> dict[str, dict[str, Any]]:
    """Per variant: relative totals per width, weighted and plain sums, and how its layers compare with MatGPTQ's."""
    count = len(norms)

    def per_layer(name: str) -> list[float]:
        mine = errors[name]
        return [sum(weights[bits] * mine[bits][i] for bits in weights) / norms[i] for i in range(count)]

    published = per_layer("MatGPTQ")
    result: dict[str, dict[str, Any]] = {}
    for name, mine in errors.items():
        widths = {str(bits): sum(mine[bits]) / sum(norms) for bits in weights}
        relative = per_layer(name)
        ratios = [a / b for a, b in zip(relative, published, strict=True)]
        result[name] = {
            "widths": widths,
            "weighted": sum(weights[bits] * widths[str(bits)] for bits in weights),
            "plain": sum(widths.values()),
            "layer_ratio": math.exp(statistics.fmean(math.log(ratio) for ratio in ratios)),
            "layers_better": sum(ratio < 1 for ratio in ratios),
        }
    return result


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"Width sets: {', '.join(SETS)}.")] = None,
    model: Annotated[list[str] | None, typer.Option(help=f"Models: {'; '.join(MODELS)}.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16_384,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Output errors of all variants; a table per model and width set."""
    torch.set_num_threads(threads)
    check_lookup()
    results: dict[str, dict[str, Any]] = {}
    for model_name in model or MODELS:
        path, text, group_size = MODELS[model_name]
        linears = layers(path, text, tokens)
        for name in case or SETS:
            weights = SETS[name]
            rows = summary(*compare(linears, weights, group_size), weights)
            results[f"{model_name}; {name}"] = rows
            lambdas = ", ".join(f"{bits}: {weight:g}" for bits, weight in weights.items())
            table = Table(
                *("variant", "weighted", "plain", *(f"int{bits}" for bits in weights), "layers", "better"),
                title=f"{model_name}, lambda {lambdas}: relative output error, {len(linears)} layers",
                caption="layers: mean ratio of weighted errors to MatGPTQ's; better: where it is below 1",
            )
            for variant, row in rows.items():
                numbers = [row["weighted"], row["plain"], *row["widths"].values()]
                table.add_row(
                    *(variant, *(f"{number:.3e}" for number in numbers)),
                    *(f"{row['layer_ratio']:.3f}", str(row["layers_better"])),
                )
            Console(width=120).print(table)
    record = {"results": results, "tokens": tokens, **provenance(threads)}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(f"wrote {RECORD.relative_to(ROOT)}")


if __name__ == "__main__":
    typer.run(main)
