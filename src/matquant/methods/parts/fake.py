"""A weight in training: a float master whose slices are simulated, with a straight-through gradient.

Forward at width r, from codes that all widths of a step share:

    codes = clamp(round(w/scale + zero)),   read = scale_r * (slice_positions(codes, r) - zero_r)

A learned affine is kept as reach_r and centre_r, read = reach_r * (2 code_r/(2^r - 1) - 1) + centre_r.

Backward, with g the gradient of ``read`` and the rounding and the slice passed straight through:

    d w       = g                                          plain: round, slice and clamp alike (the default grid)
    d w       = g * scale_r/(2^(8-r) * scale), 0 outside the clamp                 where affines or clips are learned
    d reach_r = sum g * (read - centre_r) / reach_r,    d centre_r = sum g
    d clip    = (sum over widths without an own affine of g * read  -  sum (d w) * w) / clip

as in learned step size quantisation (Esser et al. 2020). ``clip`` is gamma*max|w| of MatQuant Eq. 3. All learned
tensors are in the units of the weights, and a step of any of them moves no weight by more than itself, so that one
learning rate fits them at every width and model size. The grid is fitted to the master at every step.
A dedicated baseline of c bits is the same with a c-bit grid.
Shapes: N out features, K in features, G groups.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from matquant.core.grid import encode, fit_grid, fit_slice, storable_scale
from matquant.core.nest import CENTRE, MASTER_BITS, OWN, UNIFORM, centred_codes, centred_zero, middle
from matquant.core.tensor import Affine, NestedTensor

LearnedAffine = tuple[torch.Tensor, torch.Tensor | None]  # reach_r and centre_r [N, G]; None: 0, and not learned


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """How all weights of a run are quantised."""

    rule: str  # slicing rule, one of nest.RULES
    bits: int = MASTER_BITS  # 8, or the width of a dedicated baseline
    group_size: int | None = None  # in features that share a scale; None: the whole row
    symmetric: bool = True  # the 8-bit zero-point is mid-range
    affine: str = (
        "refit"  # scale and zero-point of the widths ``sliced``: none, refit (least squares each step), learned
    )
    zeros: str = OWN  # zero-points of those widths: stored (OWN), or mid-range (CENTRE)
    storable: bool = True  # 8-bit scales of 8 significant bits; False: Eq. 1 to the letter, stored in float32
    sliced: tuple[int, ...] = ()  # widths with a scale of their own, unless ``affine`` is none
    kind: str = UNIFORM  # the positions that codes stand for, one of nest.GRIDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """What a weight learns besides itself."""

    clip: torch.Tensor | None = None  # the range gamma*max|w| [N, G]; None: not clipped
    limit: float = 1.0  # of clip, in units of max|w|
    affines: Mapping[int, LearnedAffine] = dataclasses.field(default_factory=dict)  # width -> (reach_r, centre_r)


def nest(
    weight_NK: torch.Tensor,
    grid: Grid,
    *,
    learned: Learned | None = None,
    coarse: Mapping[int, torch.Tensor] | None = None,
    name: str = "weight",
) -> NestedTensor:
    """Encode a weight on its grid, and give the widths ``grid.sliced`` their own affines, as they would be stored.

    coarse: masters of narrower widths, whose top bits the codes of ``weight_NK`` are confined to (``confine``).
    """
    learned = learned or Learned()
    with torch.no_grad():
        groups = 1 if grid.group_size is None else weight_NK.shape[1] // grid.group_size
        gamma = 1.0 if learned.clip is None else learned.clip / _largest(weight_NK, groups)
        tensor = encode_clipped(weight_NK, grid, gamma=gamma, beta=gamma, name=name)
        if coarse:
            encoded = {
                bits: encode(master, tensor.scale, tensor.zero, grid=grid.kind) for bits, master in coarse.items()
            }
            codes, _ = confine(encoded | {MASTER_BITS: tensor.codes})
            tensor = dataclasses.replace(tensor, codes=codes)
        slices = dict(tensor.slices)
        for bits in grid.sliced if grid.affine != "none" else ():
            if bits in learned.affines:
                slices[bits] = stored_affine(learned.affines[bits], bits)
            else:
                slices[bits] = refit_slice(weight_NK, tensor, bits, zeros=grid.zeros)
        return dataclasses.replace(tensor, slices=slices)


def refit_slice(weight_NK: torch.Tensor, tensor: NestedTensor, bits: int, *, zeros: str) -> Affine:
    """The least-squares scale and zero of one width of a nested weight; see ``grid.fit_slice``."""
    found: Affine = fit_slice(
        weight_NK,
        tensor.codes,
        bits,
        rule=tensor.rule,
        scale=tensor.scale,
        zero=tensor.zero,
        zeros=zeros,
        grid=tensor.grid,
    )
    return found


def confine(encoded: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Combine per-width masters into one nested code: each is clamped into the bin fixed by the next narrower width.

    encoded: width -> 8-bit codes [N, K] of its master. Returns the codes, and width -> int8 [N, K]: +1 or -1 where that
    master wanted to be above or below its bin.
    """
    blocked: dict[int, torch.Tensor] = {}
    codes: torch.Tensor | None = None
    drop = MASTER_BITS
    for bits in sorted(encoded):
        own = encoded[bits]
        if codes is not None:
            low = (codes >> drop) << drop
            inside = torch.minimum(torch.maximum(own, low), low + (2**drop - 1))
            blocked[bits] = (own > inside).to(torch.int8) - (own < inside).to(torch.int8)
            own = inside
        codes, drop = own, MASTER_BITS - bits
    assert codes is not None
    return codes, blocked


