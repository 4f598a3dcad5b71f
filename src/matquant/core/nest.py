"""The definition of a nested weight: an 8-bit code, and how to read it at fewer bits.

A model is stored once, as 8-bit codes q in 0..255. A *rule* slices the r-bit codes of its r-bit model out of them. With
d = 2^(8-r):

    rule       r-bit code                        value on the 8-bit grid    source
    prefix     floor(q / d), the top r bits      code*d + (d-1)/2           ours: exactly nested, bin centres
    round      min(floor(q/d + 1/2), 2^r - 1)    code*d                     MatQuant Eq. 6
    extra      floor(q/d + 1/2)                  code*d                     MatQuant Eq. 8: 2^r + 1 values

Rounding is half up, as in the paper's text ("the (r+1)th bit decides"); numpy.round and torch.round are half-to-even
and differ at q = d/2. ``round`` and ``extra`` need bit r+1 of the code, ``prefix`` reads exactly r bits.

A *grid* is the table of positions that the 256 codes stand for, symmetric about its middle; codes are labels in the
order of their positions. Slices are taken from labels, so the grid sets the thresholds of a width, and the position of
a slice is the middle of its bin. For rule ``prefix`` only:

    grid         position of label q
    uniform      q
    companded    labels about the middle lie 3/4 apart, those in the outer half 5/4: with x = 2 q - 255,
                 floor(128 + sign(x) (3 |x| + 2 max(0, |x| - 128)) / 8), an integer 0..255
    float        floating point with two exponent bits, 16 codes to the unit: ``_distances``

Weights have tails. On a uniform grid an int2 threshold is at half the range: either the grid covers the tails and most
weights share two of the four bins, or int8 loses its outliers. The companded grid puts the threshold at 3/8 for every
width, where the error of int2, int3 and int4 is smallest for groups of 64 real weights (SmolLM2-135M, slopes 1 to 2.6
tried: docs/concepts.md). Its 8-bit positions are still integers 0..255, so the stored tensor is ordinary int8; at 2 to
6 bits the positions are 0..11, 27, 59, 123 and 251 in quarters of the distance of two codes (``integer_positions``),
with steps of 3, 4 across the bend, and 5.

The float grid is for exports to MXFP4. From label 16 on, magnitude label m = q - 128 (127 - q below the middle) is the
floating-point number E2M5 with the bits m - 8, in the bias-1 encoding of OCP Microscaling formats; the 16 labels before
it fill the rest of the range down to 0. The 8 makes truncation to the top bits round E2M5 to the nearest E2M1, half up,
instead of towards 0: int4 has exactly the values of MXFP4, 0 1/2 1 3/2 2 3 4 6 and their negatives, with two zeros.
(Without it, cut E2M5 bits are E2M3 and E2M1 bits, but each slice is up to a whole step too small: int4 then has 12 %
more squared error per channel, int2 65 %; docs/concepts.md.) The zero-point of int4 is mid-range (``slice_affine``), so
that its values are symmetric.

Every one-half in this arithmetic is a named function here and occurs nowhere else (tests/test_architecture.py checks
that): ``middle`` of the codes of a width, ``bin_centre`` of the codes that share a slice, ``centred_codes`` and
``centred_zero`` for codes stored at the centre of their bin, ``round_half_up``.

The same code runs on numpy arrays and on torch tensors. Tests compare everything else in the project (training, files,
kernels, exporters) with this file on all 256 codes.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from matquant.system.arguments import check_types
from matquant.system.errors import InputError, InputTypeError

RULES = ("prefix", "round", "extra")
UNIFORM, COMPANDED, FLOAT = "uniform", "companded", "float"
KERNEL_GRIDS = (UNIFORM, COMPANDED)  # those that kernels read
GRIDS = (*KERNEL_GRIDS, FLOAT)
MASTER_BITS = 8
RESIDENT_BITS = (2, 3, 4, 6, 8)  # bits of a code in its first one, two, ... bit planes
RESOLUTION = 8  # thresholds between neighbouring positions of a grid are multiples of 1/8 of an 8-bit code
FLOAT_REACH = 112  # end of the float grid, 7 units, in 8-bit codes from its middle; int4 rounds 5 to 7 to 6
# Distances of positions from the middle on the float grid, in 8-bit codes. int4: E2M1. int2 and int3: in proportion to
# the mean weights of their bins, in few small integers; the per-width scale does the rest. Other widths: a line through
# BENDS at the middle of the bin.
FLOAT_DISTANCES = {1: (32,), 2: (16, 56), 3: (8, 24, 48, 88), 4: (0, 8, 16, 24, 32, 48, 64, 96)}
FLOAT_UNITS = {1: 32, 2: 8, 3: 8, 4: 8}  # of which these are multiples
BENDS = ((0, 16, 72, 104, 128), (0, 4, 32, 64, FLOAT_REACH))  # magnitude labels, and E2M5 of 8 labels less
OWN, CENTRE = "own", "centre"
ZEROS = (OWN, CENTRE)  # zero-points of slices with a per-width scale: stored, or mid-range


def check_bits(bits: int) -> None:
    """Raise ValueError unless ``bits`` is an integer width 1..8."""
    if type(bits) is not int or not 1 <= bits <= MASTER_BITS:
        kind = InputError if type(bits) is int else InputTypeError
        raise kind(f"bits={bits!r} is not a width; use one of 1 to 8")


def check_rule(rule: str) -> None:
    """Raise ValueError unless ``rule`` is one of RULES."""
    if rule not in RULES:
        raise InputError(f"rule={rule!r} is not a slicing rule; use one of {', '.join(RULES)}")


def bits_read(bits: int, *, rule: str) -> int:
    """Return how many bits of the code planes must hold, and a kernel reads, for ``bits`` bits under ``rule``."""
    check_bits(bits)
    check_rule(rule)
    needed = bits if rule == "prefix" or bits == MASTER_BITS else bits + 1
    return next(resident for resident in RESIDENT_BITS if resident >= needed)


def middle(bits: int) -> float:
    """Return the middle of the ``bits``-bit codes, (2^bits - 1) / 2: the mid-range zero-point."""
    return float(2**bits - 1) / 2


def bin_centre(bits: int, *, rule: str = "prefix") -> float:
    """Return the value, in 8-bit codes, that a ``bits``-bit slice adds to the first code of its bin.

    (d - 1) / 2 with d = 2^(8 - bits) under ``prefix``, where a slice stands for the centre of its bin; else 0.
    """
    return middle(MASTER_BITS - bits) if rule == "prefix" else 0.0


def centred_codes(codes: Any, bits: int) -> Any:
    """Return the 8-bit codes, of the same dtype, that stand for ``bits``-bit codes: d*code + floor(d/2).

    That is the upper of the two integers next to the centre of the prefix bin. At 8 bits the codes themselves.
    """
    step = 2 ** (MASTER_BITS - bits)
    return codes * step + step // 2


def centred_zero(zero: Any, bits: int) -> Any:
    """Return the 8-bit zero-point of ``centred_codes`` whose ``bits``-bit zero-point is ``zero``."""
    step = 2 ** (MASTER_BITS - bits)
    return zero * step + step // 2


def sliced_zero(zero: Any, bits: int) -> Any:
    """Return the ``bits``-bit zero-point of an 8-bit one: ``centred_zero`` reversed, exactly."""
    step = 2 ** (MASTER_BITS - bits)
    return (zero - step // 2) / step


def round_half_up(values: Any) -> Any:
    """Return floor(values + 1/2), floats of the same kind and dtype."""
    return array_namespace(values).floor(values + 0.5)


def slice_codes(codes: Any, bits: int, *, rule: str = "prefix") -> Any:
    """Slice 8-bit codes to ``bits`` bits.

    codes: numpy array or torch tensor of any integer dtype and shape, values 0..255.
    Returns r-bit codes of the same kind, dtype and shape: 0..2^r - 1, or 0..2^r under ``extra``. At 8 bits it is
    ``codes`` itself, not a copy.
    Raises ValueError for a width outside 1..8 or an unknown rule, TypeError for a dtype that cannot hold the codes.
    """
    check_bits(bits)
    check_rule(rule)
    check_types(codes=codes)
    xp = array_namespace(codes)
    if not xp.isdtype(codes.dtype, "integral") or xp.iinfo(codes.dtype).max < 2**MASTER_BITS - 1:
        raise TypeError(f"codes of dtype {codes.dtype} cannot be sliced; use uint8 codes 0..255")
    drop = MASTER_BITS - bits
    if drop == 0:
        return codes
    top = codes >> drop
    if rule == "prefix":
        return top
    rounded = top + ((codes >> (drop - 1)) & 1)  # q/d + 1/2 without leaving uint8
    if rule == "extra":
        return rounded
    return rounded - (rounded >> bits)  # the clamp: only 2^r has bit r set


def check_grid(grid: str, *, rule: str = "prefix", symmetric: bool = True) -> None:
    """Raise ValueError unless ``grid`` is one of GRIDS and works with ``rule`` and ``symmetric``."""
    if grid not in GRIDS:
        raise InputError(f"grid={grid!r} is not a grid; use one of {', '.join(GRIDS)}")
    for name, found, wanted in (("rule", rule, "prefix"), ("symmetric", symmetric, True)):
        if grid != UNIFORM and found != wanted:
            raise InputError(f"grid={grid!r} needs {name}={wanted!r}, found {found!r}; use grid {UNIFORM!r}")


def why_no_kernels(grid: str) -> str | None:
    """Return why no kernel multiplies by codes of this grid, as half a sentence; None if some do."""
    return None if grid in KERNEL_GRIDS else f"kernels read the grids {' and '.join(KERNEL_GRIDS)}, found {grid!r}"


def span(bits: int, grid: str) -> float:
    """Return the length of the grid in units of the ``bits``-bit code: codes stand for weights up to half of it."""
    return 2 * FLOAT_REACH / 2 ** (MASTER_BITS - bits) if grid == FLOAT else 2 * middle(bits)


def slice_positions(codes: Any, bits: int, *, rule: str = "prefix", grid: str = UNIFORM) -> Any:
    """Return positions of the ``bits``-bit slice of 8-bit codes, in units of the r-bit code.

    codes: as in ``slice_codes``. Returns float32 of the same kind and shape; the codes themselves on a uniform grid.
    Raises as ``slice_codes`` does, and for unknown grids.
    """
    return positions(slice_codes(codes, bits, rule=rule), bits, grid=grid)


def positions(codes: Any, bits: int, *, grid: str = UNIFORM) -> Any:
    """Return positions of ``bits``-bit codes, float32, in units of the code. Raises ValueError for an unknown grid."""
    check_grid(grid)
    xp = array_namespace(codes)
    if grid == UNIFORM:
        return xp.astype(codes, xp.float32)
    return _placed(position_table, bits, grid, xp, codes.device)[xp.astype(codes, xp.int32)]


def nearest_codes(position: Any, bits: int, *, grid: str = UNIFORM) -> Any:
    """Return the nearest ``bits``-bit codes to positions, uint8; of two equally near the upper one.

    position: floats in units of the code, any shape. Of codes that share a position the lowest.
    """
    check_bits(bits)
    check_grid(grid)
    xp = array_namespace(position)
    if grid == UNIFORM:
        return xp.astype(round_half_up(position).clip(min=0, max=2**bits - 1), xp.uint8)
    cells = RESOLUTION * 2**MASTER_BITS
    cell = xp.floor(xp.astype(position, xp.float32) * (cells // 2**bits)).clip(min=0, max=cells - 1)
    return _placed(_nearest_table, bits, grid, xp, position.device)[xp.astype(cell, xp.int32)]


def _distances(bits: int) -> np.ndarray:
    """Return the distances of positions on the float grid from its middle, float64 [2^(bits - 1)], in 8-bit codes."""
    if bits in FLOAT_DISTANCES:
        return np.array(FLOAT_DISTANCES[bits], dtype=np.float64)
    centres = (np.arange(2 ** (bits - 1)) + 0.5) * 2 ** (MASTER_BITS - bits)
    found: np.ndarray = np.floor(np.interp(centres, *BENDS))
    return found


@functools.cache
def position_table(bits: int, grid: str) -> np.ndarray:
    """Return the position of every ``bits``-bit code, float32 [2^bits], in units of the code; read only."""
    check_bits(bits)
    check_grid(grid)
    codes = np.arange(2**bits, dtype=np.float32)
    if grid == UNIFORM:
        return codes
    if grid == FLOAT:
        distances = _distances(bits) / 2 ** (MASTER_BITS - bits)
        below, above = (127.0, 128.0) if bits == MASTER_BITS else (middle(bits), middle(bits))
        table: np.ndarray = np.concatenate([below - distances[::-1], above + distances]).astype(np.float32)
        return table
    if bits == MASTER_BITS - 1:  # halfway between two stored integers
        pairs = position_table(MASTER_BITS, grid).reshape(-1, 2)
        halves: np.ndarray = (pairs.mean(1) - 0.5) / 2
        return halves.astype(np.float32)
    centre = middle(bits)
    distance = np.abs(2 * codes - 2 * centre)
    eighths = 3 * distance + 2 * np.maximum(0, distance - 2 ** (bits - 1))
    exact = centre + np.sign(codes - centre) * eighths / 8
    found: np.ndarray = round_half_up(exact) if bits == MASTER_BITS else exact
    return found.astype(np.float32)


def integer_positions(bits: int, grid: str) -> tuple[np.ndarray, float, float]:
    """Return positions as the smallest integers: (uint8 [2^bits], unit, offset), position = unit * integer + offset.

    For kernels and other engines' formats. Uniform: the codes, 1.0, 0.0.
    """
    exact = position_table(bits, grid)
    if grid == FLOAT and bits < MASTER_BITS:
        unit, offset = FLOAT_UNITS.get(bits, 1) / 2 ** (MASTER_BITS - bits), float(exact[0])
    else:
        unit = 1.0 if grid == UNIFORM or bits == MASTER_BITS else 0.5 if bits == MASTER_BITS - 1 else 0.25
        offset = 0.0 if grid == UNIFORM or bits >= MASTER_BITS - 1 else 0.125
    return ((exact - offset) / unit).astype(np.uint8), unit, offset


def stored_codes(labels: Any, *, grid: str = UNIFORM) -> Any:
    """Return the ordinary int8 codes, uint8, that a file stores for 8-bit labels: their positions."""
    return labels if grid == UNIFORM else _look_up(position_table(MASTER_BITS, grid).astype(np.uint8), labels)


def labels_of(stored: Any, *, grid: str = UNIFORM) -> Any:
    """Return the labels, uint8, of stored codes: the lowest of those that share a position. A position without a label,
    which no checkpoint of ours holds, gives the next label."""
    return stored if grid == UNIFORM else _look_up(_nearest_table(MASTER_BITS, grid)[::RESOLUTION], stored)


def _look_up(table: np.ndarray, codes: Any) -> Any:
    """Look up uint8 codes in a table of 256 entries, if possible without a larger copy of the codes."""
    if isinstance(codes, np.ndarray):
        return table[codes]
    xp = array_namespace(codes)
    return xp.asarray(table.copy(), device=codes.device)[xp.astype(codes, xp.int32)]


@functools.cache
def _nearest_table(bits: int, grid: str) -> np.ndarray:
    """Return the nearest code of each cell of 1/RESOLUTION of an 8-bit code from 0 on, uint8 [RESOLUTION * 256]."""
    table = position_table(bits, grid)
    distinct, first = np.unique(table, return_index=True)
    thresholds = (distinct[1:] + distinct[:-1]) / 2
    cells = np.arange(RESOLUTION * 2**MASTER_BITS) / (RESOLUTION * 2 ** (MASTER_BITS - bits))
    nearest: np.ndarray = first[np.searchsorted(thresholds, cells, side="right")].astype(np.uint8)
    return nearest


@functools.cache
def _placed(table: Callable[[int, str], np.ndarray], bits: int, grid: str, xp: Any, device: Any) -> Any:
    """Return ``table(bits, grid)`` as an array of ``xp`` on ``device``; copied once, since a copy waits for it."""
    return xp.asarray(table(bits, grid), device=device)


def slice_values(codes: Any, bits: int, *, rule: str = "prefix", grid: str = UNIFORM) -> Any:
    """Return positions on the 8-bit grid of the ``bits``-bit slice of 8-bit codes.

    codes: as in ``slice_codes``. Returns float32 of the same kind and shape. Raises as ``slice_codes`` does.
    """
    check_types(codes=codes)
    step = 2 ** (MASTER_BITS - bits) if type(bits) is int and 1 <= bits <= MASTER_BITS else 1
    position = slice_positions(codes, bits, rule=rule, grid=grid) * step
    return position + bin_centre(bits, rule=rule) if rule == "prefix" else position


def slice_affine(scale: Any, zero: Any, bits: int, *, rule: str = "prefix", grid: str = UNIFORM) -> tuple[Any, Any]:
    """Return the scale and zero-point of the r-bit codes that follow from the 8-bit ``scale`` and ``zero``.

    Returns (scale_r, zero_r), both float, such that scale_r * (code_r - zero_r) = scale * (value_r - zero) for every
    code, but zero_4 is mid-range on the float grid. Any shapes; arrays, tensors or floats.
    """
    check_bits(bits)
    check_rule(rule)
    step = 2 ** (MASTER_BITS - bits)
    if grid == FLOAT and bits == 4:
        return scale * step, zero * 0 + middle(bits)
    return scale * step, (zero - bin_centre(bits, rule=rule)) / step
