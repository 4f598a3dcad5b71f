"""A weight with learned clipping (MatQuant Eq. 3), read at any width with a straight-through gradient.

    scale = (gamma*max(W) - beta*min(W)) / (2^c - 1),   zero = -beta*min(W) / scale
    codes = clamp(round(W/scale + zero), 0, 2^c - 1)

gamma and beta are clipping ratios per row or group; a symmetric grid has max = -min = max|W| and only gamma. They are
kept in (0, 1] and start at 1, without clipping: untrained, this is round-to-nearest bit for bit. (OmniQuant's code
learns the argument of a sigmoid that starts at 4, a factor of 0.982 with a fiftieth of the slope; at the paper's
learning rate of 1e-3 that factor cannot leave 0.94..0.99 in 1220 steps.)

``read`` returns the numbers of NestedTensor.read, bit for bit. Its gradient is that of

    read = scale_r * (code_r - zero_r),   code_r = clamp(W/scale + zero, 0, 2^c - 1) / 2^(c-r)  up to a constant

with the roundings of code, slice, zero-point and scale passed straight through, so that it reaches gamma and beta
through the scale, and W through the codes *and* through its maxima. The per-width scale and zero-point:

    refit     least squares to W at every step (fit_slice). Its gradient treats scale and zero-point as a fixed ratio
              of the grid's: as a constant, it would not see that a smaller step makes a smaller error (int2 perplexity
              of stories260K after 300 steps of clipping: 31.1 for the constant, 19.7 for the ratio, 20.2 for the
              exact gradient of least squares)
    learned   as refit, with scale_r times exp(stretch) and zero_r plus offset, both learned, both 0 at the start; a
              mid-range zero-point has no offset

Shapes: N out features, K in features, G groups.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from matquant.core.grid import storable_scale
from matquant.core.nest import CENTRE, MASTER_BITS, sliced_zero
from matquant.core.tensor import Affine, NestedTensor
from matquant.methods.parts.fake import Grid, encode_clipped, refit_slice

SMALLEST_FACTOR = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """The learned tensors of one weight, [N, G]."""

    gamma: torch.Tensor | None = None  # clipping ratio of max(W); None: not clipped
    beta: torch.Tensor | None = None  # clipping ratio of min(W); None: the grid is symmetric
    # width -> (stretch, offset) of its learned scale and zero-point; no offset where the zero-point is mid-range
    nudges: Mapping[int, tuple[torch.Tensor, torch.Tensor | None]] = dataclasses.field(default_factory=dict)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all learned tensors."""
        yield from (tensor for tensor in (self.gamma, self.beta) if tensor is not None)
        yield from (tensor for pair in self.nudges.values() for tensor in pair if tensor is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulated:
    """A weight in one step; all fields except ``tensor`` carry gradients."""

    tensor: NestedTensor  # the tensor as it would be stored
    position: torch.Tensor  # position of each weight on the c-bit grid, clamped, [N, K]
    scale: torch.Tensor  # of that grid, [N, G]
    zero: torch.Tensor  # its zero-point, [N, G]


def start(weight_NK: torch.Tensor, grid: Grid, *, trained: Sequence[int], clip: bool) -> Clip:
    """Return the learned tensors before the first step. Only ``trained`` widths learn a scale and zero-point."""
    groups = 1 if grid.group_size is None else weight_NK.shape[1] // grid.group_size
    shape, device = (weight_NK.shape[0], groups), weight_NK.device
    learned = [bits for bits in grid.sliced if bits in trained] if grid.affine == "learned" else []
    return Clip(
        gamma=torch.ones(shape, device=device) if clip else None,
        beta=torch.ones(shape, device=device) if clip and not grid.symmetric else None,
        nudges={
            bits: (
                torch.zeros(shape, device=device),
                None if grid.zeros == CENTRE else torch.zeros(shape, device=device),
            )
            for bits in learned
        },
    )


def keep_in_range(clip: Clip) -> None:
    """Clamp the clipping ratios into (0, 1] after an optimiser step, in place."""
    with torch.no_grad():
        for factor in (clip.gamma, clip.beta):
            if factor is not None:
                factor.clamp_(SMALLEST_FACTOR, 1.0)


def nest(weight_NK: torch.Tensor, grid: Grid, clip: Clip, *, name: str = "weight") -> NestedTensor:
    """Encode a weight on its clipped grid, with the scales and zero-points of ``grid.sliced``, as stored."""
    with torch.no_grad():
        weight_NK = weight_NK.detach()
        tensor = _encode(weight_NK, grid, clip, name)
        slices = dict(tensor.slices)
        for bits in grid.sliced if grid.affine != "none" else ():
            scale, zero = refit_slice(weight_NK, tensor, bits, zeros=grid.zeros)
            if bits in clip.nudges:
                stretch, offset = clip.nudges[bits]
                scale = storable_scale(scale * stretch.exp())
                zero = zero if offset is None else (zero + offset).half().float()
            slices[bits] = scale, zero
        return dataclasses.replace(tensor, slices=slices)


def simulate(weight_NK: torch.Tensor, grid: Grid, clip: Clip, *, name: str = "weight") -> Simulated:
    """Encode a weight once for all widths of a step; gradients go to ``weight_NK`` and ``clip``."""
    tensor = nest(weight_NK, grid, clip, name=name)
    exact_scale, exact_zero = own_grid(tensor, grid)
    top_code = 2**grid.bits - 1
    grouped = weight_NK.view(*exact_scale.shape, -1)
    gamma = 1.0 if clip.gamma is None else clip.gamma
    if grid.symmetric:
        scale, zero = gamma * grouped.abs().amax(-1) * (2 / top_code), exact_zero
    else:
        beta = 1.0 if clip.beta is None else clip.beta
        low = (beta * grouped.amin(-1)).clamp(max=0.0)
        scale = ((gamma * grouped.amax(-1)).clamp(min=0.0) - low) / top_code
        zero = straight_through(exact_zero, -low / straight_through(exact_scale, scale))
    scale = straight_through(exact_scale, scale)
    position = (grouped / scale[..., None] + zero[..., None]).clamp(0, top_code).view_as(weight_NK)
    return Simulated(tensor=tensor, position=position, scale=scale, zero=zero)


def read(simulated: Simulated, bits: int, grid: Grid, clip: Clip) -> torch.Tensor:
    """Return the ``bits``-bit weights [N, K]: the numbers of ``simulated.tensor.read(bits)``, with a gradient."""
    tensor, scale, zero = simulated.tensor, simulated.scale, simulated.zero
    step = 2 ** (grid.bits - bits)
    scale_r, zero_r = tensor.affine(bits)
    scale_r, zero_r = scale_r / scale.detach() * scale, straight_through(zero_r, zero / step)
    if bits in clip.nudges:
        stretch, offset = clip.nudges[bits]
        scale_r = scale_r * (stretch - stretch.detach()).exp()
        zero_r = zero_r if offset is None else straight_through(zero_r, zero_r + offset)
    codes = tensor.positions(bits)
    code = straight_through(codes, simulated.position / step).view(*scale.shape, -1)
    surrogate = (scale_r[..., None] * (code - zero_r[..., None])).view_as(codes)
    return straight_through(tensor.read(bits), surrogate)


def straight_through(exact: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
    """Return the numbers of ``exact`` with the gradient of ``surrogate``."""
    return exact.detach() + (surrogate - surrogate.detach())


def own_grid(tensor: NestedTensor, grid: Grid) -> Affine:
    """Return scale and zero-point [N, G] of a tensor's c-bit grid: the exact reverse of ``encode_clipped``."""
    return tensor.scale * 2 ** (MASTER_BITS - grid.bits), sliced_zero(tensor.zero, grid.bits)


def _encode(weight_NK: torch.Tensor, grid: Grid, clip: Clip, name: str) -> NestedTensor:
    """Encode on the clipped grid; a symmetric grid has no separate beta."""
    gamma = 1.0 if clip.gamma is None else clip.gamma
    return encode_clipped(weight_NK, grid, gamma=gamma, beta=gamma if clip.beta is None else clip.beta, name=name)
