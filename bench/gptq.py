"""Nested GPTQ against MatGPTQ, the published way to choose one 8-bit code for several widths, and what a pass costs.

    python bench/gptq.py quality [--case NAME]... [--tokens N]     output error on the linears of real models
    python bench/gptq.py cost [--rounds N] [--tokens N]            all widths at once against one dedicated width
    python bench/gptq.py whole [--rounds N]                        the same for a whole model, from file to file

The output error of a layer at one width is ||W - read||_H^2 / ||W||_H^2 with H = X^T X of the layer's own inputs, not
damped; a total divides sums over layers. MatGPTQ (arXiv 2602.03537) keeps one running weight for all widths, takes the
code that is best for it at all widths together, and propagates the plain mean of the widths' errors. Its search over
256 codes is a look-up here: with one running weight the best code depends on its position on the grid alone, and the
look-up is first shown equal to the search. Both sides get the same Hessians, damping and starting grid.

Variants, each with one thing more than a line above it:

    rounded            8-bit round to nearest, sliced by Eq. 6
    MatGPTQ            as published: Eq. 6, min-max grid, natural order of columns, one affine for all widths
    ... refitted       its codes, the widths' own affines refitted in the norm of H
    ... prefix         the prefix rule in place of Eq. 6
    ... with ours      prefix, refit, and our order of columns and clipped grid: what is left is the shared error
    ours, round        nested GPTQ under Eq. 6
    ours               nested GPTQ under prefix
    one width each     dedicated GPTQ per width, each with codes of its own: no nesting, what it costs to nest

The figures go to bench/gptq.json, from where bench/results.py takes them.
Shapes: N out features, K in features, G groups, T tokens, C = 256 codes.
"""

import functools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import matquant
from matquant.core.grid import encode, fit_grid
from matquant.core.nest import MASTER_BITS, slice_codes, slice_values
from matquant.core.tensor import NestedTensor
from matquant.hf.text import cut_windows, read_documents, token_stream
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.methods.gptq import nested_gptq
from matquant.methods.parts.affines import refit_affine
from matquant.methods.parts.fake import Grid
from origin import ROOT, origin

DATA = Path(os.environ.get("MATQUANT_DATA", ROOT.parent / "shared" / "data"))
RECORDS = ROOT / "bench" / "gptq.json"
DAMP = 0.01  # of the mean diagonal, GPTQ's own default and nested_gptq's
WINDOW = 256  # tokens of one calibration window

# name -> (model, its calibration text, group size where it divides)
MODELS: dict[str, tuple[Path, Path, int | None]] = {
    "reference": (ROOT / "examples/reference/model", ROOT / "examples/reference/text/train.txt", None),
    "reference, groups of 128": (ROOT / "examples/reference/model", ROOT / "examples/reference/text/train.txt", 128),
    "stories260K": (DATA / "models/stories260K", DATA / "text/tinystories-train.txt", None),
}
# name -> width -> lambda
SETS: dict[str, dict[int, float]] = {
    "842": {8: 1.0, 4: 1.0, 2: 1.0},
    "842-paper": {8: 0.1, 4: 0.1, 2: 1.0},
    "843": {8: 1.0, 4: 1.0, 3: 1.0},
    "84": {8: 1.0, 4: 1.0},
    "86432": {8: 1.0, 6: 1.0, 4: 1.0, 3: 1.0, 2: 1.0},
}
SHAPES = ((2048, 2048), (2048, 8192))  # out x in

Errors = dict[str, dict[int, list[float]]]  # variant -> width -> squared error of each layer

app = typer.Typer(add_completion=False)


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
            bits=bits,
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


# -------------------------------------------------------------------------------------------------------------- quality


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

    for path, view in select_linears(model, "all").items():
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


@app.command()
def quality(
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
                title=f"{model_name}, lambda {lambdas}: relative output error, {len(linears)} linears",
                caption="layers: mean ratio of weighted errors to MatGPTQ's; better: where it is below 1",
            )
            for variant, row in rows.items():
                numbers = [row["weighted"], row["plain"], *row["widths"].values()]
                table.add_row(
                    *(variant, *(f"{number:.3e}" for number in numbers)),
                    *(f"{row['layer_ratio']:.3f}", str(row["layers_better"])),
                )
            Console(width=120).print(table)
    keep("quality", {"results": results, "tokens": tokens, **provenance(threads)})


