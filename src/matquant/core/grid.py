"""Float weights <-> 8-bit codes: fit a grid, encode, decode, and refit a slice.

A weight row (or group of a row) is stored as codes q with a scale and a zero-point: w = scale * (q - zero). The grid is
min-max (MatQuant Eq. 1), optionally clipped (Eq. 3):

    scale = (gamma*max - beta*min) / (2^c - 1),   zero = -beta*min / scale
    q = clamp(round(w/scale + zero), 0, 2^c - 1)

Symmetric grids (the default: the file is then a stock int8 file) take max = -min = max|w| and zero = 2^(c-1).
Scales are rounded up to 8 significant bits inside the range of fp16, so that scale * 2^k is the same number in bf16,
fp16 and fp32 and a slice is bit-exact in every engine.

An r-bit slice may have a per-width scale and zero-point, w = scale_r * (code_r - zero_r), fitted to the float weights
by least squares (``fit_slice``). They cost 4 bytes per group, nothing in a kernel, and reduce the int2 error of
untrained Gaussian rows by 20 %. With zeros "centre" the zero-point is fixed at mid-range, (2^r - 1)/2, and not stored:
2 bytes per group, and integers of r + 1 bits hold the slice exactly.

On the float grid a group of 32 is a block of MXFP4, so its scale is a power of two, rounded up (``power_of_two``).

The code runs on numpy arrays and torch tensors.
Shapes: N out features, K in features, G groups of K/G features.
"""

import math
from typing import Any

from array_api_compat import array_namespace

from matquant.core.nest import (
    CENTRE,
    FLOAT,
    OWN,
    UNIFORM,
    check_bits,
    middle,
    nearest_codes,
    round_half_up,
    slice_affine,
    slice_positions,
    span,
)
from matquant.system.errors import InputError

SMALLEST_SCALE = 2.0**-24  # the smallest positive fp16 number
LARGEST_SCALE = 65280.0  # the largest fp16 number with 8 significant bits
LARGEST_ZERO = 65504.0  # the largest fp16 number
BLOCK = 32  # neighbouring in features that share a scale in MXFP4
GROUP_SIZES = (16, 32, 64, 128, 256)  # sizes that other engines can read


def check_finite(weight_NK: Any, *, name: str = "weight") -> None:
    """Raise ValueError naming the tensor if it holds NaN or infinity."""
    xp = array_namespace(weight_NK)
    bad = int(xp.sum(xp.astype(~xp.isfinite(weight_NK), xp.int64)))
    if bad:
        raise InputError(
            f"{name} has {bad} NaN or infinite weights out of {math.prod(weight_NK.shape)}; "
            "repair the tensor, or exclude this module path"
        )


def check_group_size(in_features: int, group_size: int | None, *, name: str = "weight") -> int:
    """Return the group length of a row (``group_size`` None: the whole row); ValueError if it does not divide."""
    if group_size is None:
        return in_features
    if group_size < 1 or in_features % group_size:
        fits = ", ".join(str(size) for size in GROUP_SIZES if in_features % size == 0) or "channel"
        raise InputError(
            f"group_size={group_size} does not divide in_features={in_features} of {name}; "
            f"use one of {fits}, or exclude this module path"
        )
    return group_size


