"""Simulate quantisation in training: slices of a float master, with a straight-through gradient.

Forward at width r, from codes that all widths of a step share:

    codes = clamp(round(w/scale + zero)),   read = scale_r * (slice_positions(codes, r) - zero_r)

A learned scale and zero-point are kept as reach_r and centre_r, read = reach_r * (2 code_r/(2^r - 1) - 1) + centre_r.

Backward, with g the gradient of ``read`` and the rounding and the slice passed straight through:

    d w       = g                                          plain: round, slice and clamp alike (the default grid)
    d w       = g * scale_r/(2^(8-r) * scale), 0 outside the clamp                 where scales or clips are learned
    d reach_r = sum g * (read - centre_r) / reach_r,    d centre_r = sum g
    d clip    = (sum over widths without a per-width scale of g * read  -  sum (d w) * w) / clip

as in learned step size quantisation (Esser et al. 2020). ``clip`` is gamma*max|w| of MatQuant Eq. 3. All learned
tensors are in the units of the weights, and a change of any of them moves no weight by more than that change, so that
one learning rate fits every width and model size. The grid is fitted to the master at every step. A dedicated c-bit
baseline works the same way with a c-bit grid.
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
    bits: int = MASTER_BITS  # 8, or a dedicated baseline's width
    group_size: int | None = None  # in features that share a scale; None: one group per row
    symmetric: bool = True  # the 8-bit zero-point is mid-range
    affine: str = (
        "refit"  # per-width scale and zero-point of ``sliced``: none, refit (least squares at each step), learned
    )
    zeros: str = OWN  # zero-points of those widths: stored (OWN), or mid-range (CENTRE)
    storable: bool = True  # round 8-bit scales to 8 significant bits; False: exactly Eq. 1, stored in float32
    sliced: tuple[int, ...] = ()  # widths with a per-width scale, unless ``affine`` is none
    kind: str = UNIFORM  # the positions that codes stand for, one of nest.GRIDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """The learned tensors of a weight, besides the weight."""

    clip: torch.Tensor | None = None  # the range gamma*max|w| [N, G]; None: not clipped
    limit: float = 1.0  # upper limit of clip, in units of max|w|
    affines: Mapping[int, LearnedAffine] = dataclasses.field(default_factory=dict)  # width -> (reach_r, centre_r)


def nest(
    weight_NK: torch.Tensor,
    grid: Grid,
    *,
    learned: Learned | None = None,
    coarse: Mapping[int, torch.Tensor] | None = None,
    finite: bool = False,
    name: str = "weight",
) -> NestedTensor:
    """Encode a weight on its grid, with per-width scales and zero-points for ``grid.sliced``, as they would be stored.

    coarse: masters of narrower widths, which confine the codes of ``weight_NK`` to their bins (``confine``). finite:
    see ``fit_grid``.
    """
    learned = learned or Learned()
    with torch.no_grad():
        groups = 1 if grid.group_size is None else weight_NK.shape[1] // grid.group_size
        gamma = 1.0 if learned.clip is None else learned.clip / _largest(weight_NK, groups)
        tensor = encode_clipped(weight_NK, grid, gamma=gamma, beta=gamma, finite=finite, name=name)
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
    """Return the least-squares scale and zero-point of one width of a nested weight; see ``grid.fit_slice``."""
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

    encoded: width -> 8-bit codes [N, K] of its master. Returns the codes, and width -> int8 [N, K]: +1 or -1 where the
    master was above or below its bin.
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
    """Return the learned tensors of a weight before the first step.

    They start without clipping and with least-squares scales and zero-points, or from ``nested``, whose 8-bit read is
    the weight. Only ``trained`` widths learn a scale and zero-point; the others are fitted at the end (``nest``).
    """
    tensor = nested or nest(weight_NK, grid, name=name)
    widths = [bits for bits in grid.sliced if bits in trained] if grid.affine == "learned" else []
    affines: dict[int, LearnedAffine] = {}
    for bits in widths:
        scale, zero = tensor.affine(bits)
        affines[bits] = (scale * middle(bits), None if grid.zeros == CENTRE else scale * (middle(bits) - zero))
    if nested is None:
        return Learned(clip=_largest(weight_NK, tensor.scale.shape[1]) if clip else None, affines=affines)
    # Slightly less, so that its scale is not rounded up to the next storable one. The codes of ``nested`` may not
    # reach the ends of their grid.
    reached = nested.scale * 2 ** (MASTER_BITS - grid.bits) * middle(grid.bits) * (1 - 1e-6)
    return Learned(clip=reached if clip else None, limit=1.5, affines=affines)


def backward(
    gradient_NK: torch.Tensor, read_NK: torch.Tensor, tensor: NestedTensor, bits: int, learned: Learned
) -> torch.Tensor:
    """Chain the gradient of one width's read into ``learned`` (adding to .grad); return its share of d w.

    read_NK: ``tensor.read(bits)``. ``finish_backward`` applies the clamp.
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
    """Stop the summed gradient d w of all widths at the clamp, add the clip's share to its .grad, and return d w."""
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
    """Return a learned scale and zero-point as stored, (scale_r, zero_r)."""
    reach, centre = learned
    scale = storable_scale(reach / middle(bits))
    if centre is None:
        return scale, torch.full_like(scale, middle(bits))
    return scale, (middle(bits) - centre / scale).half().float()


def keep_in_range(learned: Learned, weight_NK: torch.Tensor, tensor: NestedTensor) -> None:
    """Clamp after a step, in place: clips to 0.1..limit of max|w|, reaches to 0.1..10 times the grid's."""
    with torch.no_grad():
        if learned.clip is not None:
            largest = _largest(weight_NK, tensor.scale.shape[1])
            learned.clip.clamp_(0.1 * largest, learned.limit * largest)
        for bits, (reach, _) in learned.affines.items():
            own = tensor.scale * 2 ** (MASTER_BITS - bits) * middle(bits)
            reach.clamp_(0.1 * own, 10 * own)


def encode_clipped(
    weight_NK: torch.Tensor, grid: Grid, *, gamma: Any, beta: Any, finite: bool = False, name: str
) -> NestedTensor:
    """Encode on the grid clipped by ``gamma`` and ``beta`` (Eq. 3; ratios, scalars or [N, G]), without per-width
    scales.

    Codes of a c-bit baseline become 8-bit codes at the centre of their prefix bin. A symmetric baseline grid of less
    than 8 bits has its zero-point at mid-range, (2^c - 1)/2, so that its extreme codes are -max|w| and max|w| as in Eq.
    1.
    """
    scale, zero = fit_grid(
        weight_NK,
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        gamma=gamma,
        beta=beta,
        storable=grid.storable,
        finite=finite,
        grid=grid.kind,
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
    """Return max|w| of each group, [N, G]; a tiny number instead of 0."""
    largest = weight_NK.detach().reshape(weight_NK.shape[0], groups, -1).abs().amax(-1)
    return largest.clamp(min=torch.finfo(torch.float32).tiny)


def _relative(product: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Return ``product / unit``; 0 for a group of zeros, whose unit is tiny and which has nothing to learn."""
    unit = unit.detach()
    return torch.where(unit > 2 * torch.finfo(torch.float32).tiny, product / unit, torch.zeros_like(product))


def _add_gradient(tensor: torch.Tensor, gradient: torch.Tensor) -> None:
    tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
