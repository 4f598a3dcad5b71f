"""Bit planes: one copy of the codes in memory, from which the kernels read any width.

The 8-bit codes of a weight are split into planes of 2, 1, 1, 2 and 2 bits, most significant first, each a contiguous
stream in huge pages. A product at r bits reads only the first planes, so int2 moves a quarter of the bytes of int8 and
switching costs nothing:

    width              1, 2    3    4    5, 6    7, 8        (``round`` and ``extra`` read one bit more)
    bits per weight    2       3    4    6       8

Planes hold labels on every grid; kernels look up the position of a label (``nest.integer_positions``).

docs/kernels.md describes the layout. The scale and zero-point of a width are applied after the sum over inputs.
Shapes: N out features, K in features, G groups, T tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from matquant import _native
from matquant.core.nest import (
    GRIDS,
    MASTER_BITS,
    RULES,
    UNIFORM,
    bin_centre,
    bits_read,
    check_bits,
    integer_positions,
    why_no_kernels,
)
from matquant.core.tensor import NestedTensor
from matquant.system.errors import InputError
from matquant.system.threads import check_threads

ACTIVATIONS = ("int8", "float")

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Planes:
    """The top ``resident_bits`` of codes [rows, columns] as planes. ``native`` owns the memory."""

    native: _native.Weight
    rows: int
    columns: int
    resident_bits: int

    @property
    def bytes(self) -> int:
        """Return the bytes of memory, including scales, zero-points and padding."""
        return self.native.bytes


@dataclass(frozen=True)
class Weight:
    """A nested weight ready for products: planes, and the scales and zero-points of the widths up to ``max_bits``."""

    planes: Planes
    rule: str
    max_bits: int
    affines: frozenset[int]  # widths whose scales and zero-points are in memory, some of them perhaps above max_bits
    shared: int | None  # number of the 8-bit grid's, which widths without per-width ones share

    @property
    def pointer(self) -> int:
        """Return the address of the ``matquant::Linear``, valid while this record lives."""
        return self.planes.native.pointer


def pack(codes_NK: Codes, *, max_bits: int = MASTER_BITS) -> Planes:
    """Pack codes into planes, keeping the planes that hold the top ``max_bits`` bits.

    codes_NK: uint8 [N, K]; columns must be contiguous, rows need not be (a view of a file). They are read once.
    Raises InputError for other dtypes, shapes and widths.
    """
    return _pack(codes_NK, bits_read(max_bits, rule="prefix"), rule="prefix", group=None, grid=UNIFORM)


def unpack(planes: Planes, *, bits: int = MASTER_BITS) -> Codes:
    """Return the top ``bits`` bits of the codes, uint8 [N, K]: ``slice_codes(codes, bits, rule="prefix")``.

    Raises InputError for widths that are not resident.
    """
    _check_resident(planes, bits, "prefix")
    return planes.native.codes(bits, RULES.index("prefix"))


def load_weight(tensor: NestedTensor, *, max_bits: int = MASTER_BITS, held_bits: int | None = None) -> Weight:
    """Pack a nested tensor (numpy) with the scales and zero-points of all widths up to ``max_bits``.

    held_bits: pack only the planes that this width needs, as if by ``hold``; None: those of max_bits.
    ``checkpoint.nested(path, mapped=True)`` is packed straight from the memory-mapped file. Scales and zero-points take
    16 bits each where bfloat16 and float16 hold them exactly; widths without per-width ones share the 8-bit grid's.
    Raises InputError as ``pack`` does, and for a grid that kernels do not read.
    """
    check_bits(max_bits)
    obstacle = why_no_kernels(tensor.grid)
    if obstacle is not None:
        raise InputError(f"{obstacle}; use matquant.load(..., kernels='none'), or export --bits 4 to another engine")
    columns, groups = tensor.codes.shape[-1], tensor.scale.shape[-1]
    held = max_bits if held_bits is None else held_bits
    resident = bits_read(held, rule=tensor.rule)
    planes = _pack(tensor.codes, resident, rule=tensor.rule, group=columns // groups, grid=tensor.grid)
    bare = Weight(planes=planes, rule=tensor.rule, max_bits=max_bits, affines=frozenset(), shared=None)
    return replace(_with_affines(bare, tensor), max_bits=held)


def planes_bytes(rows: int, columns: int, *, bits: int) -> int:
    """Return the bytes of the planes that hold the top ``bits`` bits (2, 3, 4, 6 or 8) of codes [rows, columns]."""
    return _native.planes_bytes(rows, columns, bits)


def add_planes(weight: Weight, tensor: NestedTensor, *, max_bits: int) -> Weight:
    """Return the weight with what widths up to ``max_bits`` need besides: planes of the same codes, and scales.

    Products that use ``weight`` may run meanwhile; they see the new planes only after ``hold``.
    """
    planes, resident = weight.planes, bits_read(max_bits, rule=weight.rule)
    if tensor.codes.shape != (planes.rows, planes.columns) or tensor.rule != weight.rule:
        raise InputError(
            f"planes of {tensor.rule} codes {list(tensor.codes.shape)} do not belong to a weight of "
            f"{weight.rule} codes {[planes.rows, planes.columns]}; open the checkpoint again"
        )
    planes.native.add_planes(_contiguous_rows(tensor.codes), resident)
    return _with_affines(replace(weight, planes=replace(planes, resident_bits=resident), max_bits=max_bits), tensor)


def hold(weight: Weight, *, max_bits: int) -> Weight:
    """Make the planes that widths up to ``max_bits`` need available, and give the memory of the others back.

    No product with this weight may run meanwhile (for those of a model: ``native.change_weights``). Scales and
    zero-points stay in memory.
    """
    resident = bits_read(max_bits, rule=weight.rule)
    weight.planes.native.hold(resident)
    return replace(weight, planes=replace(weight.planes, resident_bits=resident), max_bits=max_bits)


def matmul(weight: Weight, x_TK: Floats, *, bits: int, activations: str = "int8", threads: int = 0) -> Floats:
    """Return x_TK @ W.T with the weights read at ``bits`` bits: float32 [T, N].

    x_TK: float32 [T, K]. activations: ``int8`` (dynamic, per token and 128 inputs, or 64 where groups are no larger) or
    ``float``. threads: 0 for OMP_NUM_THREADS or all cores. The result does not depend on threads, on the other tokens
    or on the instruction set.
    Raises InputError for widths that are not resident and for other shapes and dtypes.
    """
    check_bits(bits)
    if bits > weight.max_bits:
        raise InputError(
            f"bits={bits} exceeds max_bits={weight.max_bits} of this weight; load it with a larger max_bits"
        )
    if activations not in ACTIVATIONS:
        raise InputError(f"activations={activations!r} is not known; use one of {', '.join(ACTIVATIONS)}")
    if x_TK.ndim != 2 or x_TK.shape[1] != weight.planes.columns or x_TK.dtype != np.float32:
        raise InputError(f"x_TK must be float32 [T, {weight.planes.columns}], found {x_TK.dtype} {list(x_TK.shape)}")
    if threads != 0:
        check_threads(threads)
    kind = ACTIVATIONS.index(activations)
    return weight.planes.native.matmul(np.ascontiguousarray(x_TK), bits, kind, threads)


def matmul_at(weight: Weight, x: int, y: int, *, tokens: int, bits: int, activations: str, threads: int) -> None:
    """Run ``matmul`` between addresses: x float32 [tokens, K], y float32 [tokens, N], contiguous, in this process.

    For other libraries' tensors; a call costs a fraction of a microsecond. The caller must check everything.
    """
    weight.planes.native.matmul_at(x, y, tokens, bits, ACTIVATIONS.index(activations), threads)


def rows_at(weight: Weight, ids: int, out: int, *, count: int, bits: int) -> None:
    """Write the rows with these ids between addresses: ids int64 [count], out float32 [count, K], contiguous.

    Equal to those of ``NestedTensor.read(bits)`` bit for bit. The caller must check everything.
    """
    weight.planes.native.rows_at(ids, out, count, bits)


def isa() -> str:
    """Return the instruction set in use, the machine's best or $MATQUANT_ISA.

    It is amx, avx512vbmi, avx512, avxvnni, avx2, neon or scalar.

    Raises InputError if MATQUANT_ISA names one that this machine does not have.
    """
    try:
        return _native.isa()
    except ValueError as error:
        raise InputError(str(error)) from None


def _with_affines(weight: Weight, tensor: NestedTensor) -> Weight:
    """Return the weight with the scales and zero-points of all widths up to its ``max_bits``."""
    native, shared, wanted = weight.planes.native, weight.shared, set(range(1, weight.max_bits + 1)) - weight.affines
    for bits in sorted(wanted & set(tensor.slices)):
        _set_affine(native, bits, _add_values(native, *tensor.slices[bits]), 1, 0.0, grid=tensor.grid)
    for bits in sorted(wanted - set(tensor.slices)):
        shared = _add_values(native, tensor.scale, tensor.zero) if shared is None else shared
        step = 2 ** (MASTER_BITS - bits)
        centre = bin_centre(bits, rule=tensor.rule)  # the kernel does what nest.slice_affine would
        _set_affine(native, bits, shared, step, centre, grid=tensor.grid)
    return replace(weight, affines=weight.affines | wanted, shared=shared)


def _contiguous_rows(codes_NK: Codes) -> Codes:
    """Return the codes with contiguous columns."""
    return np.ascontiguousarray(codes_NK) if codes_NK.shape[1] > 1 and codes_NK.strides[1] != 1 else codes_NK


def _pack(codes_NK: Codes, resident_bits: int, *, rule: str, group: int | None, grid: str) -> Planes:
    isa()
    if codes_NK.ndim != 2 or codes_NK.dtype != np.uint8 or 0 in codes_NK.shape:
        raise InputError(f"planes need uint8 codes [N, K], found {codes_NK.dtype} {list(codes_NK.shape)}")
    rows, columns = codes_NK.shape
    native = _native.Weight(
        _contiguous_rows(codes_NK), resident_bits, RULES.index(rule), group or columns, GRIDS.index(grid)
    )
    return Planes(native, rows, columns, resident_bits)


def _check_resident(planes: Planes, bits: int, rule: str) -> None:
    if bits_read(bits, rule=rule) > planes.resident_bits:
        raise InputError(
            f"bits={bits} exceeds the {planes.resident_bits} bits of these planes; pack with a larger max_bits"
        )


def _set_affine(native: _native.Weight, bits: int, values: int, step: int, centre: float, *, grid: str) -> None:
    """Set scales times ``step`` and zero-points minus ``centre``, in units of the kernels' integers."""
    _, unit, offset = integer_positions(bits, grid)
    native.set_affine(bits, values, step * unit, centre + step * offset)


def _add_values(native: _native.Weight, scale_NG: Any, zero_NG: Any) -> int:
    scale = np.ascontiguousarray(scale_NG, np.float32)
    zero = np.ascontiguousarray(zero_NG, np.float32)
    short_scale, short_zero = scale.astype(ml_dtypes.bfloat16), zero.astype(np.float16)
    short = bool((short_scale == scale).all() and (short_zero == zero).all())
    if (zero == zero.flat[0]).all():  # mid-range zero-points
        return native.add_scales(short_scale.view(np.uint16) if short else scale, float(zero.flat[0]))
    if short:
        return native.add_values(short_scale.view(np.uint16), short_zero.view(np.uint16))
    return native.add_values(scale, zero)
