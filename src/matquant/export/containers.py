"""Find an integer type of another format that holds a slice exactly, and the integers to store.

A slice is w = scale * (c - zero) with codes c in 0..levels - 1. Other formats store integers u of n bits that stand for

    fixed      w = d * (u - 2^(n-1))
    integer    w = d * (u - o), o an integer 0..2^n - 1 stored per group
    minimum    w = d * u + m, m a float stored per group
    elements   w = d * e, e the number of MXFP4 with the bits u: its sign bit, then its magnitude; d a power of two

Int4 of the float grid has the values of MXFP4, so ``elements`` holds it if its scales are powers of two: in groups of
32 they always are. For the other types, positions that are not evenly spaced are first written as integers
(nest.integer_positions). On the companded grid they are quarters of a code, p for c, scale / 4 for scale and
4 zero - 1/2 for zero: int2 is then 0..11 and needs 4 bits, int3 5, int4 6, int6 8. On the float grid int2 needs 4 bits,
int3 and int4 5.

``minimum`` holds every slice of at most 2^n levels: u = c, d = scale, m = -scale * zero. The others hold a slice if
zero is a multiple of 1/2: with f = 1 or 2 such that f * zero is an integer, u = f * c + shift and d = scale / f. Only d
and m are rounded, once, to the type in which the format stores them. Slices that do not fit are rejected with the
reason.

N out features, K in features, G groups (K / G neighbouring in features of a row share a scale).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from matquant.core.dtypes import FLOATS
from matquant.core.grid import BLOCK, storable_scale
from matquant.core.nest import (
    FLOAT,
    MASTER_BITS,
    UNIFORM,
    integer_positions,
    middle,
    position_table,
    slice_codes,
)
from matquant.core.tensor import Affine, NestedTensor

FIXED, INTEGER, MINIMUM, ELEMENTS = "fixed", "integer", "minimum", "elements"
EXACT, MIDRANGE = "exact", "midrange"
ZERO_POINTS = (EXACT, MIDRANGE)
STEPS = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # relative error of rounding to nearest


@dataclass(frozen=True, kw_only=True)
class Container:
    """An integer type of a format."""

    name: str  # its common name
    bits: int  # n
    zero: str  # FIXED, INTEGER, MINIMUM or ELEMENTS, as above
    block: int = 1  # neighbouring in features that share a scale; a group must be made of whole blocks
    scale: str = "F16"  # dtype in which d and m are stored, as safetensors names it
    rows: int = 1  # the number of out features must be a multiple of this


MXFP4 = Container(name="MXFP4", bits=4, zero=ELEMENTS, block=BLOCK, scale="E8M0")
SIGNED = np.array([15 - code if code < 8 else code - 8 for code in range(16)], dtype=np.uint8)  # its bits, by int4 code


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the codes of a slice become the integers of a container: u = factor * c + shift, w = d * (u - offset)."""

    factor: np.ndarray = field(repr=False)  # uint8 [N, G]
    shift: np.ndarray = field(repr=False)  # uint8 [N, G]
    scale: np.ndarray = field(repr=False)  # d, float32 [N, G]
    offset: np.ndarray = field(repr=False)  # float32 [N, G]; 2^(n-1) everywhere if fixed

    def minimum(self) -> np.ndarray:
        """Return m of w = d * u + m, float32 [N, G]."""
        found: np.ndarray = -self.scale * self.offset
        return found


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A weight as stored in a container."""

    codes: np.ndarray  # the integers u, uint8 [N, K]
    fit: Fit  # their scale and offset

    def reordered(self, rows: np.ndarray | None) -> "Encoded":
        """Return the weight with its rows in the order ``rows``; itself if None."""
        if rows is None:
            return self
        parts = {name: getattr(self.fit, name)[rows] for name in ("factor", "shift", "scale", "offset")}
        return Encoded(codes=self.codes[rows], fit=Fit(**parts))


@dataclass(frozen=True)
class Misfit:
    """Why a container does not hold a slice."""

    reason: str  # in words
    blocked: bool = False  # whether only the weight's size is the reason
    small: bool = False  # whether the container has too few numbers


def largest_block(sizes: Sequence[int], group: int) -> int:
    """Return the first of ``sizes`` (largest first) that divides a group of in features; the last if none does."""
    return next((size for size in sizes if group % size == 0), sizes[-1])


def levels(bits: int, rule: str, grid: str = UNIFORM) -> int:
    """Return how many integers the positions of a slice span.

    2^r, or 2^r + 1 under rule ``extra`` below 8 bits, or more on a grid whose positions are not evenly spaced.
    """
    if grid != UNIFORM:
        return int(integer_positions(bits, grid)[0].max()) + 1
    return int(2**bits) + (rule == "extra" and bits < MASTER_BITS)


def fit(container: Container, tensor: NestedTensor, bits: int, *, zero_point: str = EXACT) -> Fit | Misfit:
    """Fit the ``bits``-bit slice of ``tensor`` to ``container``. Codes are read only if zero-points are moved."""
    return _fit(container, tensor, bits, read_affine(tensor, bits, zero_point=zero_point))


def _fit(container: Container, tensor: NestedTensor, bits: int, affine: Affine) -> Fit | Misfit:
    """Fit with the given scale and zero-point of the slice."""
    rows, columns = tensor.codes.shape
    scale, zero = affine
    _, unit, offset = integer_positions(bits, tensor.grid)
    if container.zero == ELEMENTS:
        found = _fit_elements(tensor, bits, scale, zero)
    else:
        found = _fit_numbers(container, scale * unit, (zero - offset) / unit, levels(bits, tensor.rule, tensor.grid))
    group = columns // scale.shape[1]
    if isinstance(found, Misfit):
        return found
    if columns % container.block:
        return Misfit(f"in_features={columns} is not a multiple of {container.block} ({container.name})", blocked=True)
    if rows % container.rows:
        return Misfit(f"out_features={rows} is not a multiple of {container.rows} ({container.name})", blocked=True)
    if group % container.block:
        return Misfit(f"groups of {group} are not multiples of {container.block}")
    return found


def _fit_numbers(container: Container, scale: np.ndarray, zero: np.ndarray, count: int) -> Fit | Misfit:
    """Fit ``count`` levels of this scale and zero-point to ``container``, whatever the size of the weight."""
    top = 2**container.bits - 1
    if count - 1 > top:
        return Misfit(f"{count} levels do not fit {container.bits} bits", small=True)
    if container.zero == MINIMUM:
        found = Fit(factor=_full(zero, 1), shift=_full(zero, 0), scale=scale, offset=zero)
        return _storable(container, found, found.minimum())
    doubled = 2 * zero
    between = doubled != np.floor(doubled)
    if between.any():
        return Misfit(f"zero-point {float(zero[between][0]):g} is not a multiple of 1/2")
    factor = np.where(zero == np.floor(zero), 1.0, 2.0).astype(np.float32)
    if container.zero == FIXED:
        offset = np.full_like(zero, 2 ** (container.bits - 1))
        shift = offset - factor * zero
    else:
        shift = -np.minimum(factor * zero, 0)  # an offset is not negative: move the codes up
        offset = factor * zero + shift
    last = shift + factor * (count - 1)
    if shift.min() < 0 or last.max() > top or offset.max() > top:
        return Misfit(
            f"zero-point {float(zero.flat[0]):g} needs integers {shift.min():g} to {last.max():g} in {container.name}"
        )
    found = Fit(factor=factor.astype(np.uint8), shift=shift.astype(np.uint8), scale=scale / factor, offset=offset)
    return _storable(container, found, np.zeros(1))


def _fit_elements(tensor: NestedTensor, bits: int, scale: np.ndarray, zero: np.ndarray) -> Fit | Misfit:
    """Fit a slice to MXFP4, whatever the size of the weight."""
    if tensor.grid != FLOAT or bits != MXFP4.bits or (zero != middle(bits)).any():
        return Misfit(f"{MXFP4.name} holds only int4 of the float grid", small=True)
    uneven = np.frexp(scale)[0] != 0.5
    if uneven.any():
        return Misfit(f"scale {float(scale[uneven][0]):g} is not a power of two ({MXFP4.name})")
    return Fit(factor=_full(zero, 1), shift=_full(zero, 0), scale=scale, offset=np.zeros_like(zero))


def exponents(scale: np.ndarray) -> np.ndarray:
    """Return the stored exponents of powers of two, uint8: 127 + log2 (E8M0 of OCP Microscaling formats)."""
    found: np.ndarray = (np.frexp(scale)[1] + 126).astype(np.uint8)
    return found


def encode(tensor: NestedTensor, bits: int, container: Container, zero_point: str = EXACT) -> Encoded:
    """Encode the ``bits``-bit slice as the integers of a container that holds it: u = factor * c + shift."""
    found = fit(container, tensor, bits, zero_point=zero_point)
    assert isinstance(found, Fit)  # it was when the container was chosen
    codes = slice_codes(tensor.codes, bits, rule=tensor.rule)
    if container.zero == ELEMENTS:
        return Encoded(codes=SIGNED[codes], fit=found)
    if tensor.grid != UNIFORM:
        codes = integer_positions(bits, tensor.grid)[0][codes]
    if found.factor.max() > 1 or found.shift.max() > 0:
        rows, columns = codes.shape
        grouped = codes.reshape(rows, found.scale.shape[1], -1)
        codes = (grouped * found.factor[..., None] + found.shift[..., None]).reshape(rows, columns)
    return Encoded(codes=np.ascontiguousarray(codes), fit=found)


def choose(
    containers: Iterable[Container], tensor: NestedTensor, bits: int, *, zero_point: str = EXACT
) -> Container | list[Misfit] | None:
    """Return the first of ``containers`` that holds the slice; None if only the weight's size prevents it; else the
    reasons.

    containers: in order of size, smallest first.
    """
    misfits = []
    affine = read_affine(tensor, bits, zero_point=zero_point)  # once: moving zero-points reads all codes
    for container in containers:
        found = _fit(container, tensor, bits, affine)
        if isinstance(found, Fit):
            return container
        misfits.append(found)
    return None if any(misfit.blocked for misfit in misfits) else misfits


def read_affine(tensor: NestedTensor, bits: int, *, zero_point: str = EXACT) -> tuple[np.ndarray, np.ndarray]:
    """Return (scale, zero) of the slice, float32 [N, G]; with MIDRANGE, the nearest ones with mid-range zero-points.

    Mid-range is (2^r - 1) / 2 under rule ``prefix`` and 2^(r-1) otherwise. Nearest means least squares over the weights
    of the group; the scale keeps 8 significant bits, or stays unchanged where that is nearer.
    """
    scale, zero = (np.asarray(part, dtype=np.float32) for part in tensor.affine(bits))
    centre = middle(bits) if tensor.rule == "prefix" and bits < MASTER_BITS else 2.0 ** (bits - 1)
    moved = zero != centre
    if zero_point == EXACT or not moved.any():
        return scale, zero
    rows, groups = scale.shape
    code = tensor.positions(bits).reshape(rows, groups, -1)
    mean = code.mean(axis=-1, dtype=np.float32)
    square = np.square(code, dtype=np.float32).mean(axis=-1)
    product = square - (zero + centre) * mean + zero * centre
    variance = square - 2 * centre * mean + centre * centre
    fitted = storable_scale(scale * np.maximum(product, 0) / np.where(variance > 0, variance, 1))
    # squared error, up to a constant
    error = [trial * (trial * variance - 2 * scale * product) for trial in (fitted, scale)]
    better = moved & (variance > 0) & (product > 0) & (error[0] < error[1])
    return np.where(better, fitted, scale), np.full_like(zero, centre)


def decode(container: Container, encoded: Encoded) -> np.ndarray:
    """Return the weights that a reader of the format sees, float32 [N, K]: d and m (or d and o) as stored."""
    rows, columns = encoded.codes.shape
    if container.zero == ELEMENTS:
        number = (position_table(4, FLOAT) - middle(4))[np.argsort(SIGNED)][encoded.codes]
        elements: np.ndarray = number * np.repeat(encoded.fit.scale, columns // encoded.fit.scale.shape[1], axis=1)
        return elements
    scale = _rounded(encoded.fit.scale, container.scale)
    grouped = encoded.codes.reshape(rows, scale.shape[1], -1).astype(np.float32)
    if container.zero == MINIMUM:
        weight = scale[..., None] * grouped + _rounded(encoded.fit.minimum(), container.scale)[..., None]
    else:
        weight = scale[..., None] * (grouped - encoded.fit.offset[..., None])
    found: np.ndarray = weight.reshape(rows, columns)
    return found


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(FLOATS[dtype]).astype(np.float32)


def _storable(container: Container, found: Fit, minimum: np.ndarray) -> Fit | Misfit:
    """Return the fit, or a Misfit if its scales or minima cannot be rounded to the container's type."""
    for name, values in (("scale", found.scale), ("minimum", minimum)):
        bad = ~(np.abs(_rounded(values, container.scale) - values) <= STEPS[container.scale] * np.abs(values))
        if bad.any():
            return Misfit(f"{name} {float(values[bad][0]):g} does not fit {container.scale}")
    return found


def _full(like: np.ndarray, value: int) -> np.ndarray:
    return np.full(like.shape, value, dtype=np.uint8)