# ----------------------------------------------------------------------------------------------------------------- cost


@app.command()
def cost(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens of the Hessian.")] = 16_384,
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN, e.g. 2048x8192.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Seconds of one pass on random layers: every width set against a dedicated width, with and without the Hessian."""
    torch.set_num_threads(threads)
    wanted = [(int(rows), int(columns)) for rows, columns in (text.split("x") for text in shape or ())] or list(SHAPES)
    results: dict[str, dict[str, Any]] = {}
    for rows, columns in wanted:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        spread = torch.randn(columns, generator=generator).exp()  # channels of unlike size
        hessian = torch.zeros(columns, columns)
        for start in range(0, tokens, 1024):
            x_TK = torch.randn(min(1024, tokens - start), columns, generator=generator) * spread
            hessian.addmm_(x_TK.T, x_TK)
        accumulation_s = _accumulation_seconds(columns, tokens, spread)
        passes: dict[str, tuple[Grid, Mapping[int, float]]] = {
            "dedicated int4": (Grid(rule="prefix", bits=4), {4: 1.0}),
            **{
                f"nested {name}": (Grid(rule="prefix", sliced=tuple(b for b in weights if b < MASTER_BITS)), weights)
                for name, weights in SETS.items()
                if name != "842-paper"
            },
        }
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(rounds):
            for name, (grid, weights) in passes.items():
                began = time.perf_counter()
                nested_gptq(weight, hessian, grid, weights)
                seconds[name].append(time.perf_counter() - began)
        results[f"{rows}x{columns}"] = {"accumulation_s": accumulation_s, "pass_s": seconds}
        base = seconds["dedicated int4"]
        table = Table(
            *("pass", "seconds (median)", "ratio", "with the Hessian", "ratio with it"),
            title=f"{rows} x {columns}, Hessian of {tokens:,} tokens in {accumulation_s:.1f} s",
        )
        for name, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
            whole = [time_s + accumulation_s for time_s in times]
            both = statistics.median(a / (b + accumulation_s) for a, b in zip(whole, base, strict=True))
            table.add_row(
                name,
                *(f"{statistics.median(times):.2f}", f"{ratio:.2f}", f"{statistics.median(whole):.2f}", f"{both:.2f}"),
            )
        Console(width=120).print(table)
    keep("cost", {"results": results, "tokens": tokens, **provenance(threads)})


@app.command()
def whole(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median of their ratios counts.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Seconds of ``matquant quantize --method gptq`` on the embedded model: five widths at once, and int4 alone."""
    torch.set_num_threads(threads)
    model, text, _ = MODELS["reference"]
    passes: dict[str, dict[str, Any]] = {"dedicated int4": {"baseline_bits": 4}, "nested 86432": {}}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, options in passes.items():
                began = time.perf_counter()
                matquant.quantize(
                    model, Path(folder) / "out", method="gptq", seq_len=512, text=[text], overwrite=True, **options
                )
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(*reversed(seconds.values()), strict=True))
    keep("whole", {"seconds": seconds, "ratio": ratio, **provenance(threads)})


def _accumulation_seconds(columns: int, tokens: int, spread: torch.Tensor) -> float:
    """Seconds that X^T X of ``tokens`` tokens takes, from four batches of 1024 after a first one."""
    x_TK = torch.randn(1024, columns) * spread
    hessian = torch.zeros(columns, columns)
    hessian.addmm_(x_TK.T, x_TK)
    began = time.perf_counter()
    for _ in range(4):
        hessian.addmm_(x_TK.T, x_TK)
    return (time.perf_counter() - began) / 4 * tokens / 1024


def keep(what: str, record: Mapping[str, Any]) -> None:
    """Put a record in the place of the last one of its kind."""
    kept = json.loads(RECORDS.read_text()) if RECORDS.is_file() else {}
    RECORDS.write_text(json.dumps({**kept, what: record}, indent=1, sort_keys=True) + "\n")
    print(f"wrote {RECORDS.relative_to(ROOT)}: {what}")


def provenance(threads: int) -> dict[str, Any]:
    """What a record needs to be made again; its times depend on the threads."""
    made = origin("torch", "transformers", "numpy")
    return {**made, "machine": f"{made['machine']}, {threads} threads"}


if __name__ == "__main__":
    app()
