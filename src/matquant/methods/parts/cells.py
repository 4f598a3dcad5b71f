"""Find the 8-bit code that is best for several widths at once, for a whole column of weights.

Each width r has a target t_r, and one code serves all widths:

    q = argmin over q of  sum_r lambda_r (t_r - scale_r (slice(q, r) - zero_r))^2

Each term falls until its best slice and rises after it, so the best q lies between the choices of the single widths.
Inside a *cell* (a run of codes whose slices are all equal) only the 8-bit term changes. So the candidates are the 8-bit
choice clamped into each cell in between: usually one code, rarely more than ten.
Where a target falls decides its nearest code, and that code's first and last cell, so all three are tables: few
operations per column matter, since on a GPU, and for few rows on a CPU, they take longer to start than to run.
Shapes: N out features, R widths, C cells, J candidate codes, Q the 256 codes, I places of targets at all widths.
"""

import functools
from dataclasses import dataclass

import torch

from matquant import _native
from matquant.core.nest import (
    MASTER_BITS,
    RESOLUTION,
    UNIFORM,
    nearest_codes,
    positions,
    round_half_up,
    slice_codes,
)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The runs of 8-bit codes in which no slice changes. Of a single width, each of its codes is a cell."""

    widths: tuple[int, ...]  # descending; if there are several, 8 first
    grid: str  # one of nest.GRIDS
    low_C: torch.Tensor  # first code of each cell
    high_C: torch.Tensor  # last code of each cell
    step_C1: torch.Tensor  # 0, 1, 2, ...
    start_R1: torch.Tensor  # where each width's places start among those of all
    limit_R1: torch.Tensor  # last place of each width, from 0, as a float
    places_R1: torch.Tensor  # places in a code of each width, as a float; not of the uniform grid
    code_I: torch.Tensor  # nearest code of the width to a place
    first_I: torch.Tensor  # first cell of that code
    last_I: torch.Tensor  # last cell of that code
    positions_RQ: torch.Tensor  # position of every width's slice of every code

    @functools.cached_property
    def native(self) -> _native.Cells:
        """The tables for native code, on a CPU."""
        return _native.Cells(
            limit=self.limit_R1.flatten().numpy(),
            places=self.places_R1[: 0 if self.grid == UNIFORM else None].flatten().numpy(),
            start=self.start_R1.flatten().numpy(),
            code=self.code_I.numpy(),
            first=self.first_I.numpy(),
            last=self.last_I.numpy(),
            low=self.low_C.numpy(),
            high=self.high_C.numpy(),
            positions=self.positions_RQ.numpy(),
        )

    def choose(
        self, target_RN: torch.Tensor, scale_RN: torch.Tensor, zero_RN: torch.Tensor, lambdas_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best code of each row, int32 [N], and the values read from it at each width [R, N]."""
        position_RN = target_RN / scale_RN + zero_RN
        uniform = self.grid == UNIFORM
        place_RN = round_half_up(position_RN) if uniform else torch.floor(position_RN.float() * self.places_R1)
        place_RN = torch.fmin(place_RN.clamp_(min=0), self.limit_R1).int() + self.start_R1  # fmin: of NaN the limit
        master_N = self.code_I.index_select(0, place_RN[0])
        place_RN = place_RN.view(-1)  # index_select is four times as fast as an index of two dimensions
        below_N = self.last_I.index_select(0, place_RN).view(position_RN.shape).amin(0)
        above_N = self.first_I.index_select(0, place_RN).view(position_RN.shape).amax(0)
        span = int((above_N - below_N).max())
        cell_JN = torch.minimum(below_N + self.step_C1[: span + 1], above_N)
        low_JN, high_JN = (
            codes_C.index_select(0, cell_JN.view(-1)).view(cell_JN.shape) for codes_C in (self.low_C, self.high_C)
        )
        code_JN = torch.minimum(torch.maximum(master_N, low_JN), high_JN)
        position_RJN = self.positions_RQ.index_select(1, code_JN.view(-1)).view(-1, *code_JN.shape)
        read_RJN = scale_RN[:, None] * (position_RJN - zero_RN[:, None])
        if span == 0:
            return code_JN[0], read_RJN[:, 0]
        cost_JN = torch.tensordot(lambdas_R, (target_RN[:, None] - read_RJN).square_(), dims=1)
        best_N = cost_JN.argmin(0)
        read_RN = read_RJN.gather(1, best_N.expand(len(read_RJN), 1, -1))[:, 0]
        return code_JN.gather(0, best_N[None])[0], read_RN


@functools.cache
def cells_of(rule: str, grid: str, widths: tuple[int, ...], device: torch.device) -> Cells:
    """Return the cells of ``widths``, descending, for a rule of nest.py. With a single width codes have that width."""
    every = torch.arange(2**MASTER_BITS)
    if len(widths) == 1:
        slices = every.clamp(max=2 ** widths[0] - 1)[None]
    else:
        slices = torch.stack([slice_codes(every, bits, rule=rule) for bits in widths])
    changes = (slices[1:, 1:] != slices[1:, :-1]).any(0)
    cell = torch.cat([torch.zeros(1, dtype=torch.int64), changes.long().cumsum(0)])
    count = int(cell[-1]) + 1
    low = torch.tensor([int((cell == index).nonzero()[0]) for index in range(count)])
    high = torch.tensor([int((cell == index).nonzero()[-1]) for index in range(count)])
    every_place = torch.arange(RESOLUTION * 2**MASTER_BITS)
    places = [len(every_place) // 2**bits for bits in widths]
    codes, first, last = [], [], []
    for bits, row, in_code in zip(widths, slices, places, strict=True):
        members = [(row == code).nonzero().flatten() for code in range(int(row.max()) + 1)]
        codes.append(torch.arange(len(members)))
        if grid != UNIFORM:
            codes[-1] = nearest_codes(every_place / in_code, bits, grid=grid).long()
        first.append(cell[torch.stack([codes_of[0] for codes_of in members])][codes[-1]])
        last.append(cell[torch.stack([codes_of[-1] for codes_of in members])][codes[-1]])
    counts = torch.tensor([len(codes_of) for codes_of in codes])
    reads = [positions(row, bits, grid=grid) for bits, row in zip(widths, slices, strict=True)]
    return Cells(
        widths=widths,
        grid=grid,
        low_C=low.int().to(device),
        high_C=high.int().to(device),
        step_C1=torch.arange(count, dtype=torch.int32)[:, None].to(device),
        start_R1=(counts.cumsum(0) - counts)[:, None].int().to(device),
        limit_R1=(counts - 1.0)[:, None].to(device),
        places_R1=torch.tensor(places, dtype=torch.float32)[:, None].to(device),
        code_I=torch.cat(codes).int().to(device),
        first_I=torch.cat(first).int().to(device),
        last_I=torch.cat(last).int().to(device),
        positions_RQ=torch.stack(reads).to(device),
    )
