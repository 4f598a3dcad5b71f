"""A weight in training: a float master whose slices are simulated, with a straight-through gradient.

Forward, at width r:   codes = encode(weight);  read = scale_r * (slice_codes(codes, r) - zero_r)
Backward, two ways:
- plain: d read / d weight = 1, through round, slice and clamp alike. Nothing to compute: the gradients of all widths
  add up in one tensor.
- learned: the clamp stops the gradient, and the clipping factor gamma (MatQuant Eq. 3) and each width's own scale and
  zero get theirs, as in learned step size quantisation (Esser et al. 2020).

The grid is fitted to the master afresh at every step. A dedicated baseline of c bits is the same with a c-bit grid.
Shapes: N out features, K in features, G groups.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from matquant.grid import decode, encode, fit_grid, fit_slice, storable_scale
from matquant.nest import MASTER_BITS, slice_affine, slice_codes
from matquant.tensor import Affine, NestedTensor

AFFINES = ("none", "refit", "learned")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What all weights of a run have in common. bits: 8, or the width of a dedicated baseline."""

    rule: str
    bits: int = MASTER_BITS
    group_size: int | None = None
    symmetric: bool = True
    affine: str = "refit"
    storable: bool = True  # scales of 8 significant bits; False: to the letter of Eq. 1, stored in float32
    sliced: tuple[int, ...] = ()  # the widths with an affine of their own


def fit(weight_NK: torch.Tensor, grid: Grid, *, gamma: Any = 1.0, name: str = "weight") -> Affine:
    """Scale and zero [N, G] of ``grid`` for a weight; gradients flow to ``gamma`` through the rounding of the scale.

    A baseline grid of less than 8 bits is centred (zero at (2^c - 1)/2) when symmetric, so that its extreme codes are
    -max|w| and max|w| as in Eq. 1.
    """
    options: dict[str, Any] = {"bits": grid.bits, "group_size": grid.group_size, "symmetric": grid.symmetric}
    scale, zero = fit_grid(weight_NK, gamma=gamma, beta=gamma, storable=False, name=name, **options)
    if grid.storable:
        scale = scale + (storable_scale(scale.detach(), up=True) - scale).detach()
    if grid.symmetric and grid.bits < MASTER_BITS:
        zero = zero - 0.5
    return scale, zero.detach()


def master(weight_NK: torch.Tensor, grid: Grid, affine: Affine) -> NestedTensor:
    """Encode a weight on its grid. Codes of a c-bit baseline become 8-bit codes at the centre of their prefix bin."""
    scale, zero = affine
    codes = encode(weight_NK, scale, zero, bits=grid.bits)
    slices: Mapping[int, Affine] = {}
    if grid.bits < MASTER_BITS:
        step = 2 ** (MASTER_BITS - grid.bits)
        slices = {grid.bits: (scale, zero)}
        codes = codes * step + step // 2
        scale, zero = scale / step, zero * step + step / 2
    return NestedTensor(codes=codes, scale=scale, zero=zero, rule=grid.rule, slices=slices)


def nest(
    weight_NK: torch.Tensor,
    grid: Grid,
    *,
    gamma: Any = 1.0,
    learned: Mapping[int, Affine] | None = None,
    name: str = "",
) -> NestedTensor:
    """The nested tensor of a weight: encoded, with each width of ``grid.sliced`` refitted, or as ``learned``."""
    with torch.no_grad():
        tensor = master(weight_NK, grid, fit(weight_NK, grid, gamma=gamma, name=name or "weight"))
        slices = dict(tensor.slices)
        for bits in grid.sliced if grid.affine != "none" else ():
            if learned is not None and bits in learned:
                scale_r, zero_r = learned[bits]
                slices[bits] = (storable_scale(scale_r), zero_r.half().float())
            else:
                slices[bits] = fit_slice(
                    weight_NK, tensor.codes, bits, rule=grid.rule, scale=tensor.scale, zero=tensor.zero
                )
        return dataclasses.replace(tensor, slices=slices)


def read_learned(
    weight_NK: torch.Tensor, bits: int, grid: Grid, gamma: torch.Tensor, affine: Affine | None
) -> torch.Tensor:
    """The ``bits``-bit weight with gradients to the weight, ``gamma`` and the width's ``affine`` (see the top)."""
    scale, zero = fit(weight_NK.detach(), grid, gamma=gamma)
    rows, columns = weight_NK.shape
    position = weight_NK.view(rows, scale.shape[1], -1) / scale[..., None] + zero[..., None]
    top_code = 2**grid.bits - 1
    position = position.clamp(0, top_code).view(rows, columns)
    codes = (position.detach() + 0.5).floor().to(torch.uint8)
    if grid.bits < MASTER_BITS:
        return _decode(position + (codes - position).detach(), (scale, zero))
    step = 2 ** (MASTER_BITS - bits)
    sliced = slice_codes(codes, bits, rule=grid.rule)
    code = position / step + (sliced - position / step).detach()
    return _decode(code, affine or slice_affine(scale, zero, bits, rule=grid.rule))


def _decode(code_NK: torch.Tensor, affine: Affine) -> torch.Tensor:
    weight: torch.Tensor = decode(code_NK, *affine)
    return weight
