"""Slow, obvious definitions of slicing, the 8-bit grid, the least-squares refit and the int8 packing.

Written from the Matryoshka Quantization paper (arXiv 2502.06786 v3; equation numbers below are its own), one element
or one group at a time, in exact rational arithmetic wherever the definition is exact. Nothing here imports the package
under test, and nothing here is fast: an answer of this file is right because it can be read next to the formula.

N out features, K in features, G groups of K // G neighbouring in features. A *code* is the stored integer 0..255, its
*slice* is the code at r bits, and a *position* is where a slice stands on the 8-bit grid (a multiple of 1/2).
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

RULES = ("prefix", "round", "extra")
HALF = Fraction(1, 2)
MASTER_BITS = 8  # c of Eq. 6
# A scale is an integer of at most 8 significant bits (bf16) times a power of two not below fp16's smallest step.
SCALE_BITS = 8
SMALLEST_SCALE = Fraction(1, 2**24)  # fp16's smallest subnormal
LARGEST_SCALE = Fraction(65280)  # 0xFF00, the largest 8-bit mantissa below fp16's 65504


def round_half_up(value: Fraction) -> int:
    """Nearest integer, halves upwards: the "bit after the last one kept" of appendix A decides."""
    return math.floor(value + HALF)


# Slicing: Eq. 6, Eq. 8, and the prefix rule ---------------------------------------------------------------------------


@functools.cache
def slice_code(code: int, bits: int, rule: str) -> int:
    """The `bits`-wide slice of one 8-bit code."""
    coarse = Fraction(code, 2 ** (MASTER_BITS - bits))
    if rule == "prefix":
        return int(f"{code:08b}"[:bits], 2)  # the leading bits as written on paper
    if rule == "round":
        return min(max(round_half_up(coarse), 0), (1 << bits) - 1)  # Eq. 6 before "* 2^(c-r)"
    if rule == "extra":
        return round_half_up(coarse)  # Eq. 8: Eq. 6 without the clamp
    raise AssertionError(f"rule={rule!r} is unknown to the oracle")


@functools.cache
def slice_value(code: int, bits: int, rule: str) -> Fraction:
    """Position on the 8-bit grid of the slice of one code; prefix stands at the mean of the codes that share it."""
    if rule == "prefix":
        sharing = [other for other in range(256) if slice_code(other, bits, rule) == slice_code(code, bits, rule)]
        return Fraction(sum(sharing), len(sharing))
    return Fraction(slice_code(code, bits, rule) * 2 ** (MASTER_BITS - bits))


def slice_affine(scale: Fraction, zero: Fraction, bits: int, rule: str) -> tuple[Fraction, Fraction]:
    """The scale and zero that read an r-bit slice directly, solved from two positions that are one slice apart."""
    step = 2 ** (MASTER_BITS - bits)
    lower, upper = (scale * (slice_value(code, bits, rule) - zero) for code in (0, step))
    slope = upper - lower  # slices of codes 0 and step are 0 and 1 under every rule
    return slope, -lower / slope


def slice_code_table(bits: int, rule: str) -> list[int]:
    """Slices of all 256 codes."""
    return [slice_code(code, bits, rule) for code in range(256)]


def slice_value_table(bits: int, rule: str) -> list[float]:
    """Positions of all 256 codes; multiples of 1/2, so exact as floats."""
    return [float(slice_value(code, bits, rule)) for code in range(256)]


# Storable scales ------------------------------------------------------------------------------------------------------


def storable_step(value: Fraction) -> Fraction:
    """Distance between neighbouring storable scales around `value`: 8 significant bits, never finer than 2^-24."""
    exponent = 0
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while value < Fraction(2) ** exponent:
        exponent -= 1
    return max(Fraction(2) ** (exponent - SCALE_BITS + 1), SMALLEST_SCALE)


def round_scale_up(value: Fraction) -> Fraction:
    """Smallest storable scale not below `value`."""
    if value <= SMALLEST_SCALE:
        return SMALLEST_SCALE
    step = storable_step(value)
    return min(math.ceil(value / step) * step, LARGEST_SCALE)


def is_storable(value: Fraction) -> bool:
    """Whether bf16 and fp16 both hold `value` exactly and it is a legal scale."""
    inside = SMALLEST_SCALE <= value <= LARGEST_SCALE
    return inside and (value / storable_step(value)).denominator == 1


# The grid: Eq. 1 and Eq. 3 --------------------------------------------------------------------------------------------


def group_columns(in_features: int, groups: int) -> list[slice]:
    """Columns of each group of a row."""
    assert in_features % groups == 0, f"{groups} groups do not divide {in_features} columns"
    size = in_features // groups
    return [slice(start, start + size) for start in range(0, in_features, size)]


def fit_group(
    weights: Sequence[Fraction],
    *,
    bits: int,
    symmetric: bool,
    gamma: Fraction,
    beta: Fraction,
    integer_zero: bool,
    storable: bool,
) -> tuple[Fraction, Fraction]:
    """Exact (scale, zero) of one group.

    integer_zero=False is Eq. 1 (gamma = beta = 1) and Eq. 3 as printed. Otherwise the range is widened to hold 0, so
    that an integer zero exists, and the scale is rounded up to a storable one before the zero is taken with it.
    """
    top_code = 2**bits - 1
    high, low = gamma * max(weights), beta * min(weights)
    if not integer_zero:
        assert not symmetric, "Eq. 1 and Eq. 3 are asymmetric"
        scale = (high - low) / top_code
        if scale == 0:
            scale = abs(high) / top_code or SMALLEST_SCALE
        return scale, -low / scale
    if symmetric:
        scale = 2 * max(abs(high), abs(low)) / top_code
    else:
        high, low = max(high, Fraction(0)), min(low, Fraction(0))
        scale = (high - low) / top_code
    if scale == 0:
        scale = SMALLEST_SCALE
    if storable:
        scale = round_scale_up(scale)
    if symmetric:
        return scale, Fraction(2 ** (bits - 1))
    return scale, Fraction(min(max(round_half_up(-low / scale), 0), top_code))


def fit_grid(
    weight_NK: NDArray[np.floating],
    *,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    gamma: float | NDArray[np.floating] = 1.0,
    beta: float | NDArray[np.floating] = 1.0,
    integer_zero: bool = True,
    storable: bool = True,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(scale_NG, zero_NG), each the float64 nearest to the exact value."""
    rows, columns = weight_NK.shape
    groups = 1 if group_size is None else columns // group_size
    gamma_NG, beta_NG = (np.broadcast_to(np.asarray(clip), (rows, groups)) for clip in (gamma, beta))
    scale_NG, zero_NG = np.zeros((rows, groups)), np.zeros((rows, groups))
    for row in range(rows):
        for group, span in enumerate(group_columns(columns, groups)):
            scale, zero = fit_group(
                [Fraction(float(weight)) for weight in weight_NK[row, span]],
                bits=bits,
                symmetric=symmetric,
                gamma=Fraction(float(gamma_NG[row, group])),
                beta=Fraction(float(beta_NG[row, group])),
                integer_zero=integer_zero,
                storable=storable,
            )
            scale_NG[row, group], zero_NG[row, group] = float(scale), float(zero)
    return scale_NG, zero_NG


