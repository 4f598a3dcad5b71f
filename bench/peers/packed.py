"""Weights out of a checkpoint in the GPTQ layout, which GPTQModel and AutoRound both write.

A linear [N, K] is four tensors: qweight int32 [K * bits / 32, N] and qzeros int32 [G, N * bits / 32] hold codes one
after the other from the lowest bit up, scales fp16 [G, N], and, from GPTQModel, g_idx int32 [K] with each column's
group.

    weight[n, k] = scale[g, n] * (code[k, n] - zero[g, n])
    g = g_idx[k] or k // group_size,  zero = qzeros + zero_offset

zero_offset is 1 in the layout's first version and 0 in its second (gptq_v2), the one for asymmetric codes: in the
first a zero of 0 is stored as -1 and borrows from its neighbour. A weight that the tool left in floating
point counts as it lies in the file. Imported by the workers beside it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

PARTS = {"qweight": "codes", "scales": "scales", "qzeros": "zeros", "g_idx": "g_idx", "weight": "float"}


def read_packed(
    folder: Path, paths: list[str], *, bits: int, zero_offset: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """{path: float32 weight [N, K]} and the stored bytes by part, from all safetensors files under ``folder``."""
    tensors: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    weights, stored = {}, dict.fromkeys(PARTS.values(), 0)
    for path in paths:
        mine = {name: tensors[f"{path}.{name}"] for name in PARTS if f"{path}.{name}" in tensors}
        for name, tensor in mine.items():
            stored[PARTS[name]] += tensor.numel() * tensor.element_size()
        weights[path] = mine["weight"].float().numpy() if "weight" in mine else _dequantise(mine, bits, zero_offset)
    return weights, stored


def _dequantise(parts: dict[str, Any], bits: int, zero_offset: int) -> np.ndarray:
    code_KN = _unpack(parts["qweight"].numpy().T, bits).T
    scale_GN = parts["scales"].float().numpy()
    zero_GN = (_unpack(parts["qzeros"].numpy(), bits) + zero_offset) & (2**bits - 1)
    count = code_KN.shape[0]
    group_K = parts["g_idx"].numpy() if "g_idx" in parts else np.arange(count) // -(-count // len(scale_GN))
    weight_KN = scale_GN[group_K] * (code_KN - zero_GN[group_K]).astype(np.float32)
    return np.ascontiguousarray(weight_KN.T)


def _unpack(words_RW: np.ndarray, bits: int) -> np.ndarray:
    """Codes [R, W * 32 / bits] of rows of int32 words, lowest bits first; a code may lie across two words."""
    octets = np.ascontiguousarray(words_RW).astype("<i4").view(np.uint8)
    flags = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words_RW), -1, bits)
    codes: np.ndarray = (flags << np.arange(bits)).sum(axis=2, dtype=np.int32)
    return codes
