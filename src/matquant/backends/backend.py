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


class Rows(Protocol):
    """Return the rows of the weight [N, K] with these ids, integers [...], read at ``bits`` bits: [..., K], float32."""

    def __call__(self, weight: Any, ids: torch.Tensor, /, *, bits: int) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to multiply by a nested weight at any width."""

    # nested weight -> packed weight for ``matmul``
    pack: Pack
    # the product with a packed weight; gradients are needed only if ``trains``
    matmul: Matmul
    # the rows of a packed weight, for an embedding; ids are within the vocabulary
    rows: Rows
    # why inputs of this dtype on this device are not supported, as half a sentence; None if they are
    why_not: Callable[[torch.device | str, torch.dtype], str | None]
    # (number of layers, activations) -> description of the kernels in use, shown once
    describe: Callable[[int, str], str]
    # the kinds of activations that ``matmul`` supports
    activations: tuple[str, ...]
    # whether a model keeps ordinary parameters, which can be trained and which a switch of width rewrites
    trains: bool = False
