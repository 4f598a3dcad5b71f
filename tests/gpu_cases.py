"""Weights and inputs for the Triton kernels, the same in the process that computes and in the one that checks.

python tests/gpu_cases.py OUT NAME ... computes cases: OUT gets NAME.y and NAME.dense, and "ptx": look-ups.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from matquant.core.nest import UNIFORM, slice_affine
from matquant.core.tensor import NestedTensor

EIGHT = tuple(range(1, 9))  # one width for each 64 rows


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product: every row of the weight has all 256 codes, in another order."""

    columns: int
    groups: int = 1
    tokens: int = 1
    grid: str = UNIFORM
    activations: str = "float"
    dtype: str = "float32"  # of x
    bits: tuple[int, ...] = EIGHT  # one, or one for each 64 rows
    rows: int = 509  # 8 blocks of 64, the last incomplete
    own: tuple[int, ...] = ()  # widths with per-width scales and zero-points
    dense: bool = False  # also make the dense weight
    exact: bool = False  # integers as inputs and scales of 1: every sum is an integer times a power of two

    def weight(self) -> NestedTensor:
        random = np.random.default_rng(0)
        codes = np.concatenate(
            [random.permuted(np.tile(np.arange(256, dtype=np.uint8), (self.rows, 1)), axis=1)]
            * -(-self.columns // 256),
            axis=1,
        )[:, : self.columns]
        shape = (self.rows, self.groups)

        def scale() -> np.ndarray:
            return np.exp(random.normal(-3, 0.5, shape)).astype(np.float32)

        zero = random.integers(90, 160, shape).astype(np.float32)
        slices = {r: (scale(), (2 ** (r - 1) + random.normal(0, 0.3, shape)).astype(np.float32)) for r in self.own}
        if self.exact:
            zero, slices = np.full(shape, 128, np.float32), {}
        ones = np.ones(shape, np.float32)
        return NestedTensor(
            codes=codes, scale=ones if self.exact else scale(), zero=zero, rule="prefix", slices=slices, grid=self.grid
        )

    def inputs(self) -> np.ndarray:
        """x, float32 [T, K]. Exact: integers, of which each 128 have a 127, so that activations have a scale of 1."""
        random = np.random.default_rng(1)
        if not self.exact:
            x = random.normal(size=(self.tokens, self.columns)).astype(np.float32)
            return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)  # numbers that bfloat16 holds
        x = random.integers(-127, 128, (self.tokens, self.columns)).astype(np.float32)
        x[:, ::128] = 127
        return x

    def row_bits(self) -> np.ndarray:
        """The width of every row, int [N]."""
        return np.repeat(self.bits, self.rows if len(self.bits) == 1 else 64)[: self.rows]


def by_rows(case: Case, weight: NestedTensor, *, more: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions [N, K], scales and zero-points [N, K] of every row at its width + ``more``, float64."""
    position, scale, zero = (np.empty(weight.codes.shape) for _ in range(3))
    bits = case.row_bits() + more
    for width in set(bits.tolist()):
        at = bits == width
        each = weight.affine(width) if width in weight.slices else slice_affine(weight.scale, weight.zero, width)
        position[at] = weight.positions(width)[at]
        scale[at], zero[at] = (np.repeat(part[at], case.columns // case.groups, axis=1) for part in each)
    return position, scale, zero


def compute(case: Case) -> dict[str, np.ndarray]:
    """What the kernels give: y [T, N] and the dense weight [N, K], float32."""
    import dataclasses

    import torch

    from matquant.backends import gpu_launch
    from matquant.backends.gpu_layout import load_resident

    weight = load_resident(case.weight())
    weight = dataclasses.replace(weight, bits=torch.tensor(case.bits, dtype=torch.int32))
    parts: Any = (weight.planes, weight.affine, weight.widths, weight.bits, weight.rows)
    x = torch.from_numpy(case.inputs()).to(getattr(torch, case.dtype))
    found = {"y": gpu_launch.linear(x, *parts, weight.group, weight.grid, case.activations).float().numpy()}
    if case.dense:
        dense = gpu_launch.dense(*parts, weight.columns, weight.group, weight.grid, torch.float32)
        found["dense"] = dense.numpy()
    return found


def main(out: str, names: list[str]) -> None:
    import test_gpu_kernels
    from matquant.backends.gpu_operands import look_up

    found = {f"{name}.{key}": value for name in names for key, value in compute(test_gpu_kernels.CASES[name]).items()}
    np.savez(out, ptx=np.array([look_up(3), look_up(4)]), **found)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
