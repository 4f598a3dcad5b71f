"""The losses of an objective (MatQuant Eq. 7); options/objective.py parses its notation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from matquant.distributed.collect import total
from matquant.options.objective import FLOAT, Width, parse_objective

__all__ = ["FLOAT", "Width", "hidden_loss", "parse_objective", "width_loss"]


# Logits read at once: 4 MB in float32 stay in a CPU's caches; a GPU has work enough with 256 MB.
PIECE = {"cpu": 2**20}
LARGE_PIECE = 2**26


def width_loss(
    logits: torch.Tensor, targets: torch.Tensor, teacher_logits: Sequence[torch.Tensor], *, truth: bool
) -> torch.Tensor:
    """Return the loss of one width: the mean of its cross-entropy (if ``truth``) and its KL to each teacher, nats per
    token, in float32.

    logits, teacher_logits: [..., vocabulary]; targets: token ids [...]. The gradient is computed with the loss, piece
    by piece, so that memory holds one more tensor like ``logits`` and no probabilities: 2.6 times as fast as autograd
    on a CPU.
    """
    rows = logits.flatten(0, -2)
    teachers = [teacher.detach().flatten(0, -2) for teacher in teacher_logits]
    loss: torch.Tensor = _Loss.apply(rows, targets.flatten() if truth else None, *teachers)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    """``width_loss`` of logits [T, V], for target ids [T] or None and teachers' logits [T, V]."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, targets_T: torch.Tensor | None, *teachers_TV: torch.Tensor
    ) -> torch.Tensor:
        tokens, vocabulary = logits_TV.shape
        piece = max(1, PIECE.get(logits_TV.device.type, LARGE_PIECE) // vocabulary)
        parts = len(teachers_TV) + (targets_T is not None)
        gradient_TV = torch.empty_like(logits_TV) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), device=logits_TV.device)
        for start in range(0, tokens, piece):
            rows = slice(start, start + piece)
            log_probability = functional.log_softmax(logits_TV[rows].float(), dim=-1)
            aims = torch.zeros_like(log_probability)  # summed over the parts: the probabilities asked for
            if targets_T is not None:
                chosen = targets_T[rows, None]
                loss -= log_probability.gather(1, chosen).sum()
                aims.scatter_(1, chosen, 1.0)
            for teacher in teachers_TV:
                target = functional.log_softmax(teacher[rows].float(), dim=-1)
                probability = target.exp()
                loss += torch.linalg.vecdot(probability, target.sub_(log_probability)).sum()
                aims += probability
            if gradient_TV is not None:
                gradient_TV[rows] = log_probability.exp_().mul_(parts).sub_(aims).div_(parts * tokens)
        ctx.gradient_TV = gradient_TV
        return loss / (parts * tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        return ctx.gradient_TV * gradient, *[None] * (len(ctx.needs_input_grad) - 1)


def hidden_loss(outputs: Sequence[torch.Tensor], aims: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean over layers of ||h - h_float||^2 / ||h_float||^2, norms over all tokens (hidden-state
    distillation).

    outputs, aims: the decoder layers' outputs, [batch, tokens, hidden], of the student and of the float model. Of
    several processes each returns its part of the sum.
    """
    targets = [aim.detach().float() for aim in aims]
    powers = total(torch.stack([target.square().sum() for target in targets]))
    losses = []
    for output, target, power in zip(outputs, targets, powers, strict=True):
        losses.append((output.float() - target).square().sum() / power)
    return torch.stack(losses).mean()
