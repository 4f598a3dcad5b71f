"""Triton kernels of ``matquant::linear``: products with planes that read the bytes of one width and no others.

The weight is the first operand of a tensor core's product and x transposed the second, so a few tokens fill the
smallest tile. With int8 activations the sums over a block of 128 inputs are integers below 2^24, exactly those of
core/nest.py; scales are applied to them in float32, in one order. For few tokens the inputs are split between programs,
whose sums are added one after another: no result depends on timing.

A width is a number in the device's memory. A program reads it and runs the loop for the planes it needs, one of five.

Shapes: N out features, K in features, M tokens, G groups; N', K', M' with padding.
"""

import triton
import triton.language as tl

from matquant.backends.gpu_operands import (
    bent,
    bent_middle,
    byte_of,
    dot,
    drop,
    lowered,
    nibbles_of,
    operands_of,
)

INTERPRETED: bool = triton.knobs.runtime.interpret  # PTX has no meaning there


@triton.jit
def _products(
    x, operands, nothing, bits,
    FIRST: tl.constexpr, STOP: tl.constexpr, TIER: tl.constexpr, COMPANDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return the sums of integer * x over the places FIRST to STOP - 1: float32 [rows, M].

    x: pointers [32, M] to the inputs of place 0. nothing: zeros of the dtype in which tensor cores add.
    """
    total = nothing
    if COMPANDED and TIER == 2:
        upper = nothing
        for place in tl.static_range(FIRST, STOP):
            inputs = tl.load(x + place * 32)
            low = (operands[0] & (0x40 >> 2 * place)).to(tl.int8, bitcast=True)
            high = (operands[1] & (0x40 >> 2 * place)).to(tl.int8, bitcast=True)
            total = lowered(dot(low, inputs, total, PACKED), drop(place, STOP, TIER, COMPANDED))
            upper = lowered(dot(high, inputs, upper, PACKED), drop(place, STOP, TIER, COMPANDED))
        return upper.to(tl.float32) * tl.where(bits == 2, 7.0, 3.0) + total.to(tl.float32) * 4.0
    else:
        for place in tl.static_range(FIRST, STOP):
            total = dot(operands[place], tl.load(x + place * 32), total, PACKED)
            total = lowered(total, drop(place, STOP, TIER, COMPANDED))
        return total.to(tl.float32)


@triton.jit
def _input_sums(
    sums, padded_tokens, FIRST: tl.constexpr, STOP: tl.constexpr, TIER: tl.constexpr, COMPANDED: tl.constexpr
):
    """Return the sums [M] of x over the places, and what ``_products`` has too much.

    That comes from integers that are not less their middle, those of later places. sums: pointers [M] to row 0 of SUMS.
    """
    signed: tl.constexpr = 4 if COMPANDED or TIER > 4 else 1 if TIER == 2 else 2
    if FIRST == 0 and STOP == 4:
        total = tl.load(sums + 4 * padded_tokens)
        if signed == 4:
            return total, tl.zeros_like(total)
        else:
            return total, tl.load(sums + (5 if signed == 1 else 6) * padded_tokens)
    else:
        total = tl.load(sums + FIRST * padded_tokens)
        beyond = tl.zeros_like(total)
        for place in tl.static_range(FIRST, STOP):
            at_place = tl.load(sums + place * padded_tokens)
            if place > FIRST:
                total += at_place
            if place >= signed:
                beyond += at_place
        return total, beyond * (2.0 if TIER == 2 else 8.0)


@triton.jit
def _tile(plane, at, WANTED: tl.constexpr):
    """Load a tile of a plane, [rows, 32] bytes, if the width reads it."""
    if WANTED:
        return tl.load(plane + at)
    else:
        return 0


@triton.jit
def _affine(affine, first, row, padded_rows, width):
    """Return scale and zero-point of rows for the integers of ``_operands``. first: offset of the rows' group.

    width: CENTRE, FACTOR, INVERSE and MIDDLE.
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
def _inputs_times_rows(
    x, scales, sums, planes, affine, how, nothing,
    padded_tokens, padded_columns, padded_rows, groups, group_places, first, stop, table, row, bits, keep,
    TIER: tl.constexpr, PLACES: tl.constexpr, SCALED: tl.constexpr, CHANNEL: tl.constexpr, COMPANDED: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Return the products of rows with the blocks first .. stop - 1 of 256 inputs: float32 [rows, M].

    x: pointers [32, M]; scales, sums: pointers [M]; all to the first input. group_places: places of 32 inputs that
    share a scale. PLACES: those that are added before scales are applied; with CHANNEL scales are applied at the end.
    """
    total = nothing.to(tl.float32)
    x_total = tl.zeros_like(tl.load(sums))
    eighth = padded_rows.to(tl.int64) * padded_columns // 8
    inside = (row % 64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    row_tile = (row // 64)[:, None].to(tl.int64) * (padded_columns // 256)
    single = row_tile * 2048 + inside
    pair = row_tile * 4096 + inside
    for block in range(first, stop):
        w1 = _tile(planes + 2 * eighth + block * 2048, single, TIER > 2)
        w2 = _tile(planes + 3 * eighth + block * 2048, single, TIER > 3)
        for half in tl.static_range(2):
            at = 2 * block + half
            w0 = tl.load(planes + at * 2048 + pair)
            w3 = _tile(planes + 4 * eighth + at * 2048, pair, TIER > 4)
            w4 = _tile(planes + 6 * eighth + at * 2048, pair, TIER > 6)
            operands = operands_of(w0, w1, w2, w3, w4, bits, keep, half, TIER, COMPANDED, PACKED)
            for turn in tl.static_range(0, 4, PLACES):
                found = _products(x + at * 128, operands, nothing, bits, turn, turn + PLACES, TIER, COMPANDED, PACKED)
                x_sum, beyond = _input_sums(
                    sums + at * 8 * padded_tokens, padded_tokens, turn, turn + PLACES, TIER, COMPANDED
                )
                if SCALED:
                    found = found * tl.load(scales + at * padded_tokens)[None, :] - beyond[None, :]
                else:
                    found = found - beyond[None, :]
                if CHANNEL:
                    total += found
                    x_total += x_sum
                else:
                    group = tl.minimum((at * 4 + turn) // group_places, groups - 1)
                    scale, zero = _affine(affine, (table * groups + group) * padded_rows, row, padded_rows, how)
                    total += scale[:, None] * (found - zero[:, None] * x_sum[None, :])
    if CHANNEL:
        scale, zero = _affine(affine, table * padded_rows, row, padded_rows, how)
        total = scale[:, None] * (total - zero[:, None] * x_total[None, :])
    return total


@triton.jit
def _how(widths, bits):
    """Return the table of a width, what ``_affine`` needs of it, and the bits of a byte that it reads."""
    at = widths + bits * 6
    cut = tl.where(bits == 1, 0xAA, tl.where(bits == 5, 0xF8, 0xFE)).to(tl.uint8)
    keep = tl.where((bits == 1) | (bits == 5) | (bits == 7), cut, 0xFF).to(tl.uint8)
    return tl.load(at).to(tl.int32), (tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)), keep


@triton.jit(do_not_specialize=["tokens", "groups", "group_places", "blocks"])
def linear_kernel(
    x, scales, sums, planes, affine, widths, bits, y,
    tokens, rows, padded_tokens, padded_columns, padded_rows, groups, group_places, blocks,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, PLACES: tl.constexpr, SCALED: tl.constexpr, CHANNEL: tl.constexpr,
    COMPANDED: tl.constexpr, RESIDENT: tl.constexpr, BY_ROWS: tl.constexpr, SPLIT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows by TOKENS tokens over ``blocks`` blocks of 256 inputs.

    Programs [N' / ROWS, splits, M' / TOKENS]. y: the result [tokens, rows], or with SPLIT partial sums float32 [splits,
    M', N'].
    """
    first = tl.program_id(1) * blocks
    stop = tl.minimum(first + blocks, padded_columns // 256)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width = tl.load(bits + tl.program_id(0) if BY_ROWS else bits)
    table, how, keep = _how(widths, width)
    x_first = x + token[None, :].to(tl.int64) * padded_columns + tl.arange(0, 32)[:, None]
    nothing = tl.zeros((ROWS, TOKENS), tl.int32 if SCALED else tl.float32)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for tier in tl.static_range(2, RESIDENT + 1):
        if tier == 2 or tier == 3 or tier == 4 or tier == 6 or tier == 8:
            if (width <= tier) & (width > (0 if tier == 2 else tier - 1 if tier < 6 else tier - 2)):
                total = _inputs_times_rows(
                    x_first, scales + token, sums + token, planes, affine, how, nothing,
                    padded_tokens, padded_columns, padded_rows, groups, group_places, first, stop, table, row, width,
                    keep, tier, PLACES, SCALED, CHANNEL, COMPANDED, PACKED,
                )  # fmt: skip
    if SPLIT:
        at = (tl.program_id(1) * padded_tokens + token[:, None]).to(tl.int64) * padded_rows + row[None, :]
        tl.store(y + at, tl.trans(total))
    else:
        at = token[:, None].to(tl.int64) * rows + row[None, :]
        inside = (token[:, None] < tokens) & (row[None, :] < rows)
        tl.store(y + at, tl.trans(total).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def finish_kernel(partial, y, rows, padded_tokens, padded_rows, splits, AT_ONCE: tl.constexpr):
    """Add partial sums, one split after another: programs [tokens, rows / AT_ONCE]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    total = tl.zeros((AT_ONCE,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * padded_tokens + token) * padded_rows + row, mask=row < rows, other=0.0)
    tl.store(y + token * rows + row, total.to(y.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["tokens"])
def prepare_kernel(
    x, out, scales, sums, tokens, columns, padded_tokens, padded_columns, SCALED: tl.constexpr
):  # fmt: skip
    """Copy a token's block of 128 inputs, with zeros for padding, and sum it: programs [M', K' / 128].

    SCALED: round it to int8 with one scale first; NaN and infinity reach the scale. sums: [K' / 128, 8, M'] of the four
    places, of all, and twice and 8 times those of the places that two and four bits do not make signed.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    place = tl.arange(0, 4)
    column = block * 128 + place[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = column < tl.where(token < tokens, columns, 0)
    values = tl.load(x + token * columns + column, mask=inside, other=0.0)
    scale = 1.0
    if SCALED:
        values = values.to(tl.float32)
        magnitudes = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # NaN ranks above infinity, and that above numbers
        largest = tl.max(tl.max(magnitudes, 1), 0).to(tl.float32, bitcast=True)
        empty = largest < 1.504632769052528e-36  # 2^-119: the reciprocal would overflow
        inverse = tl.where(empty, 0.0, tl.div_rn(127.0, tl.where(empty, 1.0, largest)))
        values = (values * inverse + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
        values = tl.minimum(tl.maximum(values, -127.0), 127.0)
        scale = tl.where(empty, 0.0, tl.div_rn(largest, 127.0))
        tl.store(scales + block * padded_tokens + token, scale)
    tl.store(out + token * padded_columns + column, values.to(out.dtype.element_ty))
    found = tl.sum(values.to(tl.float32), 1)
    at = sums + block.to(tl.int64) * 8 * padded_tokens + token
    tl.store(at + place * padded_tokens, found * scale)
    tl.store(at + 4 * padded_tokens, tl.sum(found, 0) * scale)
    tl.store(at + 5 * padded_tokens, tl.sum(tl.where(place > 0, found, 0.0), 0) * (2.0 * scale))
    tl.store(at + 6 * padded_tokens, tl.sum(tl.where(place > 1, found, 0.0), 0) * (8.0 * scale))


@triton.jit
def dense_kernel(
    planes, affine, widths, bits, out, rows, columns, padded_columns, padded_rows, groups, group_places,
    CHANNEL: tl.constexpr, COMPANDED: tl.constexpr, RESIDENT: tl.constexpr, BY_ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write 64 rows of 256 inputs of the dense weight [rows, columns]: programs [N' / 64, K' / 256]."""
    row_tile = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = row_tile * 64 + tl.arange(0, 64)
    width = tl.load(bits + row_tile if BY_ROWS else bits)
    table, how, keep = _how(widths, width)
    eighth = padded_rows.to(tl.int64) * padded_columns // 8
    inside = tl.arange(0, 64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    single = (row_tile * (padded_columns // 256) + block) * 2048 + inside
    w1 = tl.load(planes + 2 * eighth + single, mask=inside < tl.where(width > 2, 2048, 0), other=0)
    w2 = tl.load(planes + 3 * eighth + single, mask=inside < tl.where(width > 3, 2048, 0), other=0)
    for half in tl.static_range(2):
        pair = (row_tile * (padded_columns // 128) + 2 * block + half) * 2048 + inside
        w0 = tl.load(planes + pair)
        w3 = tl.load(planes + 4 * eighth + pair, mask=inside < tl.where(width > 4, 2048, 0), other=0)
        w4 = tl.load(planes + 6 * eighth + pair, mask=inside < tl.where(width > 6, 2048, 0), other=0)
        for place in tl.static_range(4):
            nibbles = nibbles_of(w0, w1, w2, half, place % 2, 4, PACKED)
            code = (byte_of(nibbles, w3, w4, place, 8, PACKED) & keep).to(tl.int16)
            if COMPANDED:
                integer = bent(code >> (8 - width).to(tl.int16), width) - tl.where(width > 4, bent_middle(width), 0)
            else:
                empty = tl.where(width > 4, 0, tl.where(width > 2, 4, 6)).to(tl.int16)  # bits below a nibble or a pair
                integer = (code >> empty) - (tl.full((), 128, tl.int16) >> empty)
            group = 0 if CHANNEL else tl.minimum((block * 8 + half * 4 + place) // group_places, groups - 1)
            scale, zero = _affine(affine, (table * groups + group) * padded_rows, row, padded_rows, how)
            column = block * 256 + half * 128 + place * 32 + tl.arange(0, 32)
            known = (row[:, None] < rows) & (column[None, :] < columns)
            weight = scale[:, None] * (integer.to(tl.float32) - zero[:, None])
            tl.store(out + row[:, None] * columns + column[None, :], weight.to(out.dtype.element_ty), mask=known)
