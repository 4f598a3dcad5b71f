"""One rank's part of a linear layer as planes: what tensor parallelism leaves of its codes, scales and zero-points.

The part of a column-parallel layer is some rows, that of a row-parallel layer some columns; several weights may be
stacked, such as q, k and v. From the part come planes in the order of GPU kernels (backends/gpu_layout.py), which pad
it, so that any cut between groups will do. The widths are numbers in the device's memory, one for each stacked weight:
``select`` changes them in place, and neither a compiled model nor a captured CUDA graph is made again.

Shapes: N out features, K in features of the rank, G groups, A pairs of scales and zero-points: of the 8-bit grid, and
of every width that has a pair.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from matquant.backends import gpu
from matquant.backends.gpu_layout import ROWS, Resident, make_resident, padded, why_not
from matquant.core.tensor import NestedTensor


class Planes(torch.nn.Module):
    """Stacked weights of a rank, in planes. sizes: the rows of each, which add up to N."""

    planes: torch.Tensor
    affine: torch.Tensor
    widths: torch.Tensor
    bits: torch.Tensor

    def __init__(self, weight: Resident, sizes: Sequence[int]) -> None:
        super().__init__()
        for name in ("planes", "affine", "widths", "bits"):
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self.rows, self.group, self.grid, self.sizes = weight.rows, weight.group, weight.grid, tuple(sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., K] -> [..., N], every stacked weight read at its width."""
        y: torch.Tensor = torch.ops.matquant.linear(
            x, self.planes, self.affine, self.widths, self.bits, self.rows, self.group, self.grid, "float"
        )
        return y

    def select(self, bits: Sequence[int]) -> None:
        """Set the width of each stacked weight, in place and without waiting for the device."""
        if self.bits.numel() == 1:
            self.bits.fill_(bits[0])
            return
        start = 0
        for size, width in zip(self.sizes, bits, strict=True):
            self.bits[start // ROWS : -(-(start + size) // ROWS)] = width
            start += size

    @property
    def bytes(self) -> int:
        """Return the bytes of memory: planes, scales, zero-points, widths."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


def why_dense(
    *, rule: str, grid: str, group: int | None, columns: int, device: str, dtype: torch.dtype, kernels: str = "auto"
) -> str | None:
    """Return why planes do not serve a rank's part with K ``columns``, as half a sentence; None if they do.

    group: inputs that share a scale; None for per-channel. dtype: of the inputs. kernels: "planes" accepts a CPU too,
    where the operator is a slow reference.
    """
    if group is not None and columns % group:
        return f"tensor parallelism leaves a rank {columns} inputs, which cuts a group of {group}"
    if device == "cpu" and kernels != "planes":
        return "a product with planes needs a GPU"
    obstacle = why_not(rule=rule, grid=grid, group=group or columns, columns=columns)
    return obstacle if obstacle is not None or device == "cpu" else gpu.why_not(device, dtype, "float")


def own_widths(nested: NestedTensor, *, max_bits: int) -> list[int]:
    """Return the widths up to ``max_bits`` with a per-width scale and zero-point, in the order of ``affines``."""
    return sorted(bits for bits in nested.slices if bits <= max_bits)


def affines(nested: NestedTensor, *, max_bits: int) -> torch.Tensor:
    """Return all scales and zero-points of a nested weight (numpy), float32 [N, G, 2 A]: a scale, a zero-point, ..."""
    pairs = [(nested.scale, nested.zero), *(nested.slices[bits] for bits in own_widths(nested, max_bits=max_bits))]
    return torch.stack([torch.as_tensor(part) for pair in pairs for part in pair], dim=-1)


def make_planes(
    codes_NK: torch.Tensor,
    affines_NGA: torch.Tensor,
    *,
    sizes: Sequence[int],
    own: Sequence[int],
    grid: str,
    max_bits: int,
) -> torch.nn.ModuleList:
    """Return a rank's part as one or more Planes at ``max_bits``, on the device of the codes, whose outputs follow.

    codes: labels, uint8 [N, K]. affines: as ``affines`` returns them. sizes: the rows of every stacked weight. Weights
    share one product if each begins at a multiple of 64 rows, which is what a width belongs to.
    """
    columns, groups = codes_NK.shape[1], affines_NGA.shape[1]
    found = torch.nn.ModuleList()
    start = 0
    for stacked in _together(sizes):
        rows = slice(start, start + sum(stacked))
        count = padded(sum(stacked), columns)[0] // ROWS if len(stacked) > 1 else 1
        stored = affines_NGA[rows].reshape(sum(stacked), groups, -1, 2).unbind(2)
        pairs = [(pair[..., 0], pair[..., 1]) for pair in stored]
        weight = make_resident(codes_NK[rows], pairs, own=own, grid=grid, max_bits=max_bits, widths=count)
        found.append(Planes(weight, stacked))
        start = rows.stop
    return found


def select(parts: Iterable[Any], bits: Sequence[int]) -> None:
    """Set the widths of the weights stacked in a layer, in order."""
    start = 0
    for part in parts:
        part.select(bits[start : start + len(part.sizes)])
        start += len(part.sizes)


def product(parts: Iterable[Any], x: torch.Tensor) -> torch.Tensor:
    """Return the outputs of all parts, [..., N]."""
    outputs: list[torch.Tensor] = [part(x) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _together(sizes: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield the weights that share a product: all, or each alone if one begins inside 64 rows."""
    if any(size % ROWS for size in sizes[:-1]):
        yield from ([size] for size in sizes)
    else:
        yield list(sizes)
