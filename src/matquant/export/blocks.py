"""GGUF's block types: integers and their scale, as llama.cpp stores them.

Source: ggml-common.h and ggml-quants.c of llama.cpp. A block is 32 or 256 neighbouring in features of a row, and a
group is made of whole blocks. K types split their 256 features into sub-blocks with small integer scales; we set them
all to one, because our scale is the same in the whole block. In ggml's terms w = d * (u - 2^(n-1)), or w = d * u + m,
which K types store as w = d * u - dmin. MXFP4 stores the exponent of d and floating-point numbers instead of integers;
ggml doubles the numbers and halves d.

u: the integers 0..2^n - 1 of a container (containers.py), uint8. B blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from matquant.export.containers import ELEMENTS, FIXED, MINIMUM, MXFP4, Container, Encoded, exponents

CHUNK = 2**19  # codes packed at once: they and their blocks fit the cache
HALF = "<f2"
SMALL, LARGE = 32, 256
NEGATIVE = "dmin"
ONES = 0x11  # a sub-scale of 1 in both nibbles

LAYOUTS: dict[str, np.dtype[Any]] = {
    "Q2_K": np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", HALF), (NEGATIVE, HALF)]),
    "Q3_K": np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", HALF)]),
    "MXFP4": np.dtype([("e", "u1"), ("qs", "u1", 16)]),
    "Q4_0": np.dtype([("d", HALF), ("qs", "u1", 16)]),
    "Q4_K": np.dtype([("d", HALF), (NEGATIVE, HALF), ("scales", "u1", 12), ("qs", "u1", 128)]),
    "Q4_1": np.dtype([("d", HALF), ("m", HALF), ("qs", "u1", 16)]),
    "Q5_0": np.dtype([("d", HALF), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q5_K": np.dtype([("d", HALF), (NEGATIVE, HALF), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]),
    "Q5_1": np.dtype([("d", HALF), ("m", HALF), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q6_K": np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "u1", 16), ("d", HALF)]),
    "Q8_0": np.dtype([("d", HALF), ("qs", "u1", 32)]),
}  # smallest bits per weight first; of two equal types the one with the fixed zero-point


def _container(name: str) -> Container:
    if name == MXFP4.name:
        return MXFP4
    fields = LAYOUTS[name].names or ()
    minimum = NEGATIVE in fields or "m" in fields
    return Container(
        name=name, bits=int(name[1]), zero=MINIMUM if minimum else FIXED, block=LARGE if name.endswith("K") else SMALL
    )


CONTAINERS = tuple(_container(name) for name in LAYOUTS)


def row_bytes(container: Container, columns: int) -> int:
    """Return the bytes of a row of ``columns`` integers."""
    return columns // container.block * LAYOUTS[container.name].itemsize


def pack_blocks(container: Container, encoded: Encoded) -> np.ndarray:
    """Pack a weight [N, K] into blocks as llama.cpp stores them, uint8 [N, ``row_bytes``]."""
    rows, columns = encoded.codes.shape
    layout, per_row = LAYOUTS[container.name], columns // container.block
    blocks = np.empty((rows, per_row), dtype=layout)
    repeats = per_row // encoded.fit.scale.shape[1]
    minimum = encoded.fit.minimum() if container.zero == MINIMUM else None
    floats = {"d": encoded.fit.scale, "m": minimum, NEGATIVE: None if minimum is None else -minimum}
    step = max(1, CHUNK // columns)
    if container.zero == ELEMENTS:
        blocks["e"] = np.repeat(exponents(encoded.fit.scale), repeats, axis=1)
    for name in layout.names or ():
        if name in floats:
            blocks[name] = np.repeat(np.asarray(floats[name]).astype(HALF), repeats, axis=1)
    for start in range(0, rows, step):
        codes = encoded.codes[start : start + step].reshape(-1, container.block)
        for name, values in PACKERS[container.name](codes).items():
            blocks[start : start + step][name] = values.reshape(-1, per_row, layout[name].itemsize)
    return blocks.view(np.uint8).reshape(rows, -1)


def _together(codes: np.ndarray, shifts: Sequence[int]) -> np.ndarray:
    """Combine the second last axis of ``codes`` into one byte: entry i is shifted left by shifts[i] bits."""
    found = codes[..., 0, :].copy()
    for index, shift in enumerate(shifts[1:], start=1):
        found |= codes[..., index, :] << np.uint8(shift)
    return found


def _nibbles(codes: np.ndarray, width: int) -> np.ndarray:
    """Pack two neighbouring runs of ``width`` codes below 16 into one run of bytes."""
    return _together(codes.reshape(len(codes), -1, 2, width), (0, 4)).reshape(len(codes), -1)


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Pack four runs of 32 codes below 4 into one run of bytes."""
    return _together(codes.reshape(len(codes), -1, 4, 32), (0, 2, 4, 6)).reshape(len(codes), -1)