def fit_grid(
    weight_NK: Any,
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    gamma: Any = 1.0,
    beta: Any = 1.0,
    integer_zero: bool = True,
    storable: bool = True,
    finite: bool = False,
    grid: str = UNIFORM,
    name: str = "weight",
) -> tuple[Any, Any]:
    """Fit the min-max grid of Eq. 1, clipped as in Eq. 3, to each group of each row.

    weight_NK: floats [N, K], numpy or torch. gamma, beta: clipping factors in (0, 1], scalars or [N, G].
    symmetric: one range max|w| on both sides, zero-point at 2^(bits-1). Otherwise, with ``integer_zero``, the range is
    widened to contain 0 and the zero-point rounded to an integer; without it, exactly Eq. 1 and Eq. 3 (float32 then
    loses the half-step guarantee on narrow groups far from 0, and a group whose clipped range is empty uses |max| as
    its range).
    storable: round scales up to 8 significant bits in the range of fp16. Up, so that no weight is clipped by it.
    finite: the weights are known to be finite, so do not check, which would wait for a GPU. grid: the positions that
    codes stand for, one of nest.GRIDS.
    Returns (scale_NG, zero_NG), float32. Raises ValueError on NaN or infinite weights and on group sizes that do not
    divide K, both naming ``name``.
    """
    check_bits(bits)
    if not finite:
        check_finite(weight_NK, name=name)
    xp = array_namespace(weight_NK)
    rows, columns = weight_NK.shape
    size = check_group_size(columns, group_size, name=name)
    grouped = xp.reshape(xp.astype(weight_NK, xp.float32), (rows, columns // size, size))
    high = xp.astype(gamma * xp.max(grouped, axis=-1), xp.float32)
    low = xp.astype(beta * xp.min(grouped, axis=-1), xp.float32)
    top_code = 2**bits - 1
    # Divide each end before adding them: their sum may overflow float32.
    if symmetric:
        step = xp.maximum(xp.abs(high), xp.abs(low)) / span(bits, grid) * 2
    elif integer_zero:
        high, low = high.clip(min=0.0), low.clip(max=0.0)
        step = high / top_code - low / top_code
    else:
        # A constant group has no range; with |c|/top as its step it decodes to within half of it.
        step = xp.where(high > low, high / top_code - low / top_code, xp.abs(high) / top_code)
    if grid == FLOAT and group_size == BLOCK:
        scale = power_of_two(step)
    elif storable and (symmetric or integer_zero):
        scale = storable_scale(step, up=True)
    else:
        scale = xp.where(step > 0, step, xp.full_like(step, SMALLEST_SCALE))
    if symmetric:
        return scale, xp.full_like(scale, 2 ** (bits - 1))
    zero = -low / scale
    if integer_zero:
        zero = round_half_up(zero).clip(min=0, max=top_code)
    return scale, zero


def encode(weight_NK: Any, scale_NG: Any, zero_NG: Any, *, bits: int = 8, grid: str = UNIFORM) -> Any:
    """Encode weights as clamp(floor(w/scale + zero + 1/2), 0, 2^bits - 1), uint8 [N, K] (Eq. 1), or, on a grid that is
    not uniform, as the code whose position is nearest to w/scale + zero."""
    check_bits(bits)
    xp = array_namespace(weight_NK)
    position = _grouped(xp.astype(weight_NK, xp.float32), scale_NG) / scale_NG[..., None] + zero_NG[..., None]
    return xp.reshape(nearest_codes(position, bits, grid=grid), weight_NK.shape)


def decode(positions_NK: Any, scale_NG: Any, zero_NG: Any) -> Any:
    """Return the weights scale * (positions - zero), float32 [N, K], of codes or positions of any numeric dtype."""
    xp = array_namespace(scale_NG)
    grouped = _grouped(xp.astype(positions_NK, xp.float32), scale_NG)
    return xp.reshape((grouped - zero_NG[..., None]) * scale_NG[..., None], positions_NK.shape)


def fit_slice(
    weight_NK: Any,
    codes_NK: Any,
    bits: int,
    *,
    rule: str,
    scale: Any,
    zero: Any,
    zeros: str = OWN,
    storable: bool = True,
    grid: str = UNIFORM,
) -> tuple[Any, Any]:
    """Fit scale and zero-point of one width: min over each group of sum (w - scale_r*(position_r - zero_r))^2.

    weight_NK: the float weights; codes_NK: their 8-bit codes; scale, zero: the 8-bit grid [N, G].

    zeros: OWN, or CENTRE for the mid-range zero-point (2^r - 1)/2 and the scale that is best with it. storable: scale_r
    is rounded to 8 significant bits in the range of fp16; a stored zero_r is then refitted and rounded to float16.

    A group whose sliced codes are all equal, or whose best slope is not positive, keeps the default scale of
    ``slice_affine`` and gets the zero-point that makes its mean exact. Returns (scale_r, zero_r), float32 [N, G].
    """
    xp = array_namespace(weight_NK)
    weight = _grouped(xp.astype(weight_NK, xp.float32), scale)
    code = _grouped(slice_positions(codes_NK, bits, rule=rule, grid=grid), scale)
    if zeros == CENTRE:  # in place of the means that a stored zero-point would be fitted to
        mean_weight, mean_code = xp.zeros_like(scale), xp.full_like(scale, middle(bits))
    else:
        mean_weight, mean_code = xp.mean(weight, axis=-1), xp.mean(code, axis=-1)
    centred_code = code - mean_code[..., None]
    variance = xp.sum(centred_code * centred_code, axis=-1)
    covariance = xp.sum(centred_code * (weight - mean_weight[..., None]), axis=-1)
    default, _ = slice_affine(scale, zero, bits, rule=rule, grid=grid)
    slope = covariance / xp.where(variance > 0, variance, xp.ones_like(variance))
    usable = (variance > 0) & (slope >= (SMALLEST_SCALE if storable else 0.0)) & (slope > 0)
    fitted = xp.where(usable, slope, default)
    if not storable:
        return fitted, mean_code - mean_weight / fitted
    fitted = storable_scale(fitted)
    if zeros == CENTRE:
        return fitted, mean_code
    # A nearly constant group far from 0 can need a zero-point beyond float16.
    holds = xp.abs(mean_code - mean_weight / fitted) < LARGEST_ZERO
    fitted = xp.where(holds, fitted, storable_scale(default))
    zero_r = mean_code - mean_weight / fitted
    return fitted, xp.astype(xp.astype(zero_r, xp.float16), xp.float32)


def storable_scale(scale: Any, *, up: bool = False) -> Any:
    """Round positive scales to 8 significant bits (bf16's) inside the range of fp16, to nearest or ``up``.

    Below 2^-17 the steps are those of fp16, 2^-24. float32 in, float32 out; multiplying by 2^k stays exact in bf16,
    fp16 and fp32 while inside the range.
    """
    xp = array_namespace(scale)
    scale = xp.astype(scale, xp.float32).clip(min=SMALLEST_SCALE, max=LARGEST_SCALE)
    step = xp.exp2(xp.floor(xp.log2(scale)) - 7).clip(min=SMALLEST_SCALE)
    units = scale / step
    rounded = (xp.ceil(units) if up else round_half_up(units)) * step
    return rounded.clip(min=SMALLEST_SCALE, max=LARGEST_SCALE)


def power_of_two(scale: Any) -> Any:
    """Round positive scales up to powers of two inside the range of fp16; float32 in, float32 out."""
    xp = array_namespace(scale)
    scale = xp.astype(scale, xp.float32).clip(min=SMALLEST_SCALE, max=2.0**15)
    below = xp.exp2(xp.floor(xp.log2(scale)))  # or the power above, if log2 is rounded up to an integer
    return xp.where(below < scale, 2 * below, below)


def _grouped(values_NK: Any, scale_NG: Any) -> Any:
    """View [N, K] as [N, G, K/G], with G from the scale."""
    xp = array_namespace(values_NK)
    rows, columns = values_NK.shape
    groups = scale_NG.shape[-1]
    return xp.reshape(values_NK, (rows, groups, columns // groups))
