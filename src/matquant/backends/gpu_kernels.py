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
from matquant.core.nest import COMPANDED, UNIFORM, integer_positions

INTERPRETED: bool = triton.knobs.runtime.interpret  # inline assembly has no meaning there
MOST_TOKENS = 256  # above, the weight is made dense once and the library multiplies
PROCESSORS = 132  # of an H100 or H200, where none is asked
SUMS = 8  # rows of sums of a block of 128 inputs (_prepare_kernel)
FINISHED = 256  # rows that a program of _finish_kernel adds


def look_up(bits: int) -> str:
    """Return PTX that looks up the companded integers of high ($0) and low ($1) nibbles, 3 or 4 bits at their top, of $2.

    prmt takes four selectors of four bits and picks of eight bytes; a selector from 8 on repeats the sign of its byte,
    which is 0. So the entries from 8 on are looked up with the top bits flipped, and both results add up.
    """
    entries = integer_positions(bits, COMPANDED)[0].repeat(2 ** (4 - bits))
    first, second, third, fourth = (f"0x{word:08X}" for word in entries.view("<u4"))
    return f"""{{
        .reg .b32 flipped, rest, flipped_rest, a, b, c, d;
        xor.b32 flipped, $2, 0x88888888;
        shr.b32 rest, $2, 16;
        shr.b32 flipped_rest, flipped, 16;
        prmt.b32 a, {first}, {second}, $2;
        prmt.b32 b, {third}, {fourth}, flipped;
        prmt.b32 c, {first}, {second}, rest;
        prmt.b32 d, {third}, {fourth}, flipped_rest;
        or.b32 a, a, b;
        or.b32 c, c, d;
        prmt.b32 $0, a, c, 0x7531;
        prmt.b32 $1, a, c, 0x6420;
    }}"""


LOOK_UP_3, LOOK_UP_4 = tl.constexpr(look_up(3)), tl.constexpr(look_up(4))


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
def _nibbles(w0, w1, w2, HALF: tl.constexpr, ODD: tl.constexpr, TIER: tl.constexpr, PACKED: tl.constexpr):
    """Put together the nibbles of two places, ODD in the high one and 2 + ODD in the low one."""
    word = _shifted(w0, 2 * ODD, PACKED) & 0xCC
    word = word | (_shifted(w1, ODD - 2 * HALF, PACKED) & 0x22)
    if TIER > 3:
        word = word | (_shifted(w2, -ODD - 2 * HALF, PACKED) & 0x11)
    return word