def _single(codes: np.ndarray) -> np.ndarray:
    """Pack eight runs of 32 codes below 2 into one run of bytes."""
    return _together(codes.reshape(len(codes), 8, 32), range(8))


def _low(codes: np.ndarray, bits: int) -> np.ndarray:
    low: np.ndarray = codes & np.uint8(2**bits - 1)
    return low


def _high(codes: np.ndarray, bits: int) -> np.ndarray:
    high: np.ndarray = codes >> np.uint8(bits)
    return high


def _constant(codes: np.ndarray, values: Sequence[int]) -> np.ndarray:
    return np.broadcast_to(np.array(values, dtype=np.uint8), (len(codes), len(values)))


def _five(codes: np.ndarray) -> dict[str, np.ndarray]:
    return {"qs": _nibbles(_low(codes, 4), 16), "qh": np.packbits(_high(codes, 4), axis=-1, bitorder="little")}


def _q2_k(codes: np.ndarray) -> dict[str, np.ndarray]:
    return {"qs": _pairs(codes), "scales": _constant(codes, [ONES] * 16)}


def _q3_k(codes: np.ndarray) -> dict[str, np.ndarray]:
    # sub-scales are stored plus 32: the lower four bits of 33 in 8 bytes, the upper two in 4
    return {
        "qs": _pairs(_low(codes, 2)),
        "hmask": _single(_high(codes, 2)),
        "scales": _constant(codes, [ONES] * 8 + [0b10101010] * 4),
    }


def _k_scales(codes: np.ndarray) -> np.ndarray:
    # four sub-scales of 6 bits, four minima of 6 bits, then the lower nibbles of the other four scales and minima
    return _constant(codes, [1] * 8 + [ONES] * 4)


def _q4_k(codes: np.ndarray) -> dict[str, np.ndarray]:
    return {"qs": _nibbles(codes, 32), "scales": _k_scales(codes)}


def _q5_k(codes: np.ndarray) -> dict[str, np.ndarray]:
    return {"qs": _nibbles(_low(codes, 4), 32), "qh": _single(_high(codes, 4)), "scales": _k_scales(codes)}


def _q6_k(codes: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "ql": _nibbles(_low(codes, 4), 64),
        "qh": _pairs(_high(codes, 4)),
        "scales": _constant(codes, [1] * 16),
    }


PACKERS: dict[str, Callable[[np.ndarray], dict[str, np.ndarray]]] = {
    "MXFP4": lambda codes: {"qs": _nibbles(codes, 16)},
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_0": lambda codes: {"qs": _nibbles(codes, 16)},
    "Q4_K": _q4_k,
    "Q4_1": lambda codes: {"qs": _nibbles(codes, 16)},
    "Q5_0": _five,
    "Q5_K": _q5_k,
    "Q5_1": _five,
    "Q6_K": _q6_k,
    "Q8_0": lambda codes: {"qs": codes ^ np.uint8(0x80)},  # int8: u - 128
}
