"""The tensors that one quantised weight is stored as: their names, dtypes and shapes.

A weight at module path ``p`` with codes [N, K] in groups of K/G is these tensors, the first four of which are stock
compressed-tensors W8A16 (``pack-quantized``) and lie in the model's shards:

    p.weight_packed        int32 [N, words(K)]    the 8-bit codes; viewed as uint8 it IS the code matrix
    p.weight_scale         bf16 or fp32 [N, G]
    p.weight_shape         int64 [2]              N, K
    p.weight_zero_point    int32 [words(N), G]    asymmetric checkpoints only
    p.<bits>.scale         bf16 [N, G]            per-width scale, in matquant_slices.safetensors
    p.<bits>.zero          fp16 [N, G]            per-width zero-point, unless it is mid-range

The writer, the reader's structure check and the size count take names and dtypes from here. docs/format.md specifies
the files byte by byte.
Shapes: N out features, K in features, G groups.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from matquant.core.nest import CENTRE, MASTER_BITS, stored_codes
from matquant.core.packing import pack, words
from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor

SLICES = "matquant_slices.safetensors"
NAMES = {np.float32: "F32", np.float16: "F16", ml_dtypes.bfloat16: "BF16"}  # safetensors' names


def stored_tensors(
    path: str, tensor: NestedTensor, spec: Spec, *, exact: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and arrays of a weight that go into the model's shards. exact: store its scales in float32."""
    yield f"{path}.weight_packed", pack(stored_codes(tensor.codes, grid=tensor.grid), MASTER_BITS).view("<i4")
    yield f"{path}.weight_scale", tensor.scale.astype(np.float32 if exact else scale_dtype(path, spec))
    yield f"{path}.weight_shape", np.array(tensor.codes.shape, dtype=np.int64)
    if not spec.symmetric:
        # Packed along the rows, as in compressed-tensors.
        yield f"{path}.weight_zero_point", pack_zeros(tensor.zero, MASTER_BITS)


def slice_tensors(path: str, bits: int, spec: Spec) -> dict[str, Any]:
    """Return tensor name -> dtype of a per-width scale and, unless it is mid-range, zero-point."""
    names: dict[str, Any] = {f"{path}.{bits}.scale": ml_dtypes.bfloat16}
    return names if spec.zeros == CENTRE else {**names, f"{path}.{bits}.zero": np.float16}


def pack_zeros(zero_NG: np.ndarray, bits: int) -> np.ndarray:
    """Pack integer zero-points [N, G] as compressed-tensors does, along rows: int32 words [ceil(N * bits / 32), G]."""
    return np.ascontiguousarray(pack(zero_NG.T.astype(np.uint8), bits).view("<i4").T)


def is_end(path: str) -> bool:
    """Return whether a path is outside the numbered decoder layers: embedding or head."""
    return not any(part.isdecimal() for part in path.split("."))


def scale_dtype(path: str, spec: Spec) -> Any:
    """Return the dtype in which the 8-bit scales of a weight are stored."""
    # transformers decompresses fused experts and asymmetric weights in the dtype of their scale: float32 is exact.
    exact = spec.scale_dtype == "float32" or ".experts." in path or not spec.symmetric
    return np.float32 if exact else ml_dtypes.bfloat16


def expected_tensors(path: str, rows: int, columns: int, spec: Spec) -> dict[str, tuple[list[int], tuple[str, ...]]]:
    """Return tensor name -> (shape, possible dtypes) of a quantised weight, besides its weight_shape."""
    groups = columns // (spec.group_size or columns)
    scale = NAMES[scale_dtype(path, spec)]
    expected: dict[str, tuple[list[int], tuple[str, ...]]] = {
        f"{path}.weight_packed": ([rows, words(columns, spec.stored(path))], ("I32",)),
        f"{path}.weight_scale": ([rows, groups], (scale,) if spec.head_bits is None else (scale, "F32")),
    }
    if not spec.symmetric:
        expected[f"{path}.weight_zero_point"] = ([words(rows, MASTER_BITS), groups], ("I32",))
    for bits in spec.slices:
        for name, dtype in slice_tensors(path, bits, spec).items():
            expected[name] = ([rows, groups], (NAMES[dtype],))
    return expected
