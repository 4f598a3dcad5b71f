"""torch's product with the slice as an ordinary float weight: any device, any dtype, gradients, no memory saved.

A model on this backend keeps its linear layers and rewrites their parameters when the width changes, so it is as fast
as a float model and can be trained. ``matmul`` makes the weight again for each call.
"""

from typing import Any

import numpy as np
import torch

from matquant.backends.backend import Backend
from matquant.core.tensor import NestedTensor


def pack(tensor: NestedTensor, /, *, device: torch.device | str) -> NestedTensor:
    """Copy a nested tensor to torch tensors on ``device``."""

    def move(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(device)

    slices = {bits: (move(scale), move(zero)) for bits, (scale, zero) in tensor.slices.items()}
    return NestedTensor(
        codes=move(tensor.codes),
        scale=move(tensor.scale),
        zero=move(tensor.zero),
        rule=tensor.rule,
        slices=slices,
        grid=tensor.grid,
    )


def matmul(weight: Any, x: torch.Tensor, /, *, bits: int, activations: str) -> torch.Tensor:
    """Return x [..., K] -> [..., N] in the dtype of x."""
    return torch.nn.functional.linear(x, weight.read(bits).to(x.dtype))


def rows(weight: Any, ids: torch.Tensor, /, *, bits: int) -> torch.Tensor:
    """Return float32 [..., K] for ids [...]."""
    return torch.nn.functional.embedding(ids, weight.read(bits))


BACKEND = Backend(
    pack=pack,
    matmul=matmul,
    rows=rows,
    why_not=lambda device, dtype, activations: None,
    describe=lambda count, activations: f"dense weights for {count} layers",
    activations=("float",),
    trains=True,
)