@triton.jit
def _byte(nibbles, w3, w4, PLACE: tl.constexpr, TIER: tl.constexpr, PACKED: tl.constexpr):
    """Put together the bytes of a place; nibbles: those of the place and of one more."""
    word = _shifted(nibbles, 4 * (PLACE // 2), PACKED) & 0xF0
    word = word | (_shifted(w3, 2 * PLACE - 4, PACKED) & 0x0C)
    if TIER > 6:
        word = word | (_shifted(w4, 2 * PLACE - 6, PACKED) & 0x03)
    return word


@triton.jit
def _signed(word):
    """Return bytes less 128: int8."""
    return (word ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def _bent_nibbles(word, TIER: tl.constexpr, PACKED: tl.constexpr):
    """Return the companded integers of high and low nibbles, 0 to 27 or 59: int8."""
    if PACKED:
        return tl.inline_asm_elementwise(
            LOOK_UP_3 if TIER == 3 else LOOK_UP_4,
            "=r,=r,r", [word], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        high = _bent((word >> 4).to(tl.int16) >> (4 - TIER), tl.full((), TIER, tl.int32))
        low = _bent((word & 0x0F).to(tl.int16) >> (4 - TIER), tl.full((), TIER, tl.int32))
        return high.to(tl.int8), low.to(tl.int8)


@triton.jit
def _bent(code, bits):
    """Return the companded integers of codes, int16: slope 3 about the middle and 5 outside, in quarters of a code.

    Those of 7 and 8 bits are rounded to halves and to codes.
    """
    inner = tl.where(bits > 6, tl.where(bits == 8, 129, 64), (1 << (bits - 1)) - 1).to(tl.int16)
    outer = tl.where(bits > 6, tl.where(bits == 8, 254, 127), 1 << bits).to(tl.int16)
    rounded = tl.where(bits > 6, bits - 6, 0).to(tl.int16)
    return tl.maximum(tl.minimum(3 * code + inner, 5 * code + rounded), 5 * code - outer) >> rounded


@triton.jit
def _bent_byte(word, bits):
    """Return the companded integers of codes of 5 to 8 bits at the top of bytes, less their middle: int8."""
    code = word.to(tl.int16) >> (8 - bits).to(tl.int16)
    return (_bent(code, bits) - _bent_middle(bits)).to(tl.int8)


@triton.jit
def _bent_middle(bits):
    """Return the middle of the companded integers of 5 to 8 bits, int16."""
    return tl.where(bits > 6, tl.where(bits == 8, 128, 127), (2 << bits) - 2).to(tl.int16)


@triton.jit
def _operands(
    w0, w1, w2, w3, w4, bits, keep,
    HALF: tl.constexpr, TIER: tl.constexpr, COMPANDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return the integers of four places of 32 inputs, int8 [64, 32] each, where they lie in their bytes.

    keep: the bits of a byte that the width reads. TIER: the bits that are loaded: 2, 3, 4, 6 or 8.
    """
    if TIER == 2:
        w0 = w0 & keep
        if COMPANDED:  # 7 times the upper bit and 4 times the lower one; _products takes them apart
            return w0, _shifted(w0, -1, PACKED), w0, w0
        else:
            return (
                _signed(w0) & -64,
                (w0 & 0x30).to(tl.int8, bitcast=True),
                (w0 & 0x0C).to(tl.int8, bitcast=True),
                (w0 & 0x03).to(tl.int8, bitcast=True),
            )
    else:
        even = _nibbles(w0, w1, w2, HALF, 0, TIER, PACKED)
        odd = _nibbles(w0, w1, w2, HALF, 1, TIER, PACKED)
        if TIER > 4:
            b0 = _byte(even, w3, w4, 0, TIER, PACKED) & keep
            b1 = _byte(odd, w3, w4, 1, TIER, PACKED) & keep
            b2 = _byte(even, w3, w4, 2, TIER, PACKED) & keep
            b3 = _byte(odd, w3, w4, 3, TIER, PACKED) & keep
            if COMPANDED:
                return _bent_byte(b0, bits), _bent_byte(b1, bits), _bent_byte(b2, bits), _bent_byte(b3, bits)
            else:
                return _signed(b0), _signed(b1), _signed(b2), _signed(b3)
        elif COMPANDED:
            n0, n2 = _bent_nibbles(even, TIER, PACKED)
            n1, n3 = _bent_nibbles(odd, TIER, PACKED)
            return n0, n1, n2, n3
        else:
            return (
                _signed(even) & -16,
                _signed(odd) & -16,
                (even & 0x0F).to(tl.int8, bitcast=True),
                (odd & 0x0F).to(tl.int8, bitcast=True),
            )


@triton.constexpr_function
def _shift(place: int, tier: int, companded: bool) -> int:
    """Return the bit of its byte at which the integer of a place ends."""
    if tier == 2:
        return 6 - 2 * place
    return 4 if tier < 6 and place < 2 and not companded else 0


@triton.constexpr_function
def _drop(place: int, stop: int, tier: int, companded: bool) -> int:
    """Return by how many bits sums move down after a place: to where the next one ends, or to bit 0 after the last."""
    return _shift(place, tier, companded) - (_shift(place + 1, tier, companded) if place + 1 < stop else 0)


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
def _dot(word, x, total, PACKED: tl.constexpr):
    """Add the product with 32 inputs. int8 is exact in every dtype of x."""
    if PACKED:
        return tl.dot(word.to(x.dtype), x, total, out_dtype=total.dtype)
    else:  # the interpreter converts integers to bfloat16 wrongly
        return tl.dot(word.to(tl.float32).to(x.dtype), x, total, out_dtype=total.dtype)


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
            total = _lowered(_dot(low, inputs, total, PACKED), _drop(place, STOP, TIER, COMPANDED))
            upper = _lowered(_dot(high, inputs, upper, PACKED), _drop(place, STOP, TIER, COMPANDED))
        return upper.to(tl.float32) * tl.where(bits == 2, 7.0, 3.0) + total.to(tl.float32) * 4.0
    else:
        for place in tl.static_range(FIRST, STOP):
            total = _dot(operands[place], tl.load(x + place * 32), total, PACKED)
            total = _lowered(total, _drop(place, STOP, TIER, COMPANDED))
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

    x: pointers [32, M]; scales, sums: pointers [M]; all to the first input. group_places: places of 32 inputs that share
    a scale. PLACES: those that are added before scales are applied; with CHANNEL scales are applied at the end.
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
            operands = _operands(w0, w1, w2, w3, w4, bits, keep, half, TIER, COMPANDED, PACKED)
            for turn in tl.static_range(0, 4, PLACES):
                found = _products(
                    x + at * 128, operands, nothing, bits, turn, turn + PLACES, TIER, COMPANDED, PACKED
                )
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


@triton.jit
def _linear_kernel(
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


@triton.jit
def _finish_kernel(partial, y, rows, padded_tokens, padded_rows, splits, AT_ONCE: tl.constexpr):
    """Add partial sums, one split after another: programs [tokens, rows / AT_ONCE]."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    total = tl.zeros((AT_ONCE,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * padded_tokens + token) * padded_rows + row, mask=row < rows, other=0.0)
    tl.store(y + token * rows + row, total.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _prepare_kernel(
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
def _dense_kernel(
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
            nibbles = _nibbles(w0, w1, w2, half, place % 2, 4, PACKED)
            code = (_byte(nibbles, w3, w4, place, 8, PACKED) & keep).to(tl.int16)
            if COMPANDED:
                integer = _bent(code >> (8 - width).to(tl.int16), width) - tl.where(width > 4, _bent_middle(width), 0)
            else:
                empty = tl.where(width > 4, 0, tl.where(width > 2, 4, 6)).to(tl.int16)  # bits below a nibble or a pair
                integer = (code >> empty) - (tl.full((), 128, tl.int16) >> empty)
            group = 0 if CHANNEL else tl.minimum((block * 8 + half * 4 + place) // group_places, groups - 1)
            scale, zero = _affine(affine, (table * groups + group) * padded_rows, row, padded_rows, how)
            column = block * 256 + half * 128 + place * 32 + tl.arange(0, 32)
            known = (row[:, None] < rows) & (column[None, :] < columns)
            weight = scale[:, None] * (integer.to(tl.float32) - zero[:, None])
            tl.store(out + row[:, None] * columns + column[None, :], weight.to(out.dtype.element_ty), mask=known)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a product is cut into programs."""

    rows: int  # of a tile: 64, or 128 where that leaves enough programs
    tokens: int  # of a tile: the second size of the tensor core's product
    splits: int  # parts of the inputs, each with a program
    blocks: int  # blocks of 256 inputs of a part
    warps: int
    stages: int  # tiles loaded ahead


def schedule(
    rows: int, columns: int, tokens: int, *, scaled: bool, by_rows: bool, processors: int = PROCESSORS
) -> Schedule:
    """Choose a schedule for a weight [rows, columns], padded, and some tokens on a card of so many processors.

    Without splits a small weight would use a few processors only: with them there are about two programs for each.
    """
    tile = next(size for size in ((16, 32, 64) if scaled else (8, 16, 32, 64)) if size >= min(tokens, 64))
    tall = 2 * ROWS if rows % (2 * ROWS) == 0 and not by_rows and tile < 64 else ROWS
    inputs = columns // INPUTS
    splits = max(1, min(2 * processors // (rows // tall * -(-tokens // tile)), inputs // 2, 16))
    blocks = -(-inputs // splits)
    return Schedule(
        rows=tall, tokens=tile, splits=-(-inputs // blocks), blocks=blocks, warps=4, stages=3 if tile > 16 else 4
    )


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
    plan = schedule(
        all_rows, all_columns, tokens, scaled=scaled, by_rows=bits.numel() > 1, processors=_processors(device)
    )
    tiles = -(-tokens // plan.tokens)
    all_tokens = tiles * plan.tokens
    inputs = torch.empty(all_tokens, all_columns, dtype=torch.int8 if scaled else x_MK.dtype, device=device)
    sums = torch.empty(all_columns // BLOCK, SUMS, all_tokens, dtype=torch.float32, device=device)
    scales = torch.empty(all_columns // BLOCK, all_tokens, dtype=torch.float32, device=device) if scaled else sums
    _prepare_kernel[all_tokens, all_columns // BLOCK](
        x_MK, inputs, scales, sums, tokens, columns, all_tokens, all_columns, SCALED=scaled, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    split = plan.splits > 1
    out = torch.empty(plan.splits, all_tokens, all_rows, dtype=torch.float32, device=device) if split else y
    _linear_kernel[all_rows // plan.rows, plan.splits, tiles](
        inputs, scales, sums, planes, affine, widths, bits, out,
        tokens, rows, all_tokens, all_columns, all_rows, columns // group, group // PLACE_INPUTS, plan.blocks,
        ROWS=plan.rows, TOKENS=plan.tokens, PLACES=_places(group, columns), SCALED=scaled, SPLIT=split,
        num_warps=plan.warps, num_stages=plan.stages, **_options(planes, bits, rows, columns, group=group, grid=grid),
    )  # fmt: skip
    if split:
        _finish_kernel[tokens, -(-rows // FINISHED)](
            out, y, rows, all_tokens, all_rows, plan.splits, AT_ONCE=FINISHED, num_warps=4
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
        "enable_fp_fusion": True,
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
