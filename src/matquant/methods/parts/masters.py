"""Float masters of one weight: how they become nested codes, and how gradients find their way back to them.

A width may have a master of its own, W_r. Codes are nested by clamping each wider master into the bin of the next
narrower one (fake.confine), from the narrowest on. The gradient of a width goes to its own master alone (``chain``),
but where that confinement holds a master back, to the next narrower one, times ``pull`` (``release_blocked``).
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
    """The nested codes of masters on the 8-bit grid of ``nested``, and where each was held back; see ``confine``."""
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
    """Where a narrower width's bits hold a master back, its gradient goes to that width's master, times ``pull``."""
    _, blocked = encode_masters(masters, nested)
    for bits, narrower in itertools.pairwise(sorted(masters, reverse=True)):
        gradient, below = masters[bits].grad, masters[narrower].grad
        assert gradient is not None
        assert below is not None
        held = (gradient * blocked[bits]) < 0  # the step, against the gradient, leads further out of the bin
        below.add_(torch.where(held, gradient, 0.0), alpha=pull)
        gradient.masked_fill_(held, 0.0)
