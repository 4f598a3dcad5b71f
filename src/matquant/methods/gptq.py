"""Nested GPTQ: one pass over a small calibration text, codes that are good at every requested width at once.

GPTQ (Frantar et al. 2022) rounds the columns of a weight one after the other, and each time the remaining columns
compensate the error, weighted by the Hessian H = X^T X of the layer's inputs. Nested GPTQ keeps one target per width
and chooses the one 8-bit code that is best for all of them together. The parts, each with its formula:

    parts/hessians.py       H and its factor U, once per decoder layer
    parts/affines.py        clipping before the pass, per-width scales and zero-points after it
    parts/cells.py          the best 8-bit code for several targets
    parts/compensation.py   the pass over the columns, and the round of coordinate descent after it

Limits: a grid that covers all weights at 8 bits gives 2-bit codes bins that are too wide; smaller groups help.
Shapes: N out features, K in features, G groups.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from matquant.core.nest import FLOAT as FLOAT_GRID
from matquant.core.nest import (
    MASTER_BITS,
    OWN,
    centred_codes,
    labels_of,
    positions,
    slice_codes,
    stored_codes,
)
from matquant.core.tensor import Affine, NestedTensor
from matquant.distributed.collect import own_rows, together, total_values
from matquant.distributed.nested import cut_rows
from matquant.methods.parts.affines import clip_groups, refit_affine
from matquant.methods.parts.blocks import Block, Solved, calibration, read_rows, run_blocks
from matquant.methods.parts.compensation import nested_codes, sweep
from matquant.methods.parts.ends import HEAD_RATIO, head_path, with_plain_error
from matquant.methods.parts.experts import few_notice
from matquant.methods.parts.fake import Grid
from matquant.methods.parts.hessians import Factor, collect_hessians, inverse_factor
from matquant.methods.parts.job import Job
from matquant.methods.parts.share import most_weights, part_rows, solve_rows
from matquant.methods.parts.tune import tune_block
from matquant.options.gptq import Settings
from matquant.options.objective import FLOAT
from matquant.system.errors import InputError


def run(job: Job) -> Iterator[tuple[str, NestedTensor]]:
    """Solve the model block by block; see ``blocks.run_blocks``."""
    settings = Settings(**job.options)
    if any(width.teachers for width in job.objective):
        raise InputError(
            f"method 'gptq' does not support distillation, found objective {job.spec.objective!r}; use 8,4,2"
        )
    if settings.tune and job.grid.rule != "prefix":
        raise InputError(
            f"tune={settings.tune} needs nested bins, which rule {job.grid.rule!r} does not have; use rule 'prefix'"
        )
    tokens = calibration(job, samples=settings.samples, seq_len=settings.seq_len, seed=settings.seed)
    _check_rank(job, tokens.numel())
    head = head_path(job.model, job.ends)
    return run_blocks(
        job,
        functools.partial(_solve, settings=settings),
        streams=(FLOAT, *(width.bits for width in job.objective)) if settings.tune else (job.grid.bits,),
        tokens=tokens,
        batch_size=settings.batch_size,
        settings=dataclasses.asdict(settings),
        steps=settings.tune > 0,
        ends=functools.partial(_solve_head, path=head, settings=settings) if head is not None else None,
    )


def nested_gptq(
    weight_NK: torch.Tensor,
    hessian_KK: torch.Tensor,
    grid: Grid,
    weights: Mapping[int, float],
    *,
    factor: Factor | None = None,
    sweeps: int = Settings.sweeps,
    name: str = "weight",
) -> NestedTensor:
    """Return the nested codes of one weight, as torch tensors like ``fake.nest``.

    hessian: X^T X up to a factor; weights: width -> lambda (ignored by a dedicated baseline, ``grid.bits`` below 8).
    sweeps: rounds of ``sweep``; scales and zero-points are refitted before each round and at the end, those of
    ``grid.sliced`` and, for int8, the 8-bit scale.
    """
    factor = factor or inverse_factor(hessian_KK, damp=Settings.damp, name=name)
    dedicated = grid.bits < MASTER_BITS
    weights = {grid.bits: 1.0} if dedicated else weights
    tensor = clip_groups(weight_NK, hessian_KK.diagonal(), grid, weights, name)
    widths = {grid.bits} if dedicated else {MASTER_BITS, *weights}
    own = tuple(bits for bits in grid.sliced if grid.affine != "none")

    def affines() -> dict[int, Affine]:
        return {bits: tensor.affine(bits) for bits in widths}

    def refit(bits: int, *, fits_zero: bool) -> Affine:
        sliced = codes if dedicated else slice_codes(codes, bits, rule=grid.rule)
        position = positions(sliced, bits, grid=grid.kind)
        return refit_affine(weight_NK, position, hessian_KK, fallback=tensor.affine(bits), fits_zero=fits_zero)

    def refitted(sliced: Iterable[int]) -> NestedTensor:
        # the 8-bit grid keeps its zero-point, and the float grid its power of two
        fixed = dedicated or grid.affine == "none" or grid.kind == FLOAT_GRID
        scale = tensor.scale if fixed else refit(MASTER_BITS, fits_zero=False)[0]
        slices = {bits: refit(bits, fits_zero=grid.zeros == OWN) for bits in sliced}
        return dataclasses.replace(tensor, scale=scale, slices={**tensor.slices, **slices})

    codes = nested_codes(weight_NK, factor, affines(), weights, rule=grid.rule, grid=grid.kind)
    damped = hessian_KK.clone()
    damped.diagonal().add_(factor.damp * hessian_KK.diagonal().mean())
    for _ in range(sweeps):
        tensor = refitted(widths.intersection(own))
        codes = sweep(weight_NK, codes, damped, affines(), weights, rule=grid.rule, grid=grid.kind)
    tensor = refitted(own)
    if dedicated:
        codes = centred_codes(codes, grid.bits)  # as fake.nest stores them
    # of codes with equal positions, the one that is read back
    codes = labels_of(stored_codes(codes, grid=grid.kind), grid=grid.kind)
    return dataclasses.replace(tensor, codes=codes)


def _solve(job: Job, block: Block, settings: Settings) -> Solved:
    parameters = {f"{block.name}.{name}": parameter for name, parameter in block.module.named_parameters()}
    weights = {path: view.of(parameters[view.parameter]).contiguous() for path, view in block.views.items()}
    nested, record = nest_block(job, block, weights, damp=settings.damp, sweeps=settings.sweeps)
    if settings.tune:
        nested, tuned = tune_block(
            job,
            block,
            nested,
            steps=settings.tune,
            lr=settings.lr,
            pull=settings.pull,
            autocast=settings.autocast,
            seed=settings.seed,
        )
        record |= tuned
    return Solved(nested=nested, record=record)


def _solve_head(job: Job, hessian_KK: torch.Tensor, *, path: str, settings: Settings) -> Solved:
    """Return the nested head. hessian: of its inputs. "loss" as in ``nest_block``, with the plain error's share.

    Its loss weights are HEAD_RATIO's, whatever the objective's are.
    """
    view = job.ends[path]
    job.report({"notice": f"calibrating {path}, {view.shape[0]:,} x {view.shape[1]:,}"})
    hessian_KK = with_plain_error(hessian_KK)
    factor = inverse_factor(hessian_KK, damp=settings.damp, name=path)
    lambdas = {width.bits: HEAD_RATIO**width.bits for width in job.objective}
    squares: list[torch.Tensor] = []

    def encode(rows_NK: torch.Tensor) -> NestedTensor:
        nested = nested_gptq(rows_NK, hessian_KK, job.grid, lambdas, factor=factor, sweeps=settings.sweeps, name=path)
        squares.append(_squares(rows_NK, nested, hessian_KK, lambdas))
        return nested

    def read(rows: slice) -> torch.Tensor:
        return together(lambda: read_rows(job, view.parameter, rows)).to(job.device)

    count, columns = view.shape
    rows = part_rows(count, ordered=settings.deterministic, most=max(1, most_weights(job.device, head=True) // columns))
    nested = solve_rows(count, read, encode, rows=rows)
    return Solved(nested={path: nested}, record={"loss": _losses(squares, lambdas)})


def nest_block(
    job: Job, block: Block, weights: Mapping[str, torch.Tensor], *, damp: float, sweeps: int
) -> tuple[dict[str, NestedTensor], dict[str, Any]]:
    """Return the nested codes of a block's ``weights`` [N, K], by path, and a log record.

    The Hessians are those of the block with its widest stream as input. Several processes solve some rows each.
    "loss": D H D^T / W H W^T over all weights.
    """
    lambdas = {width.bits: width.weight for width in job.objective}
    widest = max(block.inputs)
    hessians = collect_hessians(dataclasses.replace(block, inputs={widest: block.inputs[widest]}))
    nested: dict[str, NestedTensor] = {}
    squares: list[torch.Tensor] = []
    damped = damp
    for leader in list(hessians.of):
        hessian = hessians.of.pop(leader)
        paths = [path for path in weights if hessians.leaders[path] == leader]
        stacked = torch.cat([weights[path] for path in paths])
        factor = inverse_factor(hessian, damp=damp, name=leader)
        damped = max(damped, factor.damp)
        encode = functools.partial(
            nested_gptq, hessian_KK=hessian, grid=job.grid, weights=lambdas, factor=factor, sweeps=sweeps, name=leader
        )
        most = max(1, most_weights(job.device) // stacked.shape[1])
        rows = part_rows(len(stacked), ordered=block.share.ordered, most=most)
        solved = solve_rows(len(stacked), stacked.__getitem__, encode, rows=rows)
        own = own_rows(len(stacked))
        squares.append(_squares(stacked[own], cut_rows(solved, own), hessian, lambdas))
        bounds = [0, *itertools.accumulate(len(weights[path]) for path in paths)]
        for path, (start, stop) in zip(paths, itertools.pairwise(bounds), strict=True):
            nested[path] = cut_rows(solved, slice(start, stop))
    nested = {path: nested[path] for path in weights}
    record: dict[str, Any] = {"loss": _losses(squares, lambdas)}
    notices = []
    if hessians.few:
        record["few_tokens"] = dict(hessians.few)
        notices.append(few_notice(block.name, hessians.few, hessians.experts))
    if damped > damp:
        notices.append(
            f"{block.name}: the Hessian was not positive definite; used damping of {damped:g} times its mean"
        )
    if notices:
        record["notice"] = "; ".join(notices)
    return nested, record


def _squares(
    weight_NK: torch.Tensor, nested: NestedTensor, hessian_KK: torch.Tensor, widths: Iterable[int]
) -> torch.Tensor:
    """Return W H W^T summed over rows of the weight, and of its error at every width: [1 + widths], on the device."""
    parts = itertools.chain([weight_NK], (weight_NK - nested.read(bits) for bits in widths))
    return torch.stack([((part @ hessian_KK) * part).sum() for part in parts])


def _losses(squares: list[torch.Tensor], widths: Iterable[int]) -> dict[str, float]:
    """Return the loss of each width over all weights and processes, by name. squares: ``_squares`` of each weight."""
    sums = (sum(column) for column in zip(*torch.stack(squares).tolist(), strict=True))
    errors = total_values(dict(zip(["", *map(str, widths)], sums, strict=True)))
    whole = errors.pop("")
    return {name: error / whole for name, error in errors.items()}


def _check_rank(job: Job, tokens: int) -> None:
    widest = max(view.shape[1] for view in job.views.values())
    if tokens < widest:
        path = next(path for path, view in job.views.items() if view.shape[1] == widest)
        raise InputError(
            f"the Hessian of {path} needs at least {widest:,} calibration tokens, found {tokens:,}; "
            "use more --samples or a longer --seq-len"
        )
