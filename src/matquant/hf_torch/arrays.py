"""Convert between numpy arrays and torch tensors without changing any number."""

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

from matquant.core.tensor import NestedTensor


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a numpy array of the same numbers; bfloat16 as ml_dtypes.bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Reverse ``to_numpy``; the result is a writable copy."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def nested_to_numpy(tensor: NestedTensor) -> NestedTensor:
    """Return the same nested tensor with numpy arrays; itself if it has them."""
    return tensor if isinstance(tensor.codes, np.ndarray) else _convert(tensor, to_numpy)


def nested_to_torch(tensor: NestedTensor, *, device: torch.device | str = "cpu") -> NestedTensor:
    """Return the same nested tensor with torch tensors on ``device``."""
    return _convert(tensor, lambda array: to_torch(array).to(device))


def _convert(tensor: NestedTensor, convert: Callable[[Any], Any]) -> NestedTensor:
    return dataclasses.replace(
        tensor,
        codes=convert(tensor.codes),
        scale=convert(tensor.scale),
        zero=convert(tensor.zero),
        slices={bits: (convert(scale), convert(zero)) for bits, (scale, zero) in tensor.slices.items()},
    )
