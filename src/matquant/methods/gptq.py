"""Nested GPTQ: one pass over a small calibration text, codes that are good at every requested width at once.

GPTQ (Frantar et al. 2022) rounds the columns of a weight one after the other and lets the columns not yet rounded make
up for each error. With H = X^T X of the layer's inputs and U the upper Cholesky factor of H^-1:

    error_j = (t_j - read(code_j)) / U_jj,      t_k -= error_j U_jk  for all k > j

Here one 8-bit code serves all widths r, so each width carries a target t_r of its own, compensated with its own error
and the same U, and the code of a weight is the one that is best for all of them together:

    q = argmin over q of  sum_r lambda_r (t_r - scale_r (slice(q, r) - zero_r))^2

Each term falls until its own best slice and rises after it, so the best q lies between the widths' own choices, and
between two codes where a slice changes only the 8-bit term moves: the codes that can win are the 8-bit choice clamped
into each *cell* (codes whose slices are all equal) in between. Usually that is one code, rarely more than ten.

Before the pass each row (or group) gets the clipping that costs the widths least together; after it, the widths' own
affines are refitted in the norm of H and a round of coordinate descent (``sweep``) corrects what could not be known
column by column (6-8 % less summed error on stories260K, at every width). H is accumulated once per block from the
inputs of the model served at 8 bits. Limits: a grid that holds 8 bits without clipping gives 2-bit codes too wide bins;
smaller groups help.
Shapes: N out features, K in features, G groups, R widths, J codes that can win, T tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from matquant.core.grid import SMALLEST_SCALE, middle, storable_scale
from matquant.core.nest import (
    CENTRE,
    MASTER_BITS,
    OWN,
    UNIFORM,
    labels_of,
    nearest_codes,
    positions,
    slice_codes,
    slice_positions,
    stored_codes,
)
from matquant.core.tensor import Affine, NestedTensor
from matquant.methods.parts.blocks import Block, Solved, calibration, run_blocks
from matquant.methods.parts.fake import Grid, Learned, nest
from matquant.methods.parts.job import Job
from matquant.methods.parts.objective import FLOAT
from matquant.methods.parts.tune import tune_block
from matquant.options.gptq import Settings
from matquant.system.errors import InputError

COLUMNS = 128  # compensated together, as in the original
CLIPS = tuple(1 - step / 10 for step in range(7))  # of max|w|: 1, 0.9, ..., 0.4
SEEN = 256  # weights of a group that the search for its clipping looks at
DAMP_LIMIT = 1.0  # more damping than the mean diagonal itself means the Hessian says nothing


def run(job: Job) -> Iterator[tuple[str, NestedTensor]]:
    """Solve the model block by block; see ``blocks.run_blocks``."""
    settings = Settings(**job.options)
    if any(width.teachers for width in job.objective):
        raise InputError(f"method 'gptq' has no distillation, objective {job.spec.objective!r} asks for it; use 8,4,2")
    if settings.tune and job.grid.rule != "prefix":
        raise InputError(f"tune={settings.tune} needs nested bins, rule {job.grid.rule!r} has none; use rule 'prefix'")
    tokens = calibration(job, samples=settings.samples, seq_len=settings.seq_len, seed=settings.seed)
    _check_rank(job, tokens.numel())
    return run_blocks(
        job,
        functools.partial(_solve, settings=settings),
        streams=(FLOAT, *(width.bits for width in job.objective)) if settings.tune else (job.grid.bits,),
        tokens=tokens,
        batch_size=settings.batch_size,
        settings=dataclasses.asdict(settings),
    )


# ------------------------------------------------------------------------------------------------------------ the codes


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A damped Hessian, ready for compensation. order: columns, most important first; upper: U in that order."""

    order_K: torch.Tensor
    upper_KK: torch.Tensor
    damp: float


