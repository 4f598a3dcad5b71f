"""Read a width of a nested weight in one pass over memory on a GPU.

``NestedTensor.read`` is a chain of five element-wise operations, which together move 31 bytes per weight; compiled into
one kernel they move 5. At a training step's few thousand tokens that is as much time as the products take. Encoding is
not compiled: Triton's division is not exactly rounded, and the codes in training must be those that are stored.

On a CPU, without Triton and for small weights, whose kernels are shorter than a launch, it is ``NestedTensor.read``.
Shapes: N out features, K in features, G groups.
"""

import functools
from collections.abc import Callable

import torch
from torch.utils._triton import has_triton

from matquant.core.nest import slice_positions
from matquant.core.tensor import NestedTensor

SMALLEST = 2**20  # weights from which on one kernel is faster than several


def read(tensor: NestedTensor, bits: int) -> torch.Tensor:
    """Return ``tensor.read(bits)``, float32 [N, K], bit for bit."""
    if not helps(tensor.codes):
        found: torch.Tensor = tensor.read(bits)
        return found
    scale, zero = tensor.affine(bits)
    return compiled()(tensor.codes, _table(bits, tensor.rule, tensor.grid, tensor.codes.device), scale, zero)


def helps(codes_NK: torch.Tensor) -> bool:
    """Return whether a compiled read of these codes is faster."""
    return codes_NK.device.type == "cuda" and codes_NK.numel() >= SMALLEST and has_triton()


@functools.cache
def compiled() -> Callable[..., torch.Tensor]:
    """Return ``chain`` compiled once, for all shapes."""
    return torch.compile(chain, dynamic=True, fullgraph=True)


def chain(
    codes_NK: torch.Tensor, position_256: torch.Tensor, scale_NG: torch.Tensor, zero_NG: torch.Tensor
) -> torch.Tensor:
    """Return scale * (position of the code's slice - zero), float32 [N, K]. position_256: of every 8-bit code."""
    rows, groups = scale_NG.shape
    position = position_256[codes_NK.reshape(rows, groups, -1).int()]
    return ((position - zero_NG[..., None]) * scale_NG[..., None]).reshape(codes_NK.shape)


@functools.cache
def _table(bits: int, rule: str, grid: str, device: torch.device) -> torch.Tensor:
    """Return the position of every 8-bit code's slice, float32 [256], on ``device``."""
    found: torch.Tensor = slice_positions(torch.arange(256, dtype=torch.uint8), bits, rule=rule, grid=grid).to(device)
    return found
