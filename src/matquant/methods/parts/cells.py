"""Find the 8-bit code that is best for several widths at once, for a whole column of weights.

Each width r has a target t_r, and one code serves all widths:

    q = argmin over q of  sum_r lambda_r (t_r - scale_r (slice(q, r) - zero_r))^2

Each term falls until its best slice and rises after it, so the best q lies between the choices of the single widths.
Inside a *cell* (a run of codes whose slices are all equal) only the 8-bit term changes. So the candidates are the 8-bit
choice clamped into each cell in between: usually one code, rarely more than ten.
Shapes: N out features, R widths, C cells, J candidate codes, Q the 256 codes.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from matquant.core.nest import (
    MASTER_BITS,
    UNIFORM,
    nearest_codes,
    positions,
    round_half_up,
    slice_codes,
    slice_positions,
)


def chooser(
    rule: str, grid: str, widths: Sequence[int], device: torch.device
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return the function that chooses a column of codes for ``widths``, descending: (targets [R, N], scales, zeros,
    lambdas [R]) -> (codes int64 [N], values read at each width [R, N]). A single width takes the nearest of its
    codes."""
    if len(widths) > 1:
        return _cells(rule, grid, tuple(widths), device).choose
    return functools.partial(_nearest, bits=widths[0], grid=grid)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The runs of 8-bit codes in which no slice changes."""

    widths: tuple[int, ...]  # descending, 8 first
    grid: str  # one of nest.GRIDS
    low_C: torch.Tensor  # first code of each cell
    high_C: torch.Tensor  # last code of each cell
    of_Q: torch.Tensor  # the cell of each code
    first: tuple[torch.Tensor, ...]  # per width below 8: the first cell of each slice code [2^r (+ 1)]
    last: tuple[torch.Tensor, ...]  # per width below 8: the last cell of each slice code [2^r (+ 1)]
    positions_RQ: torch.Tensor  # position of every width's slice of every code

    def choose(
        self, target_RN: torch.Tensor, scale_RN: torch.Tensor, zero_RN: torch.Tensor, lambdas_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best code of each row, int64 [N], and the values read from it at each width [R, N]."""
        position_RN = target_RN / scale_RN + zero_RN
        if self.grid == UNIFORM:
            nearest_RN = round_half_up(position_RN).long().unbind()
        else:
            nearest_RN = tuple(
                nearest_codes(row, bits, grid=self.grid).long()
                for row, bits in zip(position_RN, self.widths, strict=True)
            )
        master_N = nearest_RN[0].clamp_(0, 2**MASTER_BITS - 1)
        below_N = above_N = self.of_Q[master_N]
        for width in range(1, len(self.widths)):
            own_N = nearest_RN[width].clamp_(0, len(self.first[width - 1]) - 1)
            below_N = torch.minimum(below_N, self.last[width - 1][own_N])
            above_N = torch.maximum(above_N, self.first[width - 1][own_N])
        span = int((above_N - below_N).max())
        cell_JN = torch.minimum(below_N + torch.arange(span + 1, device=below_N.device)[:, None], above_N)
        code_JN = torch.minimum(torch.maximum(master_N, self.low_C[cell_JN]), self.high_C[cell_JN])
        read_RJN = scale_RN[:, None] * (self.positions_RQ[:, code_JN] - zero_RN[:, None])
        if span == 0:
            return code_JN[0], read_RJN[:, 0]
        cost_JN = torch.tensordot(lambdas_R, (target_RN[:, None] - read_RJN).square_(), dims=1)
        best_N = cost_JN.argmin(0)
        read_RN = read_RJN.gather(1, best_N.expand(len(read_RJN), 1, -1))[:, 0]
        return code_JN.gather(0, best_N[None])[0], read_RN


@functools.cache
def _cells(rule: str, grid: str, widths: tuple[int, ...], device: torch.device) -> Cells:
    every = torch.arange(2**MASTER_BITS)
    slices = torch.stack([slice_codes(every, bits, rule=rule) for bits in widths])
    changes = (slices[1:, 1:] != slices[1:, :-1]).any(0)
    cell = torch.cat([torch.zeros(1, dtype=torch.int64), changes.long().cumsum(0)])
    count = int(cell[-1]) + 1
    low = torch.tensor([int((cell == index).nonzero()[0]) for index in range(count)])
    high = torch.tensor([int((cell == index).nonzero()[-1]) for index in range(count)])
    first, last = [], []
    for row in slices[1:]:
        members = [(row == code).nonzero().flatten() for code in range(int(row.max()) + 1)]
        first.append(cell[torch.stack([codes[0] for codes in members])])
        last.append(cell[torch.stack([codes[-1] for codes in members])])
    reads = [slice_positions(every, bits, rule=rule, grid=grid) for bits in widths]
    return Cells(
        widths=widths,
        grid=grid,
        low_C=low.to(device),
        high_C=high.to(device),
        of_Q=cell.to(device),
        first=tuple(codes.to(device) for codes in first),
        last=tuple(codes.to(device) for codes in last),
        positions_RQ=torch.stack(reads).to(device),
    )


def _nearest(
    target_RN: torch.Tensor,
    scale_RN: torch.Tensor,
    zero_RN: torch.Tensor,
    lambdas_R: torch.Tensor,
    *,
    bits: int,
    grid: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    code_RN = nearest_codes(target_RN / scale_RN + zero_RN, bits, grid=grid)
    return code_RN[0], scale_RN * (positions(code_RN, bits, grid=grid) - zero_RN)
