"""Dense bit packing, lowest bit first, as in compressed-tensors, GPTQ, MLX and smaller nested checkpoints.

Code k of a row is the n bits from bit n k of the row on, bit 0 of a byte being the lowest; rows are padded with zero
bits to whole 32-bit words, little endian.
"""

import numpy as np

WORD = 32
BYTE = 8  # bits of an unpacked code
LANES = (8, 16, 32)
CACHED = 2**17  # codes packed at once: with temporaries they fit the second-level cache


def pack(codes_NK: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes [N, K] below 2^bits into uint32 words [N, ceil(K * bits / 32)]."""
    rows, columns = codes_NK.shape
    packed = np.empty((rows, words(columns, bits)), dtype="<u4")
    step = max(1, CACHED // columns)
    for start in range(0, rows, step):
        packed[start : start + step] = _pack(codes_NK[start : start + step], bits)
    return packed


def _pack(codes_NK: np.ndarray, bits: int) -> np.ndarray:
    rows, columns = codes_NK.shape
    padding = -columns % WORD
    padded = np.ascontiguousarray(np.pad(codes_NK, ((0, 0), (0, padding))) if padding else codes_NK)
    if bits == BYTE:
        return padded.view("<u4")[:, : words(columns, bits)]
    x = padded.view("<u8")  # eight codes a number
    for lane in LANES:  # the upper of two lanes moves down to the bits of the lower one
        low, high = _masks(lane, lane * bits // BYTE, upper=lane)
        x = (x & low) | ((x & high) >> np.uint64(lane - lane * bits // BYTE))
    packed = np.ascontiguousarray(x[..., None].view(np.uint8)[..., :bits]).reshape(rows, -1)
    return packed.view("<u4")[:, : words(columns, bits)]


def unpack(words_NW: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Unpack the uint8 codes [N, columns] from uint32 words: the reverse of ``pack``."""
    if bits == BYTE:
        return np.ascontiguousarray(words_NW).view(np.uint8)[:, :columns]
    rows, blocks = len(words_NW), -(-columns // WORD)
    padded = np.zeros((rows, blocks * bits), dtype="<u4")
    padded[:, : words_NW.shape[1]] = words_NW
    eights = np.zeros((rows, blocks * WORD // BYTE, BYTE), dtype=np.uint8)
    eights[..., :bits] = padded.view(np.uint8).reshape(rows, -1, bits)
    x = eights.view("<u8")[..., 0]
    for lane in reversed(LANES):
        low, high = _masks(lane, lane * bits // BYTE, upper=lane * bits // BYTE)
        x = (x & low) | ((x & high) << np.uint64(lane - lane * bits // BYTE))
    return np.ascontiguousarray(x).view(np.uint8)[:, :columns]


def words(columns: int, bits: int) -> int:
    """Return the number of 32-bit words that a row of ``columns`` codes takes."""
    return -(-columns * bits // WORD)


def _masks(lane: int, width: int, *, upper: int) -> tuple[np.uint64, np.uint64]:
    """Return masks of the low ``width`` bits of every other lane, and of as many bits ``upper`` above."""
    low = sum(((1 << width) - 1) << shift for shift in range(0, 64, 2 * lane))
    return np.uint64(low), np.uint64(low << upper)
