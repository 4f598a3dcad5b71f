"""The stored form of r-bit codes under rule ``extra``: 2^r + 1 values, every byte of them counted.

An r-bit field holds 2^r values; the one more of MatQuant's Eq. 8 lives beside it. The dense part holds
min(code, 2^r - 1), which is the ``round`` model of Eq. 6; the overflow set says which weights are really 2^r. The
paper's average bits, r + overflow fraction p (2.05 at int2 in Table 7), charge one bit for each overflowing weight and
nothing for saying which ones they are. That takes at least H(p) = -p log2 p - (1-p) log2(1-p) bits per weight if they
lie at random (0.286 at p = 5 %), so no stored int2 model with 5 % overflow is below 2.286 bits.

The bytes: dense rows, each padded to a whole byte; one byte of parameter b; for each block of 64 rows its number of
overflowing weights and of unary bytes; then per block the gaps in a Golomb-Rice code (Golomb 1966, Rice 1979). A gap g
is the number of other weights since the one before in row-major order, or since the start of the block. Its quotient
floor(g / 2^b) is a unary field (zeros, then a one), its remainder b plain bits. Unary fields and remainders are kept
apart, so that numpy decodes without a loop over weights. At b = 0 the unary bits are the plain bitmap. b is the same
for the whole tensor, and the one that makes it shortest. docs/format.md has it byte by byte, with an example.

Bits per weight beside r, table included, overflowing weights drawn at random (tests/test_overflow.py checks them):

    overflow         1.7 %    2.2 %    2.9 %      5 %
    paper's count   0.0170   0.0220   0.0290   0.0500
    entropy H(p)    0.1242   0.1525   0.1894   0.2864
    2048 x 2048     0.1258   0.1537   0.1931   0.2899
    256 x 256       0.1296   0.1578   0.1970   0.2935

Why blocks of 64 rows: a kernel must not decode a whole tensor to reach one row. Two uint32 for each row would cost
64 / K bits per weight, 0.031 at K = 2048 and 0.25 at K = 256, up to most of what the set itself costs; for 64 rows
they cost 0.0005 and 0.004. A block starts at a whole byte and needs nothing from the blocks before it.

Limits: the positions are coded as if independent; where overflow comes in clusters less would do, and above half of
all weights the bitmap's 1 bit is not the least. Cost: on one core the bytes of 10^8 weights are counted in 0.5 s or
less, packed in 3 s and unpacked in 7 s (7 bits).
Shapes: N out features, K in features, B = ceil(N / 64) blocks.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from matquant.core.nest import MASTER_BITS
from matquant.system.errors import InputError

BLOCK_ROWS = 64
PARAMETERS = 32  # b in 0..31: a gap is below 2^31
TABLE_ENTRY = 8  # bytes: overflowing weights and unary bytes of a block, uint32 each
LARGEST_BLOCK = 2**31 - 1  # weights
DAMAGED = "the bytes are damaged: pack the codes again"

Bytes = NDArray[np.uint8]
Gaps = NDArray[np.int64]


def pack_extra(codes_NK: NDArray[np.uint8], bits: int) -> bytes:
    """The stored bytes of r-bit codes of rule ``extra``.

    codes_NK: uint8 [N, K], values 0..2^r, as ``slice_codes(..., rule="extra")`` gives them. bits: 1..7.
    Raises InputError for other widths, dtypes, shapes and values.
    """
    _check_codes(codes_NK, bits)
    all_gaps = [_gaps(block, bits) for block in _blocks(codes_NK)]
    lengths = [_lengths(gaps) for gaps in all_gaps]
    parameter = _shortest(sum(lengths, np.zeros((2, PARAMETERS), np.int64)))
    table = [(gaps.size, length[0, parameter]) for gaps, length in zip(all_gaps, lengths, strict=True)]
    parts = [_pack_bits(np.minimum(block, 2**bits - 1), bits) for block in _blocks(codes_NK)]
    parts += [np.array([parameter], np.uint8), np.array(table, "<u4")]
    for gaps in all_gaps:
        ends = np.cumsum((gaps >> parameter) + 1)
        unary = np.zeros(ends[-1] if ends.size else 0, np.uint8)
        unary[ends - 1] = 1
        remainders = (gaps & (2**parameter - 1)).astype("<u4")
        parts += [np.packbits(unary, bitorder="little"), _pack_bits(remainders[None], parameter)]
    return b"".join(part.tobytes() for part in parts)


def packed_bytes(codes_NK: NDArray[np.uint8], bits: int) -> int:
    """``len(pack_extra(codes_NK, bits))`` without making the bytes. Same arguments, same errors."""
    _check_codes(codes_NK, bits)
    rows, columns = codes_NK.shape
    lengths = np.zeros((2, PARAMETERS), np.int64)
    for block in _blocks(codes_NK):
        lengths += _lengths(_gaps(block, bits))
    return _fixed_bytes(rows, columns, bits) + int(lengths[:, _shortest(lengths)].sum())


def unpack_extra(packed: bytes, bits: int, *, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The r-bit codes inside ``packed``: uint8 [N, K], values 0..2^r; the inverse of ``pack_extra``.

    Raises InputError for widths outside 1..7, impossible shapes, and bytes that are not of that width and shape.
    """
    _check_size(shape, bits)
    rows, columns = shape
    asked = f"codes {rows} x {columns} of {bits} bits asked"
    data = np.frombuffer(packed, np.uint8)
    fixed, dense = _fixed_bytes(rows, columns, bits), _dense_bytes(rows, columns, bits)
    if data.size < fixed:
        raise InputError(f"{asked} of {data.size} bytes, they take at least {fixed}; {DAMAGED}")
    parameter = int(data[dense])
    if parameter >= PARAMETERS:
        raise InputError(f"{asked}, found the parameter {parameter}, above {PARAMETERS - 1}; {DAMAGED}")
    table = data[dense + 1 : fixed].copy().view("<u4").reshape(-1, 2).astype(np.int64)
    total = fixed + sum(int(unary) + -(-int(count) * parameter // 8) for count, unary in table)
    if data.size != total:
        raise InputError(f"{asked} of {data.size} bytes, their table says {total}; {DAMAGED}")
    codes = np.empty(shape, np.uint8)
    stream = data[fixed:]
    for block, dense_block, (count, unary) in zip(
        _blocks(codes), _blocks(data[:dense].reshape(rows, _dense_bytes(1, columns, bits))), table.tolist(), strict=True
    ):
        block[:] = _unpack_bits(dense_block, columns, bits, asked=asked)
        split, end = unary, unary + -(-count * parameter // 8)
        gaps = _read_gaps(stream[:split], stream[split:end], count, parameter, limit=block.size, asked=asked)
        positions = np.cumsum(gaps + 1) - 1
        flat = block.reshape(-1)  # a view: whole rows of a new array
        if count and (positions[-1] >= flat.size or (flat[positions] != 2**bits - 1).any()):
            raise InputError(f"{asked}, found a weight that overflows and is not {2**bits - 1}; {DAMAGED}")
        flat[positions] = 2**bits
        stream = stream[end:]
    return codes


def _read_gaps(unary: Bytes, packed: Bytes, count: int, parameter: int, *, limit: int, asked: str) -> Gaps:
    """int64 [count] gaps of a block of ``limit`` weights; their sum cannot overflow."""
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    bits_used = int(ends[-1]) + 1 if ends.size else 0
    if ends.size != count or count > limit or unary.size != -(-bits_used // 8):
        raise InputError(f"{asked}, found {ends.size} overflowing weights where {count} are announced; {DAMAGED}")
    if (bits_used - count) << parameter > limit:
        raise InputError(f"{asked}, found an overflowing weight beyond its block of {limit}; {DAMAGED}")
    quotients = np.diff(ends, prepend=-1) - 1
    remainders = _unpack_bits(packed[None], count, parameter, asked=asked)[0]
    gaps: Gaps = (quotients << parameter) + remainders
    return gaps


def _gaps(block: NDArray[np.uint8], bits: int) -> Gaps:
    """Weights between one overflowing weight of a block and the next, int64 [number of overflowing weights]."""
    return np.diff(np.flatnonzero(block == 2**bits), prepend=-1) - 1


def _lengths(gaps: Gaps) -> Gaps:
    """Bytes of the unary fields and of the remainders of a block at every parameter, int64 [2, PARAMETERS]."""
    quotients = np.zeros(PARAMETERS, np.int64)  # their sum
    for parameter in range(PARAMETERS):
        quotients[parameter] = gaps.sum()
        if not quotients[parameter]:
            break
        gaps = gaps >> 1
    return -(-np.stack([quotients + gaps.size, np.arange(PARAMETERS) * gaps.size]) // 8)


def _shortest(lengths: Gaps) -> int:
    """The smallest parameter of those with the fewest bytes."""
    return int(lengths.sum(axis=0).argmin())


def _pack_bits(values: NDArray[np.unsignedinteger], width: int) -> Bytes:
    """Unsigned values [rows, n] below 2^width as uint8 [rows, ceil(n width / 8)], the lowest bit first."""
    in_bytes = np.ascontiguousarray(values)[..., None].view(np.uint8)
    fields = np.unpackbits(in_bytes, axis=-1, count=width, bitorder="little")
    return np.packbits(fields.reshape(len(values), values.shape[1] * width), axis=-1, bitorder="little")


def _unpack_bits(data: Bytes, count: int, width: int, *, asked: str) -> NDArray[np.uint32]:
    """uint32 [rows, count] of ``width`` bits each inside uint8 [rows, ceil(count width / 8)]; InputError on padding."""
    fields = np.unpackbits(data, axis=-1, bitorder="little")
    if fields[:, count * width :].any():
        raise InputError(f"{asked}, found padding that is not 0; {DAMAGED}")
    in_bytes = np.zeros((len(data), count, 4), np.uint8)
    used = fields[:, : count * width].reshape(len(data), count, width)
    in_bytes[..., : -(-width // 8)] = np.packbits(used, axis=-1, bitorder="little")
    return in_bytes.view("<u4")[..., 0]


def _blocks(rows: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    return (rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS))


def _dense_bytes(rows: int, columns: int, bits: int) -> int:
    return rows * -(-columns * bits // 8)


def _fixed_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes that do not depend on the codes: dense part, parameter, table."""
    return _dense_bytes(rows, columns, bits) + 1 + TABLE_ENTRY * -(-rows // BLOCK_ROWS)


def _check_size(shape: tuple[int, ...], bits: int) -> None:
    if type(bits) is not int or not 1 <= bits < MASTER_BITS:
        raise InputError(f"bits={bits!r} asked of extra precision; use one of 1, 2, 3, 4, 5, 6, 7")
    if len(shape) != 2 or min(shape) < 0 or BLOCK_ROWS * shape[1] > LARGEST_BLOCK:
        widest = LARGEST_BLOCK // BLOCK_ROWS
        raise InputError(f"extra precision asked of codes of shape {shape}; give [N, K] with K up to {widest}")


def _check_codes(codes_NK: NDArray[np.uint8], bits: int) -> None:
    _check_size(codes_NK.shape, bits)
    if codes_NK.dtype != np.uint8:
        raise InputError(f"extra precision asked of codes of dtype {codes_NK.dtype}; give uint8")
    if codes_NK.size and codes_NK.max() > 2**bits:
        raise InputError(
            f"extra precision of {bits} bits asked of the code {codes_NK.max()}; "
            f'give slice_codes(codes, {bits}, rule="extra"), which are 0..{2**bits}'
        )
