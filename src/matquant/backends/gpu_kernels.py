"""Triton kernels that multiply by planes (gpu_layout.py): exactly the bytes of one width are read.

The weight is the first operand of a tensor core's product, x transposed the second, so a few tokens fill the smallest
tile. Bytes of a plane are masked where they lie, in packed registers, and become signed integers without arithmetic:
bits 7:6 of w ^ 0x80 are (code - 2) * 64 in int8. Sums of the places of a byte are weighted by powers of two afterwards.

    width   operand of 32 inputs                           its sum times     less
    1, 2    a pair of bits of plane 0, where it lies       1/64 1/16 1/4 1   2 x (no shift at the first)
    3, 4    a nibble of planes 0, 1 and 2, where it lies   1/16 or 1         8 x (at the lower nibbles)
    5 to 8  the byte of all planes                         1                 none

With int8 activations these sums are integers below 2^24, so everything is exact up to the scales; sums over blocks of
128 inputs are float32, in one order, without fused multiply-add. For few tokens the inputs are split between programs
whose sums are added in a fixed order: no result depends on timing, or on the other tokens.

Shapes: N out features, K in features, M tokens, G groups; N', K', M' with padding.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from matquant.backends.gpu_layout import BLOCK, INPUTS, PLACE_INPUTS, ROWS, padded, round_activations
from matquant.core.nest import UNIFORM

INTERPRETED: bool = triton.knobs.runtime.interpret  # inline assembly has no meaning there
MOST_TOKENS = 256  # above, the weight is made dense once and the library multiplies
PROCESSORS = 132  # of an H100 or H200, where none is asked
FINISHED = 256  # rows that a program of _finish_kernel adds


@triton.jit
def _shifted(word, by: tl.constexpr, PACKED: tl.constexpr):
    """Shift bytes left (right if ``by`` is negative). Bits that cross a byte differ with PACKED; callers mask them."""
    if by == 0:
        return word
    elif PACKED:
        if by > 0:
            return tl.inline_asm_elementwise(
                f"shl.b32 $0, $1, {by};", "=r,r", [word], dtype=tl.uint8, is_pure=True, pack=4
            )
        else:
            return tl.inline_asm_elementwise(
                f"shr.b32 $0, $1, {-by};", "=r,r", [word], dtype=tl.uint8, is_pure=True, pack=4
            )
    elif by > 0:
        return word << by
    else:
        return word >> -by


@triton.jit
def _nibbles(w0, w1, w2, HALF: tl.constexpr, ODD: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """Put together the nibbles of two places, ODD in the high one and 2 + ODD in the low one."""
    word = _shifted(w0, 2 * ODD, PACKED) & 0xCC
    word = word | (_shifted(w1, ODD - 2 * HALF, PACKED) & 0x22)
    if BITS >= 4:
        word = word | (_shifted(w2, -ODD - 2 * HALF, PACKED) & 0x11)
    return word


@triton.jit
def _code(w0, w1, w2, w3, w4, HALF: tl.constexpr, PLACE: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """Return the bits of a code in its container's place: a pair, a nibble, or a byte from its top bit on."""
    if BITS <= 2:
        if BITS == 1:
            word = w0 & (0x80 >> 2 * PLACE)
        else:
            word = w0 & (0xC0 >> 2 * PLACE)
    else:
        word = _nibbles(w0, w1, w2, HALF, PLACE % 2, BITS, PACKED)
        if BITS <= 4:
            word = word & (0xF0 if PLACE < 2 else 0x0F)
        else:
            if PLACE >= 2:
                word = _shifted(word, 4, PACKED)
            word = word & 0xF0
            low: tl.constexpr = 0x08 if BITS == 5 else 0x0C
            word = word | (_shifted(w3, 2 * PLACE - 4, PACKED) & low)
            if BITS >= 7:
                word = word | (_shifted(w4, 2 * PLACE - 6, PACKED) & (0x02 if BITS == 7 else 0x03))
    return word


