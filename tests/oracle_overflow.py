"""The packed codes of extra precision, from docs/format.md, with strings of bits and loops over weights. Slow."""


def field(value: int, width: int) -> str:
    """``width`` bits, the lowest first."""
    return "".join(str(value >> place & 1) for place in range(width))


def whole_bytes(bits: str) -> bytes:
    """Eight bits to a byte, the first is the lowest; missing ones are 0."""
    return bytes(
        sum(1 << place for place, bit in enumerate(bits[start : start + 8]) if bit == "1")
        for start in range(0, len(bits), 8)
    )


def pack(rows: list[list[int]], bits: int, *, parameter: int | None = None) -> bytes:
    """The bytes of r-bit codes 0..2^r; with the shortest parameter unless one is given."""
    if parameter is None:
        return min((pack(rows, bits, parameter=each) for each in range(32)), key=len)  # the first of equals
    dense = b"".join(whole_bytes("".join(field(min(code, 2**bits - 1), bits) for code in row)) for row in rows)
    table, blocks = b"", b""
    for start in range(0, len(rows), 64):
        unary, remainders, gap, count = "", "", 0, 0
        for code in (code for row in rows[start : start + 64] for code in row):
            if code < 2**bits:
                gap += 1
                continue
            unary += "0" * (gap >> parameter) + "1"
            remainders += field(gap % 2**parameter, parameter)
            gap, count = 0, count + 1
        table += count.to_bytes(4, "little") + len(whole_bytes(unary)).to_bytes(4, "little")
        blocks += whole_bytes(unary) + whole_bytes(remainders)
    return dense + bytes([parameter]) + table + blocks
