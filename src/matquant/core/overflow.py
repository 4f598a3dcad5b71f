"""Count the bytes that r-bit codes of rule ``extra`` take: 2^r + 1 values, including the overflow.

We never store these bytes: a checkpoint holds the 8-bit codes, and this counts a width as it could be stored.
docs/format.md specifies that form byte by byte; tests/packing_extra.py writes and reads it, and checks this count.

An r-bit field holds 2^r values; the additional value of MatQuant's Eq. 8 is stored beside it. The dense part holds
min(code, 2^r - 1), which is the ``round`` model of Eq. 6; the overflow set lists the weights that are really 2^r. The
paper's average bits, r + overflow fraction p (2.05 at int2 in Table 7), count one bit for each overflowing weight and
nothing for its position. Positions take at least H(p) = -p log2 p - (1-p) log2(1-p) bits per weight if they are random
(0.286 at p = 5 %), so no stored int2 model with 5 % overflow is below 2.286 bits.

The bytes: dense rows, each padded to a whole byte; one byte of parameter b; for each block of 64 rows its number of
overflowing weights and of unary bytes; then per block the gaps in a Golomb-Rice code (Golomb 1966, Rice 1979). A gap g
is the number of other weights since the one before in row-major order, or since the start of the block. Its quotient
floor(g / 2^b) is a unary field (zeros, then a one), its remainder b plain bits. Unary fields and remainders are kept
apart, so that numpy decodes without a loop over weights. At b = 0 the unary bits are the plain bitmap. One b, the one
that makes the result shortest, serves the whole tensor.

Bits per weight in addition to r, table included, with random overflowing weights (tests/test_overflow.py checks them):

    overflow         1.7 %    2.2 %    2.9 %      5 %
    paper's count   0.0170   0.0220   0.0290   0.0500
    entropy H(p)    0.1242   0.1525   0.1894   0.2864
    2048 x 2048     0.1258   0.1537   0.1931   0.2899
    256 x 256       0.1296   0.1578   0.1970   0.2935

Why blocks of 64 rows: a kernel must not decode a whole tensor to reach one row. Two uint32 for each row would cost
64 / K bits per weight, 0.031 at K = 2048 and 0.25 at K = 256, up to most of what the set itself costs; for 64 rows
they cost 0.0005 and 0.004. A block starts at a whole byte and needs nothing from the blocks before it.

Limits: positions are coded as if independent. Clustered overflow could be stored in less, and above half of all weights
the bitmap's 1 bit is not the minimum. Cost: one core counts the bytes of 10^8 weights in 0.5 s.
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
Gaps = NDArray[np.int64]


def packed_bytes(codes_NK: NDArray[np.uint8], bits: int) -> int:
    """Return how many bytes r-bit codes of rule ``extra`` take.

    codes_NK: uint8 [N, K], values 0..2^r, as ``slice_codes(..., rule="extra")`` gives them. bits: 1..7.
    Raises InputError for other widths, dtypes, shapes and values.
    """
    check_codes(codes_NK, bits)
    rows, columns = codes_NK.shape
    lengths = np.zeros((2, PARAMETERS), np.int64)
    for block in _blocks(codes_NK):
        lengths += _lengths(_gaps(block, bits))
    return _fixed_bytes(rows, columns, bits) + int(lengths[:, _shortest(lengths)].sum())


def _gaps(block: NDArray[np.uint8], bits: int) -> Gaps:
    """Return the number of weights between neighbouring overflowing weights of a block, int64 [overflowing weights]."""
    return np.diff(np.flatnonzero(block == 2**bits), prepend=-1) - 1


def _lengths(gaps: Gaps) -> Gaps:
    """Return the bytes of a block's unary fields and remainders at every parameter, int64 [2, PARAMETERS]."""
    quotients = np.zeros(PARAMETERS, np.int64)  # their sum
    for parameter in range(PARAMETERS):
        quotients[parameter] = gaps.sum()
        if not quotients[parameter]:
            break
        gaps = gaps >> 1
    return -(-np.stack([quotients + gaps.size, np.arange(PARAMETERS) * gaps.size]) // 8)


def _shortest(lengths: Gaps) -> int:
    """Return the smallest of the parameters with the fewest bytes."""
    return int(lengths.sum(axis=0).argmin())


def _blocks(rows: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    return (rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS))


def _dense_bytes(rows: int, columns: int, bits: int) -> int:
    return rows * -(-columns * bits // 8)


def _fixed_bytes(rows: int, columns: int, bits: int) -> int:
    """Return the bytes that do not depend on the codes: dense part, parameter, table."""
    return _dense_bytes(rows, columns, bits) + 1 + TABLE_ENTRY * -(-rows // BLOCK_ROWS)


def check_size(shape: tuple[int, ...], bits: int) -> None:
    if type(bits) is not int or not 1 <= bits < MASTER_BITS:
        raise InputError(f"bits={bits!r} is not a width of extra precision; use one of 1 to 7")
    if len(shape) != 2 or min(shape) < 0 or BLOCK_ROWS * shape[1] > LARGEST_BLOCK:
        widest = LARGEST_BLOCK // BLOCK_ROWS
        raise InputError(f"extra precision needs codes [N, K] with K up to {widest}, found shape {shape}")


def check_codes(codes_NK: NDArray[np.uint8], bits: int) -> None:
    check_size(codes_NK.shape, bits)
    if codes_NK.dtype != np.uint8:
        raise InputError(f"extra precision needs uint8 codes, found {codes_NK.dtype}")
    if codes_NK.size and codes_NK.max() > 2**bits:
        raise InputError(
            f"extra precision at {bits} bits needs codes 0..{2**bits}, found {codes_NK.max()}; "
            f'use slice_codes(codes, {bits}, rule="extra")'
        )
