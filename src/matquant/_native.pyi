"""Types of the extension module (native/bind_linear.cpp, native/bind_model.cpp)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class Weight:
    def __init__(self, codes: NDArray[np.uint8], resident_bits: int, rule: int, group: int) -> None: ...
    def add_values(
        self, scale: NDArray[np.float32] | NDArray[np.uint16], zero: NDArray[np.float32] | NDArray[np.uint16]
    ) -> int: ...
    def set_affine(self, bits: int, values: int, step: float, centre: float) -> None: ...
    def codes(self, bits: int, rule: int) -> NDArray[np.uint8]: ...
    def plane(self, plane: int) -> NDArray[np.uint8]: ...
    def matmul(self, x: NDArray[np.float32], bits: int, activations: int, threads: int) -> NDArray[np.float32]: ...
    @property
    def pointer(self) -> int: ...
    @property
    def bytes(self) -> int: ...

def isa() -> str: ...
def use_isa(name: str, /) -> None: ...

# native/bind_model.cpp

_Vector = NDArray[np.float32]

class Matrix: ...

def dense_matrix(data: NDArray[Any], dtype: str, bias: _Vector | None, resident: bool) -> Matrix: ...
def nested_matrix(owner: object, linear: int, bias: _Vector | None) -> Matrix: ...

class Model:
    def __init__(
        self,
        *,
        hidden: int,
        intermediate: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        vocab: int,
        norm_eps: float,
        attention_scale: float,
        embedding_scale: float,
        attention_cap: float,
        logit_cap: float,
        gelu: bool,
    ) -> None: ...
    def add_rope(self, frequencies: _Vector, scale: float) -> None: ...
    def add_layer(
        self, matrices: Sequence[Matrix], norms: Sequence[_Vector | None], window: int, rope: int
    ) -> None: ...
    def set_ends(self, embedding: Matrix, head: Matrix, norm: _Vector) -> None: ...

class Cache:
    def __init__(self, model: Model, capacity: int, exact: bool) -> None: ...
    @property
    def capacity(self) -> int: ...

class Workspace:
    profile: bool
    def __init__(self, model: Model, max_tokens: int, capacity: int, threads: int) -> None: ...
    def seconds(self) -> dict[str, float]: ...

def step(
    model: Model,
    bits: NDArray[np.uint8],
    exact: bool,
    tokens: NDArray[np.int32],
    positions: NDArray[np.int32],
    caches: list[Cache],
    first_logit: int,
    logits: NDArray[np.float32],
    workspace: Workspace,
) -> None: ...

class Stream:
    def __init__(self, bytes: int) -> None: ...
    def read(self, threads: int) -> float: ...
    @property
    def bytes(self) -> int: ...