def inverse_factor(hessian_KK: torch.Tensor, *, damp: float, name: str = "weight", reorder: bool = True) -> Factor:
    """U with U^T U = (H + damp * mean diagonal)^-1. An H that is not positive definite gets ten times the damping,
    again and again; InputError when that reaches DAMP_LIMIT. Columns that no input reaches count as the mean.
    """
    diagonal = hessian_KK.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise InputError(f"the Hessian of {name} is {float(mean)} on average; its inputs are broken: use other text")
    order = (
        diagonal.argsort(descending=True, stable=True)
        if reorder
        else torch.arange(len(diagonal), device=diagonal.device)
    )
    ordered = hessian_KK[order][:, order]
    dead = torch.where(ordered.diagonal() == 0, mean, torch.zeros_like(mean))
    while damp <= DAMP_LIMIT:
        damped = ordered + torch.diag(dead + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and bool(torch.isfinite(upper).all()):
            return Factor(order_K=order, upper_KK=upper, damp=damp)
        damp *= 10
    raise InputError(f"the Hessian of {name} is not positive definite even with damping {damp / 10:g}; give more text")


def nested_codes(
    weight_NK: torch.Tensor,
    factor: Factor,
    affines: Mapping[int, Affine],
    weights: Mapping[int, float],
    *,
    rule: str,
    grid: str = UNIFORM,
) -> torch.Tensor:
    """8-bit codes, uint8 [N, K], of a weight on fixed affines, width -> (scale, zero) [N, G].

    weights: width -> lambda; 8 bits without one follow the others for free. A single width has its own r-bit codes.
    """
    widths = sorted(affines, reverse=True)
    scale_RNK, zero_RNK = (
        torch.stack([_spread(affines[bits][part], weight_NK.shape[1], factor.order_K) for bits in widths])
        for part in (0, 1)
    )
    lambdas_R = weight_NK.new_tensor([weights.get(bits, 0.0) for bits in widths])
    choose = _chooser(rule, grid, widths, weight_NK.device)
    target_RNK = weight_NK[:, factor.order_K].expand(len(widths), -1, -1).clone()
    upper = factor.upper_KK.to(weight_NK.dtype)
    codes_NK = torch.empty(weight_NK.shape, dtype=torch.uint8, device=weight_NK.device)
    for start in range(0, weight_NK.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight_NK.shape[1])
        # columns first, so that one column of all rows is contiguous
        part = target_RNK[:, :, start:stop].permute(2, 0, 1).contiguous()
        scale, zero = (x[:, :, start:stop].permute(2, 0, 1).contiguous() for x in (scale_RNK, zero_RNK))
        errors = torch.empty_like(part)
        for column in range(stop - start):
            code, read_RN = choose(part[column], scale[column], zero[column], lambdas_R)
            codes_NK[:, start + column] = code
            row = upper[start + column, start + column : stop]
            errors[column] = (part[column] - read_RN) / row[0]
            part[column + 1 :].addcmul_(row[1:, None, None], errors[column], value=-1)
        if stop < weight_NK.shape[1]:
            later = upper[start:stop, stop:]
            for width in range(len(widths)):
                target_RNK[width, :, stop:].addmm_(errors[:, width].T, later, alpha=-1)
    restored = torch.empty_like(codes_NK)
    restored[:, factor.order_K] = codes_NK
    return restored


def _nearest(
    target_RN: torch.Tensor,
    scale_RN: torch.Tensor,
    zero_RN: torch.Tensor,
    lambdas_R: torch.Tensor,
    *,
    bits: int,
    grid: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    code_RN = nearest_codes(target_RN / scale_RN + zero_RN, bits, grid=grid)
    return code_RN[0], scale_RN * (positions(code_RN, bits, grid=grid) - zero_RN)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The runs of 8-bit codes in which no slice changes. low, high: first and last code of each cell [C]; of: the cell
    of each code [256]; first, last: the cells of each slice code [R - 1, 2^r (+ 1)]; positions of the slices: [R, 256];
    rows as widths.
    """

    widths: tuple[int, ...]
    grid: str
    low_C: torch.Tensor
    high_C: torch.Tensor
    of_Q: torch.Tensor
    first: tuple[torch.Tensor, ...]
    last: tuple[torch.Tensor, ...]
    positions_RQ: torch.Tensor

    def choose(
        self, target_RN: torch.Tensor, scale_RN: torch.Tensor, zero_RN: torch.Tensor, lambdas_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best code of each row, int64 [N], and what each width reads from it [R, N]."""
        position_RN = target_RN / scale_RN + zero_RN
        if self.grid == UNIFORM:
            nearest_RN = torch.floor(position_RN + 0.5).long().unbind()
        else:
            nearest_RN = tuple(
                nearest_codes(row, bits, grid=self.grid).long()
                for row, bits in zip(position_RN, self.widths, strict=True)
            )
        master_N = nearest_RN[0].clamp_(0, 2**MASTER_BITS - 1)
        below_N = above_N = self.of_Q[master_N]
        for width in range(1, len(self.widths)):
            own_N = nearest_RN[width].clamp_(0, len(self.first[width - 1]) - 1)
            below_N = torch.minimum(below_N, self.last[width - 1][own_N])
            above_N = torch.maximum(above_N, self.first[width - 1][own_N])
        span = int((above_N - below_N).max())
        cell_JN = torch.minimum(below_N + torch.arange(span + 1, device=below_N.device)[:, None], above_N)
        code_JN = torch.minimum(torch.maximum(master_N, self.low_C[cell_JN]), self.high_C[cell_JN])
        read_RJN = scale_RN[:, None] * (self.positions_RQ[:, code_JN] - zero_RN[:, None])
        if span == 0:
            return code_JN[0], read_RJN[:, 0]
        cost_JN = torch.tensordot(lambdas_R, (target_RN[:, None] - read_RJN).square_(), dims=1)
        best_N = cost_JN.argmin(0)
        read_RN = read_RJN.gather(1, best_N.expand(len(read_RJN), 1, -1))[:, 0]
        return code_JN.gather(0, best_N[None])[0], read_RN


def _chooser(
    rule: str, grid: str, widths: Sequence[int], device: torch.device
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """What gives a column of codes its best values at ``widths``, descending: ``Cells.choose``, or ``_nearest``."""
    if len(widths) > 1:
        return _cells(rule, grid, tuple(widths), device).choose
    return functools.partial(_nearest, bits=widths[0], grid=grid)


@functools.cache
def _cells(rule: str, grid: str, widths: tuple[int, ...], device: torch.device) -> Cells:
    every = torch.arange(2**MASTER_BITS)
    slices = torch.stack([slice_codes(every, bits, rule=rule) for bits in widths])
    changes = (slices[1:, 1:] != slices[1:, :-1]).any(0)
    cell = torch.cat([torch.zeros(1, dtype=torch.int64), changes.long().cumsum(0)])
    count = int(cell[-1]) + 1
    low = torch.tensor([int((cell == index).nonzero()[0]) for index in range(count)])
    high = torch.tensor([int((cell == index).nonzero()[-1]) for index in range(count)])
    first, last = [], []
    for row in slices[1:]:
        members = [(row == code).nonzero().flatten() for code in range(int(row.max()) + 1)]
        first.append(cell[torch.stack([codes[0] for codes in members])])
        last.append(cell[torch.stack([codes[-1] for codes in members])])
    reads = [slice_positions(every, bits, rule=rule, grid=grid) for bits in widths]
    return Cells(
        widths=widths,
        grid=grid,
        low_C=low.to(device),
        high_C=high.to(device),
        of_Q=cell.to(device),
        first=tuple(codes.to(device) for codes in first),
        last=tuple(codes.to(device) for codes in last),
        positions_RQ=torch.stack(reads).to(device),
    )


def sweep(
    weight_NK: torch.Tensor,
    codes_NK: torch.Tensor,
    hessian_KK: torch.Tensor,
    affines: Mapping[int, Affine],
    weights: Mapping[int, float],
    *,
    rule: str,
    grid: str = UNIFORM,
) -> torch.Tensor:
    """One round of coordinate descent: each code again the best for all widths, all other codes being what they are.

    With D_r the error of width r, its best read of column j is read_rj + (D_r H)_j / H_jj; the summed error
    sum_r lambda_r D_r H D_r^T of a row never grows. hessian: damped as in the pass before.
    """
    widths = sorted(affines, reverse=True)
    columns = weight_NK.shape[1]
    natural = torch.arange(columns, device=weight_NK.device)
    scale_RNK, zero_RNK = (
        torch.stack([_spread(affines[bits][part], columns, natural) for bits in widths]) for part in (0, 1)
    )
    lambdas_R = weight_NK.new_tensor([weights.get(bits, 0.0) for bits in widths])
    choose = _chooser(rule, grid, widths, weight_NK.device)
    slices = [codes_NK if len(widths) == 1 else slice_codes(codes_NK, bits, rule=rule) for bits in widths]
    reads = [positions(codes, bits, grid=grid) for codes, bits in zip(slices, widths, strict=True)]
    read_RNK = scale_RNK * (torch.stack(reads).to(weight_NK.dtype) - zero_RNK)
    hessian = hessian_KK.to(weight_NK.dtype)
    gradient_RNK = (weight_NK - read_RNK) @ hessian
    result_NK = codes_NK.clone()
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        read, scale, zero, gradient = (
            x[:, :, start:stop].permute(2, 0, 1).contiguous() for x in (read_RNK, scale_RNK, zero_RNK, gradient_RNK)
        )
        changes = torch.empty_like(read)
        for column in range(stop - start):
            row = hessian[start + column, start:stop]
            target_RN = read[column] + gradient[column] / row[column].clamp(min=torch.finfo(row.dtype).tiny)
            code, new_RN = choose(target_RN, scale[column], zero[column], lambdas_R)
            changes[column] = read[column] - new_RN
            gradient[column + 1 :].addcmul_(row[column + 1 :, None, None], changes[column])
            result_NK[:, start + column] = code
        for width in range(len(widths)):
            gradient_RNK[width, :, stop:].addmm_(changes[:, width].T, hessian[start:stop, stop:])
    return result_NK


def _spread(values_NG: torch.Tensor, columns: int, order_K: torch.Tensor) -> torch.Tensor:
    """Values per group as values per column [N, K], in the order of compensation."""
    groups = values_NG.shape[1]
    return values_NG.repeat_interleave(columns // groups, dim=1)[:, order_K]


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
    """Nested codes of one weight. hessian: X^T X up to a factor; weights: width -> lambda (ignored by a dedicated
    baseline, ``grid.bits`` below 8). sweeps: rounds of ``sweep``, the affines refitted before each and at the end.
    Returns torch tensors as ``fake.nest`` does.
    """
    factor = factor or inverse_factor(hessian_KK, damp=Settings.damp, name=name)
    dedicated = grid.bits < MASTER_BITS
    weights = {grid.bits: 1.0} if dedicated else weights
    start = _start(weight_NK, hessian_KK.diagonal(), grid, weights, name)
    affines = {bits: start.affine(bits) for bits in ({grid.bits} if dedicated else {MASTER_BITS, *weights})}
    codes = nested_codes(weight_NK, factor, affines, weights, rule=grid.rule, grid=grid.kind)
    own = tuple(bits for bits in grid.sliced if grid.affine != "none")

    def refit(bits: int) -> Affine:
        sliced = codes if dedicated else slice_codes(codes, bits, rule=grid.rule)
        fallback = affines.get(bits) or start.affine(bits)
        position = positions(sliced, bits, grid=grid.kind)
        return refit_affine(weight_NK, position, hessian_KK, bits=bits, fallback=fallback, zeros=grid.zeros)

    damped = hessian_KK.clone()
    damped.diagonal().add_(factor.damp * hessian_KK.diagonal().mean())
    for _ in range(sweeps):
        affines |= {bits: refit(bits) for bits in own if bits in affines}
        codes = sweep(weight_NK, codes, damped, affines, weights, rule=grid.rule, grid=grid.kind)
    slices = dict(start.slices) | {bits: refit(bits) for bits in own}
    if dedicated:
        step = 2 ** (MASTER_BITS - grid.bits)
        codes = codes * step + step // 2  # the centre of its prefix bin, as fake.nest stores it
    codes = labels_of(stored_codes(codes, grid=grid.kind), grid=grid.kind)  # of equal ones the one that is read back
    return dataclasses.replace(start, codes=codes, slices=slices)


# -------------------------------------------------------------------------------------------------- grids and affines


def _start(
    weight_NK: torch.Tensor, importance_K: torch.Tensor, grid: Grid, weights: Mapping[int, float], name: str
) -> NestedTensor:
    """Rounded to nearest with the clipping of each group, of CLIPS, that costs the widths least, columns weighted by
    the Hessian's diagonal."""
    groups = 1 if grid.group_size is None else weight_NK.shape[1] // grid.group_size
    size = weight_NK.shape[1] // groups
    largest_NG = weight_NK.reshape(len(weight_NK), groups, -1).abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    seen_K = torch.arange(weight_NK.shape[1], device=weight_NK.device)
    seen_K = seen_K.reshape(groups, size)[:, :: max(1, size // SEEN)].flatten()
    part_NK, part_K = weight_NK[:, seen_K].contiguous(), importance_K[seen_K]
    part_grid = dataclasses.replace(
        grid,
        group_size=None if grid.group_size is None else len(seen_K) // groups,
        sliced=tuple(bits for bits in grid.sliced if bits in weights),
    )
    best_NG = torch.full_like(largest_NG, torch.inf)
    clip_NG = largest_NG.clone()
    for clip in CLIPS:
        tensor = nest(part_NK, part_grid, learned=Learned(clip=clip * largest_NG), name=name)
        cost_NG = torch.zeros_like(best_NG)
        for bits, weight in weights.items():
            error_NK = (tensor.read(bits) - part_NK).square_() * part_K
            cost_NG += weight * error_NK.reshape(len(weight_NK), groups, -1).sum(-1)
        clip_NG = torch.where(cost_NG < best_NG, clip * largest_NG, clip_NG)
        best_NG = torch.minimum(best_NG, cost_NG)
    return nest(weight_NK, grid, learned=Learned(clip=clip_NG), name=name)


def refit_affine(
    weight_NK: torch.Tensor,
    position_NK: torch.Tensor,
    hessian_KK: torch.Tensor,
    *,
    bits: int,
    fallback: Affine,
    zeros: str = OWN,
) -> Affine:
    """Scale and zero of r-bit positions, [N, G] each, that minimise d H d^T with d = w - scale*(position - zero)
    over all groups of a row together, as they are stored; the zero in the middle of the codes with ``zeros`` CENTRE.
    Rows they do not improve keep ``fallback``.
    """
    rows, columns = weight_NK.shape
    groups = fallback[0].shape[1]
    size = columns // groups
    hessian = hessian_KK.to(weight_NK.dtype)
    base = middle(bits) if zeros == CENTRE else 0.0
    code_NGK = (position_NK.to(weight_NK.dtype) - base).reshape(rows, groups, size)
    # The features of a row are its codes and, for own zeros, its ones, group by group:
    # w = sum_g scale_g code_g - offset_g one_g.
    features = groups if zeros == CENTRE else 2 * groups
    gram = weight_NK.new_empty(rows, features, features)
    right = weight_NK.new_empty(rows, features)
    for group in range(groups):
        inside = slice(group * size, (group + 1) * size)
        code_H = (code_NGK[:, group] @ hessian[inside]).reshape(rows, groups, size)
        gram[:, group, :groups] = (code_H * code_NGK).sum(-1)
        gram[:, group, groups:] = code_H.sum(-1)[:, : features - groups]
        right[:, group] = (code_H * weight_NK.reshape(rows, groups, size)).sum(-1).sum(-1)
    if zeros == OWN:
        ones_GK = torch.eye(groups, dtype=weight_NK.dtype, device=weight_NK.device).repeat_interleave(size, dim=1)
        ones_H = ones_GK @ hessian
        gram[:, groups:, :groups] = gram[:, :groups, groups:].transpose(1, 2)
        gram[:, groups:, groups:] = ones_H @ ones_GK.T
        right[:, groups:] = weight_NK @ ones_H.T
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6)
    solution, failed = torch.linalg.solve_ex(gram, right)
    scale = solution[:, :groups]
    stored = storable_scale(scale.clamp(min=SMALLEST_SCALE)).to(weight_NK.dtype)
    zero = torch.full_like(scale, base)
    if zeros == OWN:
        mean, offset = code_NGK.mean(-1), -solution[:, groups:]
        zero = (mean - (mean * scale - offset) / stored).half().to(weight_NK.dtype)
    usable = (failed == 0)[:, None] & (scale >= SMALLEST_SCALE) & zero.isfinite()
    scale, zero = torch.where(usable, stored, fallback[0]), torch.where(usable, zero, fallback[1])
    # d H d^T is quadratic in (scale, -scale*zero), and the gram matrix is all it takes to compare two of them.
    fitted, kept = (torch.cat([s, -s * z], dim=1)[:, :features].to(gram.dtype) for s, z in ((scale, zero), fallback))
    errors = [((gram @ x[:, :, None])[:, :, 0] * x - 2 * right * x).sum(1) for x in (fitted, kept)]
    better = (errors[0] < errors[1])[:, None]
    return torch.where(better, scale, fallback[0]).float(), torch.where(better, zero, fallback[1]).float()


# ------------------------------------------------------------------------------------------------------------ the block


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


def nest_block(
    job: Job, block: Block, weights: Mapping[str, torch.Tensor], *, damp: float, sweeps: int
) -> tuple[dict[str, NestedTensor], dict[str, Any]]:
    """Nested codes of a block's ``weights`` [N, K], by path, and a log record.

    The Hessians are those of the block as it is, fed with its widest stream. "loss": D H D^T / W H W^T, all weights.
    """
    lambdas = {width.bits: width.weight for width in job.objective}
    widest = max(block.inputs)
    hessians, leaders = collect_hessians(dataclasses.replace(block, inputs={widest: block.inputs[widest]}))
    factors: dict[str, Factor] = {}
    nested: dict[str, NestedTensor] = {}
    errors, total = dict.fromkeys(lambdas, 0.0), 0.0
    for path, weight in weights.items():
        hessian, leader = hessians[leaders[path]], leaders[path]
        if leader not in factors:
            factors[leader] = inverse_factor(hessian, damp=damp, name=path)
        nested[path] = nested_gptq(weight, hessian, job.grid, lambdas, factor=factors[leader], sweeps=sweeps, name=path)
        total += float(((weight @ hessian) * weight).sum())
        for bits in lambdas:
            error = weight - nested[path].read(bits)
            errors[bits] += float(((error @ hessian) * error).sum())
    record: dict[str, Any] = {"loss": {str(bits): error / total for bits, error in errors.items()}}
    damped = max(factor.damp for factor in factors.values())
    if damped > damp:
        record["notice"] = f"{block.name}: the Hessian was not positive definite; damped by {damped:g} of its mean"
    return nested, record


def collect_hessians(block: Block) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """X^T X [K, K] of every linear's inputs, float32, on the block's device, and path -> the path whose Hessian it has.

    Linears that are given the same tensor share one. Fused experts see the tokens routed to them.
    """
    (states,) = block.inputs.values()
    paths = {view.parameter.removesuffix(".weight"): path for path, view in block.views.items()}
    modules = {f"{block.name}.{name}": module for name, module in block.module.named_modules()}
    hessians: dict[str, torch.Tensor] = {}
    leaders: dict[str, str] = {}
    given: dict[int, tuple[str, torch.Tensor]] = {}  # inputs of this forward pass, kept so that their ids stay theirs

    def add(path: str, inputs: torch.Tensor) -> None:
        flat = inputs.reshape(-1, inputs.shape[-1])
        if path not in hessians:
            hessians[path] = flat.new_zeros(flat.shape[1], flat.shape[1])
        hessians[path].addmm_(flat.T, flat)

    def linear(module: torch.nn.Module, args: tuple[torch.Tensor, ...], path: str) -> None:
        leader, _ = given.setdefault(id(args[0]), (path, args[0]))
        leaders[path] = leader
        if leader == path:
            add(path, args[0])

    def experts(module: Any, args: tuple[torch.Tensor, ...], name: str) -> None:
        tokens, chosen = args[0], args[1]
        for path, view in block.views.items():
            if view.parameter.rpartition(".")[0] != name:
                continue
            parameter = dict(module.named_parameters())[view.parameter.rpartition(".")[2]]
            expert = view.offset // (parameter.shape[1] * parameter.shape[2])
            routed = tokens[(chosen == expert).any(-1)]
            if parameter is module.down_proj:
                gate, up = (routed @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                routed = module.act_fn(gate) * up
            leaders[path] = path
            add(path, routed)

    handles = []
    for name, module in modules.items():
        if name in paths and isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(functools.partial(linear, path=paths[name])))
        elif name.rpartition(".")[2] == "experts" and any(
            view.parameter.startswith(f"{name}.") for view in block.views.values()
        ):
            handles.append(module.register_forward_pre_hook(functools.partial(experts, name=name)))
    try:
        with torch.no_grad():
            for batch in states:
                given.clear()
                block.call(block.module, batch)
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(block.views) - set(leaders))
    if missing:
        raise InputError(f"method 'gptq' does not see the inputs of {missing[0]}; --exclude it, or use --method rtn")
    for hessian in hessians.values():
        if not hessian.diagonal().any():
            hessian.fill_diagonal_(1.0)  # an expert that no token reached: rounded to nearest
    return hessians, leaders


def _check_rank(job: Job, tokens: int) -> None:
    widest = max(view.shape[1] for view in job.views.values())
    if tokens < widest:
        path = next(path for path, view in job.views.items() if view.shape[1] == widest)
        raise InputError(
            f"the Hessian of {path} needs at least {widest:,} tokens of text, calibration has {tokens:,}; "
            "use more --samples or a longer --seq-len"
        )
