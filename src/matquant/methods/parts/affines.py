"""Per-width scales and zero-points of GPTQ: clipping before the pass, the refit after it.

Before the pass, each row (or group) gets the clipping ratio from CLIPS with the least summed error over widths. After
it, the scale and zero-point of each width are refitted in the norm of H, which is least squares in the outputs.
Shapes: N out features, K in features, G groups.
"""

import dataclasses
from collections.abc import Mapping

import torch

from matquant.core.grid import SMALLEST_SCALE, storable_scale
from matquant.core.tensor import Affine, NestedTensor
from matquant.methods.parts.fake import Grid, Learned, nest

CLIPS = tuple(1 - step / 10 for step in range(7))  # clipping ratios of max|w|: 1, 0.9, ..., 0.4


def clip_groups(
    weight_NK: torch.Tensor, importance_K: torch.Tensor, grid: Grid, weights: Mapping[int, float], name: str
) -> NestedTensor:
    """Round to nearest with each group's best clipping ratio from CLIPS: the least summed error over widths.

    importance_K: the Hessian's diagonal, which weights the columns. weights: width -> lambda.
    """
    groups = 1 if grid.group_size is None else weight_NK.shape[1] // grid.group_size
    largest_NG = weight_NK.reshape(len(weight_NK), groups, -1).abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny)
    tried = dataclasses.replace(grid, sliced=tuple(bits for bits in grid.sliced if bits in weights))
    best_NG = torch.full_like(largest_NG, torch.inf)
    clip_NG = largest_NG.clone()
    for clip in CLIPS:
        tensor = nest(weight_NK, tried, learned=Learned(clip=clip * largest_NG), name=name)
        cost_NG = torch.zeros_like(best_NG)
        for bits, weight in weights.items():
            error_NK = (tensor.read(bits) - weight_NK).square_() * importance_K
            cost_NG += weight * error_NK.reshape(len(weight_NK), groups, -1).sum(-1)
        clip_NG = torch.where(cost_NG < best_NG, clip * largest_NG, clip_NG)
        best_NG = torch.minimum(best_NG, cost_NG)
    return nest(weight_NK, grid, learned=Learned(clip=clip_NG), name=name)


def refit_affine(
    weight_NK: torch.Tensor,
    position_NK: torch.Tensor,
    hessian_KK: torch.Tensor,
    *,
    fallback: Affine,
    fits_zero: bool = True,
) -> Affine:
    """Fit scale and zero-point of r-bit positions, [N, G] each, as stored, in the norm of H.

    They minimise d H d^T with d = w - scale*(position - zero) over all groups of a row together; the zero-point is
    that of ``fallback`` unless ``fits_zero``. Rows that do not improve keep ``fallback``.
    """
    rows, columns = weight_NK.shape
    groups = fallback[0].shape[1]
    size = columns // groups
    hessian = hessian_KK.to(weight_NK.dtype)
    base_NG = torch.zeros_like(fallback[1]) if fits_zero else fallback[1].to(weight_NK.dtype)
    code_NGK = position_NK.to(weight_NK.dtype).reshape(rows, groups, size) - base_NG[:, :, None]
    # The regressors of a row are its codes and, for stored zero-points, ones, group by group:
    # w = sum_g scale_g code_g - offset_g one_g.
    features = 2 * groups if fits_zero else groups
    gram = weight_NK.new_empty(rows, features, features)
    right = weight_NK.new_empty(rows, features)
    for group in range(groups):
        inside = slice(group * size, (group + 1) * size)
        code_H = (code_NGK[:, group] @ hessian[inside]).reshape(rows, groups, size)
        gram[:, group, :groups] = (code_H * code_NGK).sum(-1)
        gram[:, group, groups:] = code_H.sum(-1)[:, : features - groups]
        right[:, group] = (code_H * weight_NK.reshape(rows, groups, size)).sum(-1).sum(-1)
    if fits_zero:
        ones_GK = torch.eye(groups, dtype=weight_NK.dtype, device=weight_NK.device).repeat_interleave(size, dim=1)
        ones_H = ones_GK @ hessian
        gram[:, groups:, :groups] = gram[:, :groups, groups:].transpose(1, 2)
        gram[:, groups:, groups:] = ones_H @ ones_GK.T
        right[:, groups:] = weight_NK @ ones_H.T
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-6)
    solution, failed = torch.linalg.solve_ex(gram, right)
    scale = solution[:, :groups]
    stored = storable_scale(scale.clamp(min=SMALLEST_SCALE)).to(weight_NK.dtype)
    zero = base_NG
    if fits_zero:
        mean, offset = code_NGK.mean(-1), -solution[:, groups:]
        zero = (mean - (mean * scale - offset) / stored).half().to(weight_NK.dtype)
    usable = (failed == 0)[:, None] & (scale >= SMALLEST_SCALE) & zero.isfinite()
    scale, zero = torch.where(usable, stored, fallback[0]), torch.where(usable, zero, fallback[1])
    # d H d^T is quadratic in (scale, -scale*zero), so the Gram matrix suffices to compare two candidates.
    fitted, kept = (torch.cat([s, -s * z], dim=1)[:, :features].to(gram.dtype) for s, z in ((scale, zero), fallback))
    errors = [((gram @ x[:, :, None])[:, :, 0] * x - 2 * right * x).sum(1) for x in (fitted, kept)]
    better = (errors[0] < errors[1])[:, None]
    return torch.where(better, scale, fallback[0]).float(), torch.where(better, zero, fallback[1]).float()
