"""Float masters of one weight: combine them into nested codes, and route gradients back to them.

A width may have a separate master, W_r. Codes are nested by clamping each wider master into the bin of the next
narrower one (fake.confine), from the narrowest on. The gradient of a width goes only to its master (``chain``). Where
the clamp blocks a master, its gradient times ``pull`` goes to the next narrower one (``release_blocked``).
Shapes: N out features, K in features.
"""

import itertools
from collections.abc import Mapping

import torch

from matquant.core.grid import encode
from matquant.core.tensor import NestedTensor
from matquant.methods.parts.fake import Learned, backward, confine

Masters = Mapping[int, torch.Tensor]  # width -> float master [N, K]


def encode_masters(masters: Masters, nested: NestedTensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Return the nested codes of masters on the grid of ``nested``, and where each was blocked; see ``confine``."""
    scale, zero, grid = nested.scale, nested.zero, nested.grid
    return confine({bits: encode(master.detach(), scale, zero, grid=grid) for bits, master in masters.items()})


def chain(
    gradient_NK: torch.Tensor,
    read_NK: torch.Tensor,
    nested: NestedTensor,
    bits: int,
    *,
    master: torch.Tensor,
    learned: Learned,
) -> None:
    """Add the gradient of one width's read to .grad of its ``master`` and of ``learned``; see ``fake.backward``."""
    share = backward(gradient_NK, read_NK, nested, bits, learned)
    master.grad = share if master.grad is None else master.grad.add_(share)


def release_blocked(masters: Masters, nested: NestedTensor, *, pull: float) -> None:
    """Where a narrower width's bin blocks a master, add its gradient times ``pull`` to that width's master."""
    _, blocked = encode_masters(masters, nested)
    for bits, narrower in itertools.pairwise(sorted(masters, reverse=True)):
        gradient, below = masters[bits].grad, masters[narrower].grad
        assert gradient is not None
        assert below is not None
        held = (gradient * blocked[bits]) < 0  # a step against the gradient would move further out of the bin
        below.add_(torch.where(held, gradient, 0.0), alpha=pull)
        gradient.masked_fill_(held, 0.0)
