"""The interface of a backend. N out features, K in features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from matquant.core.tensor import NestedTensor


class Pack(Protocol):
    """Pack a nested weight (numpy arrays, perhaps mapped from a file) for ``device``. Its codes are read once."""

    def __call__(self, tensor: NestedTensor, /, *, device: torch.device | str) -> Any: ...


class Matmul(Protocol):
    """Return x [..., K] times the transposed weight [N, K] read at ``bits`` bits: [..., N].

    activations: "float" keeps x as it is, "int8" rounds it per token and group of inputs.
    """

    def __call__(self, weight: Any, x: torch.Tensor, /, *, bits: int, activations: str) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to multiply by a nested weight at any width."""

    # nested weight -> what ``matmul`` multiplies by
    pack: Pack
    # the product with a packed weight; never asked for gradients unless ``trains``
    matmul: Matmul
    # why inputs of this dtype on this device are not supported, as half a sentence; None if they are
    why_not: Callable[[torch.device | str, torch.dtype], str | None]
    # (number of linears, activations) -> what multiplies, in words that are shown once
    describe: Callable[[int, str], str]
    # the kinds of activations that ``matmul`` knows
    activations: tuple[str, ...]
    # whether a model keeps ordinary parameters, which a switch of width rewrites, and which can be trained
    trains: bool = False