@triton.jit
def _companded(word, PLACE: tl.constexpr, BITS: tl.constexpr):
    """Return the integers of a companded grid, less their middle, of codes in their container's place: int8.

    Two slopes: 3 about the middle, 5 outside, in quarters of a code up to 6 bits, rounded to halves and codes above.
    """
    drop: tl.constexpr = (8 - BITS) if BITS > 4 else (8 - BITS - 2 * PLACE) if BITS <= 2 else (
        8 - BITS if PLACE < 2 else 4 - BITS
    )
    code = word.to(tl.int16) >> drop
    if BITS <= 6:
        place = tl.minimum(3 * code + ((1 << (BITS - 1)) - 1), 5 * code)
        place = tl.maximum(place, 5 * code - (1 << BITS)) - ((2 << BITS) - 2)
    elif BITS == 7:
        place = (tl.maximum(tl.minimum(3 * code + 64, 5 * code + 1), 5 * code - 127) >> 1) - 127
    else:
        place = (tl.maximum(tl.minimum(3 * code + 129, 5 * code + 2), 5 * code - 254) >> 2) - 128
    return place.to(tl.int8)


@triton.jit
def _operand(
    w0, w1, w2, w3, w4,
    HALF: tl.constexpr, PLACE: tl.constexpr, BITS: tl.constexpr, COMPANDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return what tensor cores multiply by for 32 inputs: int8, in units of ``_unit`` and less ``_middle``."""
    word = _code(w0, w1, w2, w3, w4, HALF, PLACE, BITS, PACKED)
    if COMPANDED:
        return _companded(word, PLACE, BITS)
    elif BITS > 4 or PLACE == 0 or (BITS > 2 and PLACE == 1):
        return (word ^ 0x80).to(tl.int8, bitcast=True)
    else:
        return word.to(tl.int8, bitcast=True)


@triton.jit
def _tile(planes, at, otherwise, WANTED: tl.constexpr):
    """Load a tile of a plane, 64 rows of 32 bytes, if the width reads it."""
    if WANTED:
        return tl.load(planes + at)
    else:
        return otherwise


@triton.jit
def _affine(affine, first, row, padded_rows, width):
    """Return scale and zero-point of rows for the integers of ``_operand``. width: CENTRE, FACTOR, INVERSE and MIDDLE.

    first: offset of the rows' scales.
    """
    centre, factor, inverse, middle = width
    if affine.dtype.element_ty == tl.int32:
        words = tl.load(affine + first + row)
        scale = (words & -65536).to(tl.float32, bitcast=True)
        zero = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scale = tl.load(affine + 2 * first + row)
        zero = tl.load(affine + 2 * first + padded_rows + row)
    return scale * factor, (zero - centre) * inverse - middle


@triton.jit
def _dot(word, x, total):
    """Add the product with 32 inputs. int8 is exact in every dtype of x."""
    return tl.dot(word.to(x.dtype), x, total, out_dtype=total.dtype)


@triton.constexpr_function
def _drop(place: int, stop: int, bits: int, companded: bool) -> int:
    """Return by how many bits sums move down after a place, to where the next one lies, or to bit 0 at the end."""
    if companded or bits > 4:
        return 0
    if bits > 2:
        return 4 if place == 1 or (place == 0 and stop == 1) else 0
    return 6 - 2 * place if place + 1 == stop else 2


@triton.jit
def _lowered(total, BY: tl.constexpr):
    """Return total / 2^BY; integers are multiples of it."""
    if BY == 0:
        return total
    elif total.dtype == tl.int32:
        return total >> BY
    else:
        return total * (1.0 / (1 << BY))


@triton.jit
def _products(
    x, w0, w1, w2, w3, w4, total,
    HALF: tl.constexpr, FIRST: tl.constexpr, STOP: tl.constexpr,
    BITS: tl.constexpr, COMPANDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return the sums of integer * x over the places FIRST to STOP - 1, float32 [64, M]; ``_middle`` is not subtracted.

    x: pointers [32, M] to the inputs of place 0. total: zeros [64, M] of the dtype in which tensor cores add.
    """
    for place in tl.static_range(FIRST, STOP):
        word = _operand(w0, w1, w2, w3, w4, HALF, place, BITS, COMPANDED, PACKED)
        total = _dot(word, tl.load(x + place * 32), total)
        total = _lowered(total, _drop(place, STOP, BITS, COMPANDED))
    return total.to(tl.float32)


@triton.jit
def _input_sums(
    sums, padded_tokens, FIRST: tl.constexpr, STOP: tl.constexpr, BITS: tl.constexpr, COMPANDED: tl.constexpr
):
    """Return the sums [M] of x over the places, and what it contributes where integers were not less their middle.

    sums: pointers [M] to those of place 0.
    """
    total = tl.load(sums + FIRST * padded_tokens)
    signed: tl.constexpr = 4 if COMPANDED or BITS > 4 else 2 if BITS > 2 else 1  # places that are less their middle
    middles = tl.zeros_like(total)
    for place in tl.static_range(FIRST, STOP):
        at_place = tl.load(sums + place * padded_tokens)
        if place > FIRST:
            total += at_place
        if place >= signed:
            middles += at_place * (8 if BITS > 2 else 2)
    return total, middles


@triton.jit
def _inputs_times_rows(
    x, scales, sums, planes, affine, width,
    padded_tokens, padded_columns, eighth, groups, group_places, first, stop, table, row, padded_rows, row_tile, nothing,
    BITS: tl.constexpr, PLACES: tl.constexpr, SCALED: tl.constexpr, CHANNEL: tl.constexpr, COMPANDED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Return the products of 64 rows with the blocks first .. stop - 1 of 256 inputs: float32 [64, M].

    x: pointers [32, M]; scales, sums: pointers [M]; all to the first input. group_places: places of 32 inputs that share
    a scale. PLACES: those that are added before scales are applied; CHANNEL: scales are applied at the end.
    """
    total = nothing.to(tl.float32)
    corrections = tl.zeros_like(tl.load(sums))
    inside = tl.arange(0, 64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    blocks = padded_columns // 256
    for block in range(first, stop):
        single = (row_tile * blocks + block) * 2048 + inside
        w1 = _tile(planes + 2 * eighth, single, single, BITS > 2)
        w2 = _tile(planes + 3 * eighth, single, single, BITS > 3)
        for half in tl.static_range(2):
            at = 2 * block + half
            pair = (row_tile * blocks * 2 + at) * 2048 + inside
            w0 = tl.load(planes + pair)
            w3 = _tile(planes + 4 * eighth, pair, w0, BITS > 4)
            w4 = _tile(planes + 6 * eighth, pair, w0, BITS > 6)
            for turn in tl.static_range(4 // PLACES):
                found = _products(
                    x + at * 128, w0, w1, w2, w3, w4, nothing,
                    half, turn * PLACES, turn * PLACES + PLACES, BITS, COMPANDED, PACKED,
                )  # fmt: skip
                x_sum, middles = _input_sums(
                    sums + at * 4 * padded_tokens, padded_tokens,
                    turn * PLACES, turn * PLACES + PLACES, BITS, COMPANDED,
                )  # fmt: skip
                found -= middles[None, :]
                if SCALED:
                    x_scale = tl.load(scales + at * padded_tokens)
                    found *= x_scale[None, :]
                    x_sum *= x_scale
                if CHANNEL:
                    total += found
                    corrections += x_sum
                else:
                    group = tl.minimum((at * 4 + turn * PLACES) // group_places, groups - 1)
                    scale, zero = _affine(affine, (table * groups + group) * padded_rows, row, padded_rows, width)
                    total += scale[:, None] * (found - zero[:, None] * x_sum[None, :])
    if CHANNEL:
        scale, zero = _affine(affine, table * padded_rows, row, padded_rows, width)
        total = scale[:, None] * (total - zero[:, None] * corrections[None, :])
    return total


@triton.jit
def _row_width(widths, bits):
    """Return the table of a width, and what ``_affine`` needs of it."""
    at = widths + bits * 6
    return tl.load(at).to(tl.int32), (tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5))


@triton.jit
def _linear_kernel(
    x, scales, sums, planes, affine, widths, bits, y,
    tokens, rows, padded_tokens, padded_columns, padded_rows, groups, group_places, blocks,
    TOKENS: tl.constexpr, PLACES: tl.constexpr, SCALED: tl.constexpr, CHANNEL: tl.constexpr,
    COMPANDED: tl.constexpr, RESIDENT: tl.constexpr, BY_ROWS: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Multiply 64 rows by TOKENS tokens over ``blocks`` blocks of 256 inputs: programs [N' / 64, splits, M' / TOKENS].

    y: the result [tokens, rows], or with SPLIT partial sums float32 [splits, M', N'].
    """
    row_tile = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * blocks
    stop = tl.minimum(first + blocks, padded_columns // 256)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    row = row_tile * 64 + tl.arange(0, 64)
    width = tl.load(bits + row_tile if BY_ROWS else bits)
    table, how = _row_width(widths, width)
    x_first = x + token[None, :].to(tl.int64) * padded_columns + tl.arange(0, 32)[:, None]
    nothing = tl.zeros((64, TOKENS), tl.int32 if SCALED else tl.float32)
    total = tl.zeros((64, TOKENS), tl.float32)
    for served in tl.static_range(1, RESIDENT + 1):
        if width == served:
            total = _inputs_times_rows(
                x_first, scales + token, sums + token, planes, affine, how,
                padded_tokens, padded_columns, padded_rows.to(tl.int64) * padded_columns // 8, groups, group_places,
                first, stop, table, row, padded_rows, row_tile, nothing,
                served, PLACES, SCALED, CHANNEL, COMPANDED, PACKED,
            )  # fmt: skip
    if SPLIT:
        at = (tl.program_id(1) * padded_tokens + token[:, None]).to(tl.int64) * padded_rows + row[None, :]
        tl.store(y + at, tl.trans(total))
    else:
        at = token[:, None].to(tl.int64) * rows + row[None, :]
        inside = (token[:, None] < tokens) & (row[None, :] < rows)
        tl.store(y + at, tl.trans(total).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _finish_kernel(partial, y, rows, padded_tokens, padded_rows, splits, ROWS_AT_ONCE: tl.constexpr):
    """Add partial sums, one split after another: programs [tokens, rows / ROWS_AT_ONCE]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    total = tl.zeros((ROWS_AT_ONCE,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * padded_tokens + token) * padded_rows + row, mask=row < rows, other=0.0)
    tl.store(y + token * rows + row, total.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _prepare_kernel(
    x, out, scales, sums, tokens, columns, padded_tokens, padded_columns, SCALED: tl.constexpr
):  # fmt: skip
    """Copy a token's block of 128 inputs, with zeros for padding, and sum its places: programs [M', K' / 128].

    SCALED: round it to int8 with one scale first; NaN and infinity reach the scale.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    place = tl.arange(0, 4)
    column = block * 128 + place[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = column < tl.where(token < tokens, columns, 0)
    values = tl.load(x + token * columns + column, mask=inside, other=0.0)
    if SCALED:
        values = values.to(tl.float32)
        magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN ranks above infinity, and that above numbers
        largest = tl.max(tl.max(magnitudes, 1), 0).to(tl.float32, bitcast=True)
        empty = largest < 1.504632769052528e-36  # 2^-119: the reciprocal would overflow
        inverse = tl.where(empty, 0.0, tl.div_rn(127.0, tl.where(empty, 1.0, largest)))
        values = (values * inverse + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
        values = tl.minimum(tl.maximum(values, -127.0), 127.0)
        tl.store(scales + block * padded_tokens + token, tl.where(empty, 0.0, tl.div_rn(largest, 127.0)))
    tl.store(out + token * padded_columns + column, values.to(out.dtype.element_ty))
    at = sums + (block * 4 + place).to(tl.int64) * padded_tokens + token
    tl.store(at, tl.sum(values.to(tl.float32), 1))


@triton.jit
def _dense_kernel(
    planes, affine, widths, bits, out,
    rows, columns, padded_columns, padded_rows, groups, group_places,
    CHANNEL: tl.constexpr, COMPANDED: tl.constexpr, RESIDENT: tl.constexpr, BY_ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write 64 rows of 256 inputs of the dense weight [rows, columns]: programs [N' / 64, K' / 256]."""
    row_tile = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = row_tile * 64 + tl.arange(0, 64)
    width = tl.load(bits + row_tile if BY_ROWS else bits)
    table, how = _row_width(widths, width)
    eighth = padded_rows.to(tl.int64) * padded_columns // 8
    inside = tl.arange(0, 64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    single = (row_tile * (padded_columns // 256) + block) * 2048 + inside
    for served in tl.static_range(1, RESIDENT + 1):
        if width == served:
            w1 = _tile(planes + 2 * eighth, single, single, served > 2)
            w2 = _tile(planes + 3 * eighth, single, single, served > 3)
            for half in tl.static_range(2):
                pair = (row_tile * (padded_columns // 128) + 2 * block + half) * 2048 + inside
                w0 = tl.load(planes + pair)
                w3 = _tile(planes + 4 * eighth, pair, w0, served > 4)
                w4 = _tile(planes + 6 * eighth, pair, w0, served > 6)
                for place in tl.static_range(4):
                    word = _operand(w0, w1, w2, w3, w4, half, place, served, COMPANDED, PACKED)
                    integer = _integer(word, place, served, COMPANDED)
                    group = 0 if CHANNEL else tl.minimum((block * 8 + half * 4 + place) // group_places, groups - 1)
                    scale, zero = _affine(affine, (table * groups + group) * padded_rows, row, padded_rows, how)
                    column = block * 256 + half * 128 + place * 32 + tl.arange(0, 32)
                    at = row[:, None] * columns + column[None, :]
                    known = (row[:, None] < rows) & (column[None, :] < columns)
                    tl.store(out + at, (scale[:, None] * (integer - zero[:, None])).to(out.dtype.element_ty), mask=known)


@triton.jit
def _integer(word, PLACE: tl.constexpr, BITS: tl.constexpr, COMPANDED: tl.constexpr):
    """Return the integers that an operand stands for, float32."""
    integer = word.to(tl.float32)
    if COMPANDED or BITS > 4:
        return integer
    elif BITS > 2:
        return integer * 0.0625 if PLACE < 2 else integer - 8.0
    else:
        return integer * (1.0 / (1 << (6 - 2 * PLACE))) - (0.0 if PLACE == 0 else 2.0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a product is cut into programs."""

    tokens: int  # of a tile: the second size of the tensor core's product
    splits: int  # parts of the inputs, each with a program
    blocks: int  # blocks of 256 inputs of a part
    warps: int
    stages: int  # tiles loaded ahead


def schedule(rows: int, columns: int, tokens: int, *, processors: int) -> Schedule:
    """Choose a schedule for a weight [rows, columns], padded, and some tokens on a card of so many processors.

    Without splits a small weight would use a few processors only: with them there are about two programs for each.
    """
    tile = next(size for size in (8, 16, 32, 64) if size >= min(tokens, 64))
    programs = rows // ROWS * -(-tokens // tile)
    inputs = columns // INPUTS
    splits = max(1, min(2 * processors // programs, inputs // 2, 16))
    blocks = -(-inputs // splits)
    return Schedule(tokens=tile, splits=-(-inputs // blocks), blocks=blocks, warps=4, stages=3 if tile > 16 else 4)


def linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    affine: torch.Tensor,
    widths: torch.Tensor,
    bits: torch.Tensor,
    rows: int,
    group: int,
    grid: str,
    activations: str,
) -> torch.Tensor:
    """Run ``matquant::linear`` (gpu.py) with the kernels."""
    columns = x.shape[-1]
    x_MK = x.reshape(-1, columns).contiguous()
    tokens = len(x_MK)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if tokens > MOST_TOKENS:
        weight = dense(planes, affine, widths, bits, rows, columns, group, grid, x.dtype)
        torch.mm(_rounded(x_MK) if activations == "int8" else x_MK, weight.T, out=y)
    elif tokens:
        _multiply(x_MK, planes, affine, widths, bits, y, group=group, grid=grid, scaled=activations == "int8")
    return y.view(*x.shape[:-1], rows)


def dense(
    planes: torch.Tensor,
    affine: torch.Tensor,
    widths: torch.Tensor,
    bits: torch.Tensor,
    rows: int,
    columns: int,
    group: int,
    grid: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weight [N, K] at the width ``bits``, reading the planes of that width."""
    out = torch.empty(rows, columns, dtype=dtype, device=planes.device)
    all_rows, all_columns = padded(rows, columns)
    options = _options(planes, bits, rows, columns, group=group, grid=grid)
    _dense_kernel[all_rows // ROWS, all_columns // INPUTS](
        planes, affine, widths, bits, out,
        rows, columns, all_columns, all_rows, columns // group, group // PLACE_INPUTS, **options,
    )  # fmt: skip
    return out


def _multiply(
    x_MK: torch.Tensor,
    planes: torch.Tensor,
    affine: torch.Tensor,
    widths: torch.Tensor,
    bits: torch.Tensor,
    y: torch.Tensor,
    *,
    group: int,
    grid: str,
    scaled: bool,
) -> None:
    """Write the product into y [M, N]."""
    (tokens, columns), rows, device = x_MK.shape, y.shape[1], x_MK.device
    all_rows, all_columns = padded(rows, columns)
    plan = schedule(all_rows, all_columns, tokens, processors=_processors(device))
    tiles = -(-tokens // plan.tokens)
    all_tokens = tiles * plan.tokens
    inputs = torch.empty(all_tokens, all_columns, dtype=torch.int8 if scaled else x_MK.dtype, device=device)
    sums = torch.empty(all_columns // PLACE_INPUTS, all_tokens, dtype=torch.float32, device=device)
    scales = torch.empty(all_columns // BLOCK, all_tokens, dtype=torch.float32, device=device) if scaled else sums
    _prepare_kernel[all_tokens, all_columns // BLOCK](
        x_MK, inputs, scales, sums, tokens, columns, all_tokens, all_columns, SCALED=scaled, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    split = plan.splits > 1
    out = torch.empty(plan.splits, all_tokens, all_rows, dtype=torch.float32, device=device) if split else y
    _linear_kernel[all_rows // ROWS, plan.splits, tiles](
        inputs, scales, sums, planes, affine, widths, bits, out,
        tokens, rows, all_tokens, all_columns, all_rows, columns // group, group // PLACE_INPUTS, plan.blocks,
        TOKENS=plan.tokens, PLACES=_places(group, columns), SCALED=scaled, SPLIT=split,
        num_warps=plan.warps, num_stages=plan.stages, **_options(planes, bits, rows, columns, group=group, grid=grid),
    )  # fmt: skip
    if split:
        _finish_kernel[tokens, -(-rows // FINISHED)](
            out, y, rows, all_tokens, all_rows, plan.splits, ROWS_AT_ONCE=FINISHED, num_warps=4
        )


def _options(
    planes: torch.Tensor, bits: torch.Tensor, rows: int, columns: int, *, group: int, grid: str
) -> dict[str, Any]:
    """Return what kernels are compiled for, of a weight."""
    all_rows, all_columns = padded(rows, columns)
    return {
        "CHANNEL": group == columns,
        "COMPANDED": grid != UNIFORM,
        "RESIDENT": planes.numel() * 8 // (all_rows * all_columns),
        "BY_ROWS": bits.numel() > 1,
        "PACKED": not INTERPRETED,
        "enable_fp_fusion": False,
    }


def _places(group: int, columns: int) -> int:
    """Return how many places of 32 inputs are added before a scale is applied: 4, 2 or 1."""
    return 4 if group == columns else next(places for places in (4, 2, 1) if group % (places * PLACE_INPUTS) == 0)


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def _rounded(x_MK: torch.Tensor) -> torch.Tensor:
    """Return x as int8 activations give it, in its dtype."""
    codes, scale = round_activations(x_MK)
    return (codes.unflatten(1, (-1, BLOCK)) * scale[..., None]).flatten(1)[:, : x_MK.shape[1]].to(x_MK.dtype)
