"""Products with planes on a GPU: ``torch.ops.matquant.linear``, which reads the bits of one width and no others.

The width is a number in GPU memory that a kernel reads when it runs. So a captured CUDA graph or a compiled model
switches width by ``select``, without being captured again. On CUDA the Triton kernels run (gpu_kernels.py). On a CPU
the same operator multiplies by the dense weight, a slow reference for tests and for tools that trace a model.

Shapes: N out features, K in features, T tokens.
"""

import dataclasses
import functools
import importlib
from typing import Any

import torch

from matquant.backends.backend import Backend
from matquant.backends.gpu_layout import BLOCK, Resident, load_resident, read, round_activations
from matquant.backends.gpu_layout import why_not as why_not_weight
from matquant.core.tensor import NestedTensor

DTYPES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability: the first with int8 and bfloat16 tensor cores
LIBRARY = torch.library.Library("matquant", "FRAGMENT")  # keeps the operator registered while it lives
LIBRARY.define(
    "linear(Tensor x, Tensor planes, Tensor affine, Tensor widths, Tensor bits, int rows, int group, str grid, "
    "str activations) -> Tensor"
)


def linear(x: torch.Tensor, weight: Resident, *, activations: str = "float") -> torch.Tensor:
    """Return x [..., K] times the transposed weight at the width ``weight.bits``: [..., N] in the dtype of x.

    activations: "float", or "int8" to round x per token and 128 inputs first. The caller has checked device and shape.
    """
    parts = (weight.planes, weight.affine, weight.widths, weight.bits)
    y: torch.Tensor = torch.ops.matquant.linear(x, *parts, weight.rows, weight.group, weight.grid, activations)
    return y


def _linear_dense(
    x: torch.Tensor,
    planes: torch.Tensor,
    affine: torch.Tensor,
    widths: torch.Tensor,
    bits: torch.Tensor,
    rows: int,
    group: int,
    grid: str,
    activations: str,
) -> torch.Tensor:
    """Multiply by the dense weight in float32, on any device."""
    columns = x.shape[-1]
    weight = Resident(
        planes=planes, affine=affine, widths=widths, bits=bits, rows=rows, columns=columns, group=group, grid=grid
    )
    values = x.reshape(-1, columns).float()
    if activations == "int8":
        codes, scale = round_activations(values)
        values = (codes.unflatten(1, (-1, BLOCK)) * scale[..., None]).flatten(1)[:, :columns]
    return torch.nn.functional.linear(values, read(weight)).to(x.dtype).view(*x.shape[:-1], rows)


def _linear_cuda(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Run the Triton kernels."""
    return _kernels().linear(x, *rest)


def _linear_fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Return the shape of the result, for tracing."""
    rows: int = rest[4]
    return x.new_empty(*x.shape[:-1], rows)


LIBRARY.impl("linear", _linear_dense, "CPU")
LIBRARY.impl("linear", _linear_cuda, "CUDA")
torch.library.register_fake("matquant::linear", _linear_fake, lib=LIBRARY)