def start_learning(
    weight_NK: torch.Tensor,
    grid: Grid,
    *,
    trained: Sequence[int],
    clip: bool,
    nested: NestedTensor | None = None,
    name: str = "weight",
) -> Learned:
    """The learned tensors of a weight before the first step: no clipping and least-squares affines, or those of
    ``nested``, whose 8-bit read the weight is.

    Only widths that are ``trained`` learn an affine; the others are fitted at the end (``nest``).
    """
    tensor = nested or nest(weight_NK, grid, name=name)
    widths = [bits for bits in grid.sliced if bits in trained] if grid.affine == "learned" else []
    affines: dict[int, LearnedAffine] = {}
    for bits in widths:
        scale, zero = tensor.affine(bits)
        affines[bits] = (scale * middle(bits), None if grid.zeros == CENTRE else scale * (middle(bits) - zero))
    if nested is None:
        return Learned(clip=_largest(weight_NK, tensor.scale.shape[1]) if clip else None, affines=affines)
    # A hair less, so that the scale it gives is not rounded up to the next one that can be stored. Not every row of
    # given codes reaches the ends of its grid.
    reached = nested.scale * 2 ** (MASTER_BITS - grid.bits) * middle(grid.bits) * (1 - 1e-6)
    return Learned(clip=reached if clip else None, limit=1.5, affines=affines)


def backward(
    gradient_NK: torch.Tensor, read_NK: torch.Tensor, tensor: NestedTensor, bits: int, learned: Learned
) -> torch.Tensor:
    """Chain the gradient of one width's read into ``learned`` (adding to .grad); returns its share of d w.

    read_NK: ``tensor.read(bits)``. The clamp is left to ``finish_backward``.
    """
    rows, groups = tensor.scale.shape
    gradient = gradient_NK.reshape(rows, groups, -1)
    scale, _ = tensor.affine(bits)
    product = torch.linalg.vecdot(gradient, read_NK.reshape(rows, groups, -1))
    if bits in learned.affines:
        reach, centre = learned.affines[bits]
        if centre is None:
            _add_gradient(reach, _relative(product, reach))
        else:
            total = gradient.sum(-1)
            _add_gradient(reach, _relative(product - centre.detach() * total, reach))
            _add_gradient(centre, total)
    elif learned.clip is not None and bits not in tensor.slices:
        _add_gradient(learned.clip, _relative(product, learned.clip))
    ratio = scale / (tensor.scale * 2 ** (MASTER_BITS - bits))
    share: torch.Tensor = gradient * ratio[..., None]
    return share.view_as(gradient_NK)


