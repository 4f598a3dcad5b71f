"""Weights out of a checkpoint in the GPTQ layout, which GPTQModel and AutoRound both write.

A linear [N, K] is four tensors: qweight int32 [K * bits / 32, N] and qzeros int32 [G, N * bits / 32] hold codes one
after the other from the lowest bit up, scales fp16 [G, N], and, from GPTQModel, g_idx int32 [K] with each column's
group.

    weight[n, k] = scale[g, n] * (code[k, n] - zero[g, n])
    g = g_idx[k] or k // group_size,  zero = qzeros + zero_offset

zero_offset is 1 in the layout's first version and 0 in its second (gptq_v2), the one for asymmetric codes: in the
first a zero of 0 is stored as -1 and borrows from its neighbour. A weight that the tool left in floating
point counts as it lies in the file; rows that do not fill a
word are padded. Imported by the workers beside it.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

PARTS = {"qweight": "codes", "scales": "scales", "qzeros": "zeros", "g_idx": "g_idx", "weight": "float"}


def read_packed(
    folder: Path, shapes: dict[str, list[int]], *, bits: int, group_size: int, zero_offset: int = 1
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """{path: float32 weight [N, K]} and the stored bytes by part, from all safetensors files under ``folder``."""
    tensors: dict[str, Any] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    weights, stored = {}, dict.fromkeys(PARTS.values(), 0)
    for path, shape in shapes.items():
        mine = {name: tensors[f"{path}.{name}"] for name in PARTS if f"{path}.{name}" in tensors}
        for name, tensor in mine.items():
            stored[PARTS[name]] += tensor.numel() * tensor.element_size()
        if "weight" in mine:
            weights[path] = mine["weight"].float().numpy()
        else:
            codes = _unpack(mine["qweight"].numpy().T, bits)[:, : shape[1]]
            zeros = _unpack(mine["qzeros"].numpy(), bits)[:, : shape[0]] + zero_offset & 2**bits - 1
            size = group_size if group_size > 0 else shape[1]
            group_K = mine["g_idx"].numpy() if "g_idx" in mine else np.arange(shape[1]) // size
            shifted_NK = (codes - zeros[group_K].T).astype(np.float32)
            weights[path] = np.ascontiguousarray(mine["scales"].float().numpy()[group_K].T * shifted_NK)
    return weights, stored


def _unpack(words_RW: np.ndarray, bits: int) -> np.ndarray:
    """Codes [R, W * 32 / bits] of rows of int32 words, lowest bits first; a code may lie across two words."""
    octets = np.ascontiguousarray(words_RW).astype("<i4").view(np.uint8)
    flags = np.unpackbits(octets, axis=1, bitorder="little")
    whole = flags[:, : flags.shape[1] // bits * bits].reshape(len(flags), -1, bits)
    codes: np.ndarray = (whole << np.arange(bits)).sum(axis=2, dtype=np.int32)
    return codes
