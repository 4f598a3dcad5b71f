"""The interface of a backend. N out features, K in features."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from matquant.core.tensor import NestedTensor


class Pack(Protocol):
    """Pack a nested weight (numpy arrays, perhaps mapped from a file) for ``device``. Its codes are read once."""

    def __call__(self, tensor: NestedTensor, /, *, device: torch.device | str) -> Any: ...


class Matmul(Protocol):
    """Return x [..., K] times the transposed weight [N, K] read at ``bits`` bits: [..., N].

    bits: None for the width that ``Backend.select`` has set. activations: "float" keeps x as it is, "int8" rounds it
    per token and group of inputs.
    """

    def __call__(self, weight: Any, x: torch.Tensor, /, *, bits: Any, activations: str) -> torch.Tensor: ...


class Rows(Protocol):
    """Return the rows of the weight [N, K] with these ids, integers [...], read at ``bits`` bits: [..., K], float32."""

    def __call__(self, weight: Any, ids: torch.Tensor, /, *, bits: Any) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to multiply by a nested weight at any width."""

    # nested weight -> packed weight for ``matmul``
    pack: Pack
    # the product with a packed weight; gradients are needed only if ``trains``
    matmul: Matmul
    # the rows of a packed weight, for an embedding; ids are within the vocabulary
    rows: Rows
    # why inputs of this dtype on this device are not supported with these activations, as half a sentence; None if they
    # are
    why_not: Callable[[torch.device | str, torch.dtype, str], str | None]
    # (number of layers, activations) -> description of the kernels in use, shown once
    describe: Callable[[int, str], str]
    # the kinds of activations that ``matmul`` supports
    activations: tuple[str, ...]
    # types of devices on which the backend is chosen unless another is named; empty: all
    devices: tuple[str, ...] = ()
    # why this weight is not supported, as half a sentence; None if it is
    why_not_weight: Callable[[NestedTensor], str | None] = lambda tensor: None
    # sets the width that a packed weight keeps in the device's memory, where captured graphs read it; None: none does
    select: Callable[[Any, int], None] | None = None
    # a packed weight at the selected width as a float weight [N, K] of a dtype; None: made from the nested weight
    dense: Callable[[Any, torch.dtype], torch.Tensor] | None = None
    # whether a model keeps ordinary parameters, which can be trained and which a switch of width rewrites
    trains: bool = False


def names(dtypes: Iterable[torch.dtype]) -> str:
    """Return the names of dtypes without "torch.", for a message."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
