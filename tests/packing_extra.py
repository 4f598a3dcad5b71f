"""The bytes of r-bit codes under rule ``extra``, written and read with numpy as docs/format.md describes them.

matquant only counts these bytes (core/overflow.py). This is what they are counted by: ``pack_extra`` writes them,
``unpack_extra`` reads them back and rejects all that is damaged. oracle_overflow.py writes the same bytes slowly.
Shapes: N out features, K in features.
"""

import numpy as np
from numpy.typing import NDArray

from matquant.core.overflow import (
    PARAMETERS,
    _blocks,
    _dense_bytes,
    _fixed_bytes,
    _gaps,
    _lengths,
    check_codes,
    check_size,
)
from matquant.system.errors import InputError

DAMAGED = "the bytes are damaged: pack the codes again"
Bytes = NDArray[np.uint8]
Gaps = NDArray[np.int64]


def pack_extra(codes_NK: NDArray[np.uint8], bits: int) -> bytes:
    """The stored bytes of r-bit codes of rule ``extra``.

    codes_NK: uint8 [N, K], values 0..2^r, as ``slice_codes(..., rule="extra")`` gives them. bits: 1..7.
    Raises InputError for other widths, dtypes, shapes and values.
    """
    check_codes(codes_NK, bits)
    all_gaps = [_gaps(block, bits) for block in _blocks(codes_NK)]
    lengths = [_lengths(gaps) for gaps in all_gaps]
    parameter = int(sum(lengths, np.zeros((2, PARAMETERS), np.int64)).sum(axis=0).argmin())  # the first of equals
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


def unpack_extra(packed: bytes, bits: int, *, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The r-bit codes inside ``packed``: uint8 [N, K], values 0..2^r; the inverse of ``pack_extra``.

    Raises InputError for widths outside 1..7, impossible shapes, and bytes that are not of that width and shape.
    """
    check_size(shape, bits)
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
