"""torch's own product with the slice as an ordinary float weight: any device, any dtype, gradients, no memory saved.

A model on this backend keeps its linears; their parameters are rewritten when the width changes, which is why it is as
fast as a float model and can be trained. ``matmul`` makes the weight anew for each call.
"""

from typing import Any

import numpy as np
import torch

from matquant.backends.backend import Backend
from matquant.core.tensor import NestedTensor


def pack(tensor: NestedTensor, /, *, device: torch.device | str) -> NestedTensor:
    """The same nested tensor with torch tensors on ``device``, copies."""

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
    """x [..., K] -> [..., N] of its dtype."""
    return torch.nn.functional.linear(x, weight.read(bits).to(x.dtype))


BACKEND = Backend(
    pack=pack,
    matmul=matmul,
    why_not=lambda device, dtype: None,
    describe=lambda count, activations: f"dense weights for {count} linears",
    activations=("float",),
    trains=True,
)
