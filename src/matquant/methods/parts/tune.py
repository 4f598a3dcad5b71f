"""Tune nested codes by gradient, one decoder layer at a time, towards the float layer's output.

    min over W_r, affines of  sum_r lambda_r || F(read_r, X_r) - F(W, X) ||^2 / (what it was before)

F is one decoder layer, X its input in the float model, X_r its input in the r-bit model, so that a layer also
compensates the errors of earlier layers. Every width has a float master (masters.py), which starts as the 8-bit read of
the codes (a dedicated baseline's master as the float weight, clamped into its bin). The codes keep their grid, per
channel or group, symmetric or not. Widths with a per-width scale and zero-point learn them as reach and centre
(fake.py).

Adam moves every tensor in units of its row: a scale or zero-point in the distance of two r-bit codes, the master of
width r in the geometric mean of that distance and the narrowest width's. Wide masters need larger steps than their own
distance, because they compensate the weights blocked in narrow bins. The learning rate falls linearly to 0, so a master
can move by at most ``lr`` times half the steps. If the weighted sum of losses did not fall, the codes stay unchanged.
lambda_r is the weight of a width (``--weights``); since each width has its master, it only weights the blocked
gradients.

Block-wise tuning of the rounding comes from AutoRound (Cheng et al. 2023), which tunes one width by signs of gradients.
Cost per step: one forward and backward of the layer per width. Memory: masters and two moments for each, by width.
Shapes: N out features, K in features, G groups.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from matquant.core.grid import encode
from matquant.core.nest import MASTER_BITS, centred_codes, slice_codes
from matquant.core.tensor import NestedTensor
from matquant.methods.parts.blocks import Block
from matquant.methods.parts.fake import (
    Grid,
    Learned,
    confine,
    keep_in_range,
    refit_slice,
    start_learning,
    stored_affine,
)
from matquant.methods.parts.job import Job
from matquant.methods.parts.layer import Layer, check_losses
from matquant.methods.parts.masters import chain, encode_masters, release_blocked
from matquant.methods.parts.readings import read_losses, steps_at_once
from matquant.methods.parts.share import sum_gradients
from matquant.options.objective import Width

BETAS, EPSILON = (0.9, 0.95), 1e-12
AFFINE_RATE = 0.2  # learning rate of scales and zero-points, relative to the masters'
FOLLOWER, LEADERS = 5, {4, 6}  # int5 is not tuned beside int4 and int6: with a sixth master short runs gain nothing
JUDGED = 16  # number of batches, or a few more, whose loss decides whether to keep tuned codes
TINY = torch.finfo(torch.float32).tiny


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weight:
    """One weight in tuning. start: its first codes, whose grid it keeps. masters: by width."""

    start: NestedTensor
    masters: dict[int, torch.Tensor]
    learned: Learned

    def nested(self) -> NestedTensor:
        """Return the masters' current nested codes."""
        codes, _ = encode_masters(self.masters, self.start)
        own = {bits: stored_affine(affine, bits) for bits, affine in self.learned.affines.items()}
        return dataclasses.replace(self.start, codes=codes, slices={**self.start.slices, **own})

    def moved(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield every tuned tensor, and its unit [N, G]."""
        step_NG = {bits: self.start.affine(bits)[0] for bits in self.masters}
        for bits, master in self.masters.items():
            yield master, (step_NG[bits] * step_NG[min(step_NG)]).sqrt()
            affine = self.learned.affines.get(bits, ())
            yield from ((tensor, AFFINE_RATE * step_NG[bits]) for tensor in affine if tensor is not None)


def tune_block(
    job: Job,
    block: Block,
    nested: Mapping[str, NestedTensor],
    *,
    steps: int,
    lr: float,
    pull: float,
    autocast: bool,
    seed: int,
) -> tuple[dict[str, NestedTensor], dict[str, Any]]:
    """Return better codes, scales and zero-points of a block's weights, and a log record: loss by width, before and
    after.

    lr: the initial learning rate, in steps of a row. Raises InputError naming the layer and the width if the loss is
    not finite.
    """
    layer = Layer(block, job.dtypes)
    targets = layer.targets(autocast=autocast)
    objective = _tuned(job.objective)
    widths = [width.bits for width in objective]
    every = max(1, len(block.share.batches) // JUDGED)

    distances = functools.partial(layer.distances, targets=targets, widths=widths, autocast=autocast, every=every)
    before = distances(nested)
    check_losses(before, block.name, "the start")
    lambdas = {width.bits: width.weight / max(before[width.bits], TINY) for width in objective}
    floats = dict(layer.weights({}))
    weights = {path: _start(floats[path], tensor, job.grid, widths) for path, tensor in nested.items()}
    adam = Adam([item for weight in weights.values() for item in weight.moved()])
    at_once, pending = steps_at_once(layer.device), list[dict[int, torch.Tensor]]()
    for step in range(steps):
        pending.append(_gradients(layer, weights, lambdas, layer.order(step, seed), targets, autocast=autocast))
        if len(pending) == at_once or step == steps - 1:
            for number, losses in enumerate(read_losses(pending), step + 2 - len(pending)):
                check_losses(losses, block.name, f"step {number} of {steps}")
            pending.clear()
        for weight in weights.values():
            release_blocked(weight.masters, weight.start, pull=pull)
        adam.step(lr * (1 - step / steps))
        for weight in weights.values():
            keep_in_range(weight.learned, weight.masters[widths[0]], weight.start)
    tuned = {path: _finish(weight, job.grid) for path, weight in weights.items()}
    after = distances(tuned)
    check_losses(after, block.name, f"the end of {steps} steps")
    better = sum(lambdas[bits] * (after[bits] - before[bits]) for bits in widths) < 0
    named = [{str(bits): loss for bits, loss in losses.items()} for losses in (after if better else before, before)]
    return tuned if better else dict(nested), {"loss": named[0], "loss_before": named[1], "tuned": steps}


def _tuned(objective: Sequence[Width]) -> list[Width]:
    """Return the widths that are tuned. int5 beside int4 and int6 gets what their masters leave, and a fitted scale."""
    follows = {width.bits for width in objective} >= LEADERS
    return [width for width in objective if not (follows and width.bits == FOLLOWER)]


def _start(weight_NK: torch.Tensor, nested: NestedTensor, grid: Grid, widths: Sequence[int]) -> _Weight:
    grid = dataclasses.replace(grid, affine="none" if grid.affine == "none" else "learned")
    master_NK = nested.read(MASTER_BITS)
    if (
        grid.bits < MASTER_BITS
    ):  # bin centres are equally far from both edges; the float weight shows which edge is near
        near = encode(weight_NK, nested.scale, nested.zero, grid=nested.grid)
        confined = dataclasses.replace(nested, codes=confine({grid.bits: nested.codes, MASTER_BITS: near})[0])
        master_NK = confined.read(MASTER_BITS)
    return _Weight(
        start=nested,
        masters={bits: master_NK.clone() for bits in widths},
        learned=start_learning(weight_NK, grid, trained=widths, clip=False, nested=nested),
    )


def _gradients(
    layer: Layer,
    weights: Mapping[str, _Weight],
    lambdas: Mapping[int, float],
    index: int,
    targets: Sequence[torch.Tensor],
    *,
    autocast: bool,
) -> dict[int, torch.Tensor]:
    """Add the gradients of one batch, over all processes, at every width to .grad; return this process's part of the
    losses, on the device."""
    nested = {path: weight.nested() for path, weight in weights.items()}
    losses = {bits: torch.zeros((), device=layer.device) for bits in lambdas}

    def backward(piece: int, part: float) -> None:
        target = targets[piece].to(layer.device)
        for bits, weight_of_loss in lambdas.items():
            reads = {path: tensor.read(bits).requires_grad_() for path, tensor in nested.items()}
            output = layer.run(layer.inputs(bits, piece), layer.assemble(reads), autocast=autocast)
            loss = (output - target).square().mean() * part / layer.power
            torch.autograd.backward(loss * weight_of_loss)
            losses[bits] += loss.detach()
            for path, weight in weights.items():
                read = reads[path]
                assert read.grad is not None
                chain(read.grad, read.detach(), nested[path], bits, master=weight.masters[bits], learned=weight.learned)

    tensors = [tensor for weight in weights.values() for tensor, _ in weight.moved()]
    sum_gradients(layer.block.share, index, tensors, backward)
    return losses


def _finish(weight: _Weight, grid: Grid) -> NestedTensor:
    """Return the tuned codes as stored; the scales of widths that were not tuned are fitted to the widest master."""
    tensor = weight.nested()
    if grid.bits < MASTER_BITS:
        codes = centred_codes(slice_codes(tensor.codes, grid.bits), grid.bits)
        return dataclasses.replace(tensor, codes=codes)
    master_NK = weight.masters[max(weight.masters)]
    others = {
        bits: refit_slice(master_NK, tensor, bits, zeros=grid.zeros)
        for bits in tensor.slices
        if bits not in weight.learned.affines
    }
    return dataclasses.replace(tensor, slices={**tensor.slices, **others})


class Adam:
    """Adam (Kingma & Ba 2015) with a unit per group of a row: a learning rate of 1 moves a weight by about its unit."""

    def __init__(self, tensors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.tensors = tensors
        self.moments = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor, _ in tensors]
        self.count = 0

    def step(self, lr: float) -> None:
        """Move every tensor against its .grad, and drop the gradient."""
        self.count += 1
        first, second = (1 - beta**self.count for beta in BETAS)
        for (tensor, unit_NG), (mean, square) in zip(self.tensors, self.moments, strict=True):
            assert tensor.grad is not None
            gradient, tensor.grad = tensor.grad, None
            mean.lerp_(gradient, 1 - BETAS[0])
            square.lerp_(gradient.square(), 1 - BETAS[1])
            move = (mean / first) / ((square / second).sqrt() + EPSILON)
            tensor -= (move.view(*unit_NG.shape, -1) * (lr * unit_NG[..., None])).view_as(tensor)