def finish_backward(
    gradient_NK: torch.Tensor, weight_NK: torch.Tensor, tensor: NestedTensor, learned: Learned
) -> torch.Tensor:
    """Stop the summed gradient d w of all widths at the clamp and give the clip its part of it; returns d w."""
    if learned.clip is None:
        return gradient_NK
    rows, groups = tensor.scale.shape
    weight, gradient = weight_NK.reshape(rows, groups, -1), gradient_NK.reshape(rows, groups, -1)
    low, high = -tensor.zero * tensor.scale, (2**MASTER_BITS - 1 - tensor.zero) * tensor.scale
    gradient = gradient * ((weight >= low[..., None]) & (weight <= high[..., None]))
    _add_gradient(learned.clip, _relative(-torch.linalg.vecdot(gradient, weight), learned.clip))
    stopped: torch.Tensor = gradient.view_as(gradient_NK)
    return stopped


def stored_affine(learned: LearnedAffine, bits: int) -> Affine:
    """(scale_r, zero_r) as they are stored, of a learned affine."""
    reach, centre = learned
    scale = storable_scale(reach / middle(bits))
    if centre is None:
        return scale, torch.full_like(scale, middle(bits))
    return scale, (middle(bits) - centre / scale).half().float()


def keep_in_range(learned: Learned, weight_NK: torch.Tensor, tensor: NestedTensor) -> None:
    """After a step: clips inside 0.1..limit of max|w|, reaches inside 0.1..10 of the grid's own; in place."""
    with torch.no_grad():
        if learned.clip is not None:
            largest = _largest(weight_NK, tensor.scale.shape[1])
            learned.clip.clamp_(0.1 * largest, learned.limit * largest)
        for bits, (reach, _) in learned.affines.items():
            own = tensor.scale * 2 ** (MASTER_BITS - bits) * middle(bits)
            reach.clamp_(0.1 * own, 10 * own)


def encode_clipped(weight_NK: torch.Tensor, grid: Grid, *, gamma: Any, beta: Any, name: str) -> NestedTensor:
    """Codes on the grid clipped by ``gamma`` and ``beta`` (Eq. 3; factors, scalars or [N, G]), without own affines.

    Codes of a c-bit baseline become 8-bit codes at the centre of their prefix bin. A symmetric baseline grid of less
    than 8 bits is centred, zero at (2^c - 1)/2, so that its extreme codes are -max|w| and max|w| as in Eq. 1.
    """
    scale, zero = fit_grid(
        weight_NK,
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        gamma=gamma,
        beta=beta,
        storable=grid.storable,
        name=name,
    )
    if grid.bits == MASTER_BITS:
        codes = encode(weight_NK, scale, zero, grid=grid.kind)
        return NestedTensor(codes=codes, scale=scale, zero=zero, rule=grid.rule, grid=grid.kind)
    if grid.symmetric:
        zero = torch.full_like(zero, middle(grid.bits))
    return NestedTensor(
        codes=centred_codes(encode(weight_NK, scale, zero, bits=grid.bits, grid=grid.kind), grid.bits),
        scale=scale / 2 ** (MASTER_BITS - grid.bits),
        zero=centred_zero(zero, grid.bits),
        rule=grid.rule,
        slices={grid.bits: (scale, zero)},
        grid=grid.kind,
    )


def _largest(weight_NK: torch.Tensor, groups: int) -> torch.Tensor:
    """max|w| of each group, [N, G]; tiny instead of 0."""
    largest = weight_NK.detach().reshape(weight_NK.shape[0], groups, -1).abs().amax(-1)
    return largest.clamp(min=torch.finfo(torch.float32).tiny)


def _relative(product: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """``product / unit``; 0 for a group of zeros, whose unit is tiny: it has nothing to learn."""
    unit = unit.detach()
    return torch.where(unit > 2 * torch.finfo(torch.float32).tiny, product / unit, torch.zeros_like(product))


def _add_gradient(tensor: torch.Tensor, gradient: torch.Tensor) -> None:
    tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
