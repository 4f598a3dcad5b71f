"""Types of the extension module (native/python/)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class Weight:
    def __init__(self, codes: NDArray[np.uint8], resident_bits: int, rule: int, group: int, grid: int = 0) -> None: ...
    def add_planes(self, codes: NDArray[np.uint8], bits: int) -> None: ...
    def hold(self, bits: int) -> None: ...
    def add_values(
        self, scale: NDArray[np.float32] | NDArray[np.uint16], zero: NDArray[np.float32] | NDArray[np.uint16]
    ) -> int: ...
    def add_scales(self, scale: NDArray[np.float32] | NDArray[np.uint16], zero: float) -> int: ...
    def affine_bytes(self, bits: int) -> int: ...
    def set_affine(self, bits: int, values: int, step: float, centre: float) -> None: ...
    def codes(self, bits: int, rule: int) -> NDArray[np.uint8]: ...
    def plane(self, plane: int) -> NDArray[np.uint8]: ...
    def matmul(self, x: NDArray[np.float32], bits: int, activations: int, threads: int) -> NDArray[np.float32]: ...
    def matmul_at(self, x: int, y: int, tokens: int, bits: int, activations: int, threads: int) -> None: ...
    def rows_at(self, tokens: int, out: int, count: int, bits: int) -> None: ...
    @property
    def pointer(self) -> int: ...
    @property
    def bytes(self) -> int: ...

def planes_bytes(rows: int, cols: int, bits: int) -> int: ...
def padded_tokens(tokens: int, exact: bool, /) -> int: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def use_isa(name: str, /) -> None: ...

# Columns of nested GPTQ (native/gptq/columns.hpp)

_Index = NDArray[np.int32]

class Cells:
    def __init__(
        self,
        limit: NDArray[np.float32],
        places: NDArray[np.float32],
        start: _Index,
        code: _Index,
        first: _Index,
        last: _Index,
        low: _Index,
        high: _Index,
        positions: NDArray[np.float32],
    ) -> None: ...

def solve_columns(
    cells: Cells,
    values: NDArray[Any],
    matrix: NDArray[Any],
    codes: NDArray[np.uint8],
    scale: NDArray[Any],
    zero: NDArray[Any],
    group: _Index,
    lambdas: NDArray[Any],
    changes: NDArray[Any],
    descends: bool,
    threads: int,
) -> None: ...

# Models: every matrix that a step multiplies by has an id, in the order in which add_layer and set_ends receive them.

_Vector = NDArray[np.float32]

class Matrix: ...

def dense_matrix(data: NDArray[Any], dtype: str, bias: _Vector | None, resident: bool) -> Matrix: ...
def nested_matrix(owner: object, linear: int, bias: _Vector | None) -> Matrix: ...

class Model:
    def __init__(
        self,
        *,
        hidden: int,
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
        gate_alpha: float = 0.0,
        gate_limit: float = 0.0,
    ) -> None: ...
    def add_rope(self, frequencies: _Vector, scale: float) -> None: ...
    def add_layer(
        self,
        matrices: Sequence[Matrix],
        norms: Sequence[_Vector | None],
        window: int,
        rope: int,
        sinks: _Vector | None = None,
        experts: int = 0,
        active: int = 0,
        renormalise: bool = False,
        shared: bool = False,
    ) -> None: ...
    def set_ends(self, head: Matrix, embedding: Matrix | None, norm: _Vector) -> None: ...
    def narrow(self, ids: Sequence[int]) -> None: ...
    def change_weights(self, change: Callable[[], None]) -> None: ...

class Cache:
    def __init__(self, model: Model, capacity: int, exact: bool) -> None: ...
    def copy_prefix(self, source: Cache, length: int) -> None: ...
    def bytes_in_use(self, length: int) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def capacity(self) -> int: ...

class Workspace:
    profile: bool
    @property
    def logits(self) -> NDArray[np.float32]: ...
    @property
    def used(self) -> NDArray[np.uint32]: ...  # tokens by expert of any layer and width, until cleared
    def __init__(self, model: Model, max_tokens: int, capacity: int, threads: int) -> None: ...
    def seconds(self) -> dict[str, float]: ...

def step(
    model: Model,
    bits: NDArray[np.uint8],  # by matrix id
    exact: bool,
    tokens: list[int],
    positions: list[int],
    caches: list[Cache],
    first_logit: int,
    logits: NDArray[np.float32] | None,
    workspace: Workspace,
) -> None: ...

class Stream:
    def __init__(self, bytes: int) -> None: ...
    def read(self, threads: int) -> float: ...
    @property
    def bytes(self) -> int: ...
