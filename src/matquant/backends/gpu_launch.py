"""Launch the kernels of ``matquant::linear`` (gpu_kernels.py): tensors for their inputs, and how a product is cut.

Shapes: N out features, K in features, M tokens, G groups; N', K', M' with padding.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from matquant.backends import gpu_kernels
from matquant.backends.gpu_layout import BLOCK, INPUTS, PLACE_INPUTS, ROWS, padded, rounded
from matquant.core.nest import UNIFORM

MOST_TOKENS = 256  # above, the weight is made dense once and the library multiplies
PROCESSORS = 132  # of an H100 or H200, where none is asked
SUMS = 8  # rows of sums of a block of 128 inputs (prepare_kernel)
FINISHED = 256  # rows that a program of finish_kernel adds


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a product is cut into programs."""

    rows: int  # of a tile: 64, or 128 where that leaves enough programs
    tokens: int  # of a tile: the second size of the tensor core's product
    splits: int  # parts of the inputs, each with a program
    blocks: int  # blocks of 256 inputs of a part
    warps: int
    stages: int  # tiles loaded ahead


def schedule(
    rows: int, columns: int, tokens: int, *, scaled: bool, by_rows: bool, processors: int = PROCESSORS
) -> Schedule:
    """Choose a schedule for a weight [rows, columns], padded, and some tokens on a card of so many processors.

    Without splits a small weight would use a few processors only: with them there are about two programs for each.
    """
    tile = next(size for size in ((16, 32, 64) if scaled else (8, 16, 32, 64)) if size >= min(tokens, 64))
    tall = 2 * ROWS if rows % (2 * ROWS) == 0 and not by_rows and tile < 64 else ROWS
    inputs = columns // INPUTS
    splits = max(1, min(2 * processors // (rows // tall * -(-tokens // tile)), inputs // 2, 16))
    blocks = -(-inputs // splits)
    return Schedule(rows=tall, tokens=tile, splits=-(-inputs // blocks), blocks=blocks, warps=4, stages=3)


def linear(
    x: torch.Tensor,
    planes: torch.Tensor,
    affine: torch.Tensor,
    widths: torch.Tensor,
    bits: torch.Tensor,
    rows: int,
    group: int,
    grid: str,
    activations: str,
) -> torch.Tensor:
    """Run ``matquant::linear`` (gpu.py) with the kernels."""
    columns = x.shape[-1]
    x_MK = x.reshape(-1, columns).contiguous()
    tokens = len(x_MK)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    if tokens > MOST_TOKENS:
        weight = dense(planes, affine, widths, bits, rows, columns, group, grid, x.dtype)
        torch.mm(rounded(x_MK).to(x.dtype) if activations == "int8" else x_MK, weight.T, out=y)
    elif tokens:
        _multiply(x_MK, planes, affine, widths, bits, y, group=group, grid=grid, scaled=activations == "int8")
    return y.view(*x.shape[:-1], rows)


def dense(
    planes: torch.Tensor,
    affine: torch.Tensor,
    widths: torch.Tensor,
    bits: torch.Tensor,
    rows: int,
    columns: int,
    group: int,
    grid: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weight [N, K] at the width ``bits``, reading the planes of that width."""
    out = torch.empty(rows, columns, dtype=dtype, device=planes.device)
    all_rows, all_columns = padded(rows, columns)
    options = _options(planes, bits, rows, columns, group=group, grid=grid)
    gpu_kernels.dense_kernel[all_rows // ROWS, all_columns // INPUTS](
        planes, affine, widths, bits, out,
        rows, columns, all_columns, all_rows, columns // group, group // PLACE_INPUTS, **options,
    )  # fmt: skip
    return out


def _multiply(
    x_MK: torch.Tensor,
    planes: torch.Tensor,
    affine: torch.Tensor,
    widths: torch.Tensor,
    bits: torch.Tensor,
    y: torch.Tensor,
    *,
    group: int,
    grid: str,
    scaled: bool,
) -> None:
    """Write the product into y [M, N]."""
    (tokens, columns), rows, device = x_MK.shape, y.shape[1], x_MK.device
    all_rows, all_columns = padded(rows, columns)
    plan = schedule(
        all_rows, all_columns, tokens, scaled=scaled, by_rows=bits.numel() > 1, processors=_processors(device)
    )
    tiles = -(-tokens // plan.tokens)
    all_tokens = tiles * plan.tokens
    inputs = torch.empty(all_tokens, all_columns, dtype=torch.int8 if scaled else x_MK.dtype, device=device)
    sums = torch.empty(all_columns // BLOCK, SUMS, all_tokens, dtype=torch.float32, device=device)
    scales = torch.empty(all_columns // BLOCK, all_tokens, dtype=torch.float32, device=device) if scaled else sums
    gpu_kernels.prepare_kernel[all_tokens, all_columns // BLOCK](
        x_MK, inputs, scales, sums, tokens, columns, all_tokens, all_columns, SCALED=scaled, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    split = plan.splits > 1
    out = torch.empty(plan.splits, all_tokens, all_rows, dtype=torch.float32, device=device) if split else y
    gpu_kernels.linear_kernel[all_rows // plan.rows, plan.splits, tiles](
        inputs, scales, sums, planes, affine, widths, bits, out,
        tokens, rows, all_tokens, all_columns, all_rows, columns // group, group // PLACE_INPUTS, plan.blocks,
        ROWS=plan.rows, TOKENS=plan.tokens, PLACES=places_of(group, columns), SCALED=scaled, SPLIT=split,
        num_warps=plan.warps, num_stages=plan.stages, **_options(planes, bits, rows, columns, group=group, grid=grid),
    )  # fmt: skip
    if split:
        gpu_kernels.finish_kernel[tokens, -(-rows // FINISHED)](
            out, y, rows, all_tokens, all_rows, plan.splits, AT_ONCE=FINISHED, num_warps=4
        )


def _options(
    planes: torch.Tensor, bits: torch.Tensor, rows: int, columns: int, *, group: int, grid: str
) -> dict[str, Any]:
    """Return what kernels are compiled for, of a weight."""
    all_rows, all_columns = padded(rows, columns)
    return {
        "CHANNEL": group == columns,
        "COMPANDED": grid != UNIFORM,
        "RESIDENT": planes.numel() * 8 // (all_rows * all_columns),
        "BY_ROWS": bits.numel() > 1,
        "PACKED": not gpu_kernels.INTERPRETED,
        "enable_fp_fusion": True,
    }


def places_of(group: int, columns: int) -> int:
    """Return how many places of 32 inputs are added before a scale is applied: 4, 2 or 1."""
    return 4 if group == columns else next(places for places in (4, 2, 1) if group % (places * PLACE_INPUTS) == 0)


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS
