"""Count the bytes that a width or a plan takes, all overhead included.

A weight [N, K] served at r bits takes N*K*r/8 bytes of packed codes, one scale (and zero-point, if stored) per group,
and two int64 for its shape. Bits per weight is 8 times the bytes over the number of quantised weights. Planning,
reports and benchmarks compare methods only by these numbers.
"""

from collections.abc import Mapping

import numpy as np

from matquant.core.nest import MASTER_BITS, slice_codes
from matquant.core.overflow import packed_bytes
from matquant.format.layout import slice_tensors
from matquant.format.read import Checkpoint
from matquant.format.tensor_file import DTYPES


def size_bytes(checkpoint: Checkpoint, path: str, bits: int) -> float:
    """Return the bytes of one weight served at ``bits`` bits: packed codes, scales, stored zero-points and its shape.

    Under rule ``extra`` the bytes of the codes come from core/overflow.py, counted once per width (the paper's count, r
    + overflow fraction bits, leaves out the positions of overflowing weights).
    """
    rows, columns = checkpoint.shapes[path]
    groups = columns // (checkpoint.spec.group_size or columns)
    if bits in checkpoint.spec.slices:
        dtypes = list(slice_tensors(path, bits, checkpoint.spec).values())
    else:
        stored = DTYPES[checkpoint.stored_dtype(f"{path}.weight_scale")]
        dtypes = [stored, *([] if checkpoint.spec.symmetric else [np.uint8])]
    per_group = sum(int(np.dtype(dtype).itemsize) for dtype in dtypes)
    shape_entry = 16
    packed = rows * columns * min(bits, checkpoint.spec.stored(path)) / 8
    if checkpoint.spec.rule == "extra" and bits < MASTER_BITS:
        if (path, bits) not in checkpoint.packed_sizes:
            codes = slice_codes(checkpoint.nested(path).codes, bits, rule="extra")
            checkpoint.packed_sizes[path, bits] = packed_bytes(codes, bits)
        packed = checkpoint.packed_sizes[path, bits]
    return packed + rows * groups * per_group + shape_entry


def plan_bytes(checkpoint: Checkpoint, plan: Mapping[str, int]) -> float:
    """Return the bytes of all quantised weights at ``plan`` (path -> bits), all overhead included."""
    return sum(size_bytes(checkpoint, path, bits) for path, bits in plan.items())


def bits_per_weight(checkpoint: Checkpoint, plan: Mapping[str, int]) -> float:
    """Return the bits per quantised weight of a whole model at ``plan`` (path -> bits), all overhead included."""
    weights = sum(rows * columns for rows, columns in checkpoint.shapes.values())
    return 8 * plan_bytes(checkpoint, plan) / weights


def plain_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the unquantised tensors (embeddings, norms, biases, linear layers outside the scope)."""
    return sum(checkpoint.stored_bytes(name) for name in checkpoint.plain_names())