def grid_positions(
    weight_NK: NDArray[np.floating], scale_NG: NDArray[np.floating], zero_NG: NDArray[np.floating]
) -> list[list[Fraction]]:
    """Exact w/alpha + z of Eq. 1 before rounding and clamping, as rows."""
    rows, columns = weight_NK.shape
    positions: list[list[Fraction]] = []
    for row in range(rows):
        line: list[Fraction] = []
        for group, span in enumerate(group_columns(columns, scale_NG.shape[1])):
            scale, zero = Fraction(float(scale_NG[row, group])), Fraction(float(zero_NG[row, group]))
            line += [Fraction(float(weight)) / scale + zero for weight in weight_NK[row, span]]
        positions.append(line)
    return positions


def encode(
    weight_NK: NDArray[np.floating], scale_NG: NDArray[np.floating], zero_NG: NDArray[np.floating], *, bits: int = 8
) -> NDArray[np.uint8]:
    """Codes of Eq. 1: round half up, then clamp."""
    positions = grid_positions(weight_NK, scale_NG, zero_NG)
    codes = [[min(max(round_half_up(position), 0), 2**bits - 1) for position in line] for line in positions]
    return np.array(codes, dtype=np.uint8)


def nearest_tie(
    weight_NK: NDArray[np.floating], scale_NG: NDArray[np.floating], zero_NG: NDArray[np.floating], *, bits: int = 8
) -> float:
    """Smallest distance, in codes, of any weight from a border between two codes that it does not lie on.

    A float32 encoder may not be held to the exact code of a weight that is within its rounding error of a border.
    Exactly on a border it may: an integer and a half is a float32, so the quotient and the sums come out exact.
    """
    first, last = HALF, 2**bits - 1 - HALF
    distances: list[Fraction] = []
    for line in grid_positions(weight_NK, scale_NG, zero_NG):
        for position in line:
            border = min(max(round_half_up(position - HALF) + HALF, first), last)
            if position != border:
                distances.append(abs(position - border))
    return float(min(distances))


