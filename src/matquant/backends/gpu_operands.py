"""From bytes of planes (gpu_layout.py) to the integers that tensor cores multiply by: functions of gpu_kernels.py.

Bytes are masked where they lie and become signed integers almost without arithmetic: bits 7:6 of w ^ 0x80 are (code -
2) * 64 in int8. Sums of products are shifted down afterwards, once for many weights.

    bits      operand of 32 inputs                                      unit            the integer is the code
    1, 2      a pair of bits of plane 0                                 64, 16, 4, 1    less 2 at the first place
    3, 4      a nibble of planes 0, 1 and 2                             16, or 1        less 8 at the first two places
    5 to 8    a byte of all planes                                      1               less 128

Widths of 1, 3, 5 and 7 bits are codes with an empty last bit. On a companded grid the integers are those of
``nest.integer_positions``: of pairs 7 and 4 times the upper and the lower bit, of nibbles looked up, of bytes computed.

Triton handles bytes one by one where it shifts them, so shifts and look-ups are PTX on four bytes at a time. Its
interpreter has no PTX; there (PACKED false) they are written out. A test evaluates the PTX of the look-ups on all
bytes; that of a shift is one instruction.
"""

import triton
import triton.language as tl

from matquant.core.nest import COMPANDED as BENT
from matquant.core.nest import integer_positions


def look_up(bits: int) -> str:
    """Return PTX that looks up the companded integers of the high ($0) and low ($1) nibbles of $2, 3 or 4 bits each.

    prmt takes four selectors of four bits and picks of eight bytes; a selector from 8 on repeats the sign of its byte,
    which is 0. So the entries from 8 on are looked up with the top bits flipped, and both results add up.
    """
    entries = integer_positions(bits, BENT)[0].repeat(2 ** (4 - bits))
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
def nibbles_of(w0, w1, w2, HALF: tl.constexpr, ODD: tl.constexpr, TIER: tl.constexpr, PACKED: tl.constexpr):
    """Put together the nibbles of two places, ODD in the high one and 2 + ODD in the low one."""
    word = _shifted(w0, 2 * ODD, PACKED) & 0xCC
    word = word | (_shifted(w1, ODD - 2 * HALF, PACKED) & 0x22)
    if TIER > 3:
        word = word | (_shifted(w2, -ODD - 2 * HALF, PACKED) & 0x11)
    return word


@triton.jit
def byte_of(nibbles, w3, w4, PLACE: tl.constexpr, TIER: tl.constexpr, PACKED: tl.constexpr):
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
        high = bent((word >> 4).to(tl.int16) >> (4 - TIER), tl.full((), TIER, tl.int32))
        low = bent((word & 0x0F).to(tl.int16) >> (4 - TIER), tl.full((), TIER, tl.int32))
        return high.to(tl.int8), low.to(tl.int8)


@triton.jit
def bent(code, bits):
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
    return (bent(code, bits) - bent_middle(bits)).to(tl.int8)


@triton.jit
def bent_middle(bits):
    """Return the middle of the companded integers of 5 to 8 bits, int16."""
    return tl.where(bits > 6, tl.where(bits == 8, 128, 127), (2 << bits) - 2).to(tl.int16)


@triton.jit
def operands_of(
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
        even = nibbles_of(w0, w1, w2, HALF, 0, TIER, PACKED)
        odd = nibbles_of(w0, w1, w2, HALF, 1, TIER, PACKED)
        if TIER > 4:
            b0 = byte_of(even, w3, w4, 0, TIER, PACKED) & keep
            b1 = byte_of(odd, w3, w4, 1, TIER, PACKED) & keep
            b2 = byte_of(even, w3, w4, 2, TIER, PACKED) & keep
            b3 = byte_of(odd, w3, w4, 3, TIER, PACKED) & keep
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
def drop(place: int, stop: int, tier: int, companded: bool) -> int:
    """Return by how many bits sums move down after a place: to where the next one ends, or to bit 0 after the last."""
    following: int = _shift(place + 1, tier, companded) if place + 1 < stop else 0
    return int(_shift(place, tier, companded)) - following


@triton.jit
def lowered(total, BY: tl.constexpr):
    """Return total / 2^BY; integers are multiples of it."""
    if BY == 0:
        return total
    elif total.dtype == tl.int32:
        return total >> BY
    else:
        return total * (1.0 / (1 << BY))


@triton.jit
def dot(word, x, total, PACKED: tl.constexpr):
    """Add the product with 32 inputs. int8 is exact in every dtype of x."""
    if PACKED or total.dtype == tl.int32:
        return tl.dot(word.to(x.dtype), x, total, out_dtype=total.dtype)
    else:  # the interpreter multiplies the bits of bfloat16
        return tl.dot(word.to(tl.float32), x.to(tl.float32), total)