def decode(
    positions_NK: NDArray[np.number], scale_NG: NDArray[np.floating], zero_NG: NDArray[np.floating]
) -> NDArray[np.float64]:
    """scale * (position - zero), group by group."""
    rows, columns = positions_NK.shape
    weight_NK = np.zeros((rows, columns))
    for row in range(rows):
        for group, span in enumerate(group_columns(columns, scale_NG.shape[1])):
            for column in range(span.start, span.stop):
                scale, zero = float(scale_NG[row, group]), float(zero_NG[row, group])
                weight_NK[row, column] = scale * (float(positions_NK[row, column]) - zero)
    return weight_NK


# The refit and the packing --------------------------------------------------------------------------------------------


def fit_slice(
    weight_NK: NDArray[np.floating],
    codes_NK: NDArray[np.integer],
    bits: int,
    *,
    rule: str,
    scale_NG: NDArray[np.floating],
    zero_NG: NDArray[np.floating],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least-squares (scale_r_NG, zero_r_NG) of w ~ scale_r * (slice - zero_r), from numpy's own solver.

    Where the slices of a group are all equal, or the best slope is not positive, the slope stays the grid's own and
    only the offset is fitted, so that the mean of the group is kept.
    """
    scale_r_NG, zero_r_NG = np.zeros(scale_NG.shape), np.zeros(scale_NG.shape)
    for row in range(weight_NK.shape[0]):
        for group, span in enumerate(group_columns(weight_NK.shape[1], scale_NG.shape[1])):
            weights = weight_NK[row, span].astype(np.float64)
            slices = np.array([slice_code(int(code), bits, rule) for code in codes_NK[row, span]], dtype=np.float64)
            design = np.stack([slices - slices.mean(), np.ones_like(slices)], axis=1)  # centred: well conditioned
            slope, mean = np.linalg.lstsq(design, weights, rcond=None)[0]
            if len(set(slices)) == 1 or slope <= 0:
                grid = Fraction(float(scale_NG[row, group])), Fraction(float(zero_NG[row, group]))
                slope, mean = float(slice_affine(*grid, bits, rule)[0]), weights.mean()
            scale_r_NG[row, group], zero_r_NG[row, group] = slope, slices.mean() - mean / slope
    return scale_r_NG, zero_r_NG


def pack_int32(codes_NK: NDArray[np.integer]) -> NDArray[np.int32]:
    """compressed-tensors `pack-quantized` words of an 8-bit weight: int32 [N, ceil(K / 4)].

    The format holds signed integers code - 128, moves them back to unsigned by + 128, fills the row to a multiple of
    four with unsigned 0, and puts the first in-feature into the lowest byte of its int32.
    """
    words: list[list[int]] = []
    for row in codes_NK.tolist():
        signed = [code - 128 for code in row]
        unsigned = [value + 128 for value in signed]
        unsigned += [0] * (-len(unsigned) % 4)
        fours = [bytes(unsigned[start : start + 4]) for start in range(0, len(unsigned), 4)]
        words.append([int.from_bytes(four, "little", signed=True) for four in fours])
    return np.array(words, dtype=np.int32).reshape(len(words), -1)


# The companded grid ---------------------------------------------------------------------------------------------------

INNER, OUTER, BEND = Fraction(3, 4), Fraction(5, 4), 64  # slopes in int8 steps a label; labels of each sign before it


def companded_edge(label: Fraction) -> Fraction:
    """Where label `label` (0..256, edges between labels are whole) lies on the int8 grid, 0 in its middle."""
    distance = abs(label - 128)
    reached = INNER * min(distance, Fraction(BEND)) + OUTER * max(distance - BEND, Fraction(0))
    return reached if label >= 128 else -reached


@functools.cache
def companded_int8(label: int) -> int:
    """The ordinary int8 code 0..255 of a label: the one whose unit interval holds the middle of the label's."""
    return 128 + math.floor(companded_edge(label + HALF))


@functools.cache
def companded_position(code: int, bits: int) -> Fraction:
    """Position of an r-bit code in units of the code: the grid in the middle of its labels, at 7 and 8 bits on int8."""
    step = 2 ** (MASTER_BITS - bits)
    labels = range(code * step, (code + 1) * step)
    if bits >= 7:
        on_int8 = Fraction(sum(companded_int8(label) for label in labels), step)
    else:
        on_int8 = companded_edge((labels[0] + labels[-1] + 1) * HALF) + 128 - HALF
    return (on_int8 - Fraction(step - 1, 2)) / step


def companded_nearest(position: Fraction, bits: int) -> int:
    """The r-bit code nearest to a position."""
    return nearest_code(position, [companded_position(code, bits) for code in range(2**bits)])


def nearest_code(position: Fraction, places: Sequence[Fraction]) -> int:
    """Index of the nearest place: of two equally near the upper place, of equal places the lowest index."""
    nearest = min(abs(place - position) for place in places)
    best = max(place for place in places if abs(place - position) == nearest)
    return places.index(best)


# The float grid: OCP Microscaling formats v1.0, elements with two exponent bits ---------------------------------------

SIXTEENTHS = 16  # int8 steps in the unit of these numbers
CHOSEN = {1: [32], 2: [16, 56], 3: [8, 24, 48, 88]}  # distances, int8 steps


def ocp_float(code: int, mantissa_bits: int) -> Fraction:
    """The magnitude of an E2Mx element without its sign bit: 2 exponent bits of bias 1, then the mantissa."""
    exponent, mantissa = code >> mantissa_bits, Fraction(code % 2**mantissa_bits, 2**mantissa_bits)
    assert 0 <= exponent <= 3
    return mantissa if exponent == 0 else 2 ** (exponent - 1) * (1 + mantissa)


def float_edge(magnitude: int) -> Fraction:
    """Where magnitude label 0..128 begins, in int8 steps: E2M5 of 8 labels less, and a line from 0 to label 16."""
    return Fraction(magnitude, 4) if magnitude < 16 else SIXTEENTHS * ocp_float(magnitude - 8, 5)


def float_distance(magnitude: int, bits: int) -> Fraction:
    """Distance of an r-bit magnitude from the middle, in int8 steps."""
    if bits in CHOSEN:
        return Fraction(CHOSEN[bits][magnitude])
    if bits == 4:
        return SIXTEENTHS * ocp_float(magnitude, 1)
    step = 2 ** (MASTER_BITS - bits)
    if step == 1:
        return Fraction(math.floor((float_edge(magnitude) + float_edge(magnitude + 1)) / 2))
    return Fraction(math.floor(float_edge(magnitude * step + step // 2)))


@functools.cache
def float_position(code: int, bits: int) -> Fraction:
    """Position of an r-bit code in units of the code: about mid-range, at 8 bits -1 - d below the zero-point 128."""
    half = 2 ** (bits - 1)
    distance = float_distance(code - half if code >= half else half - 1 - code, bits)
    if bits == MASTER_BITS:
        return 128 + distance if code >= half else 127 - distance
    middle = Fraction(2**bits - 1, 2)
    away = distance / 2 ** (MASTER_BITS - bits)
    return middle + away if code >= half else middle - away
