"""The losses of an objective (MatQuant Eq. 7); options/objective.py parses its notation."""

from collections.abc import Sequence

import torch
from torch.nn import functional

from matquant.distributed.collect import total
from matquant.options.objective import FLOAT, Width, parse_objective

__all__ = ["FLOAT", "Width", "hidden_loss", "parse_objective", "width_loss"]


def width_loss(
    logits: torch.Tensor, targets: torch.Tensor, teacher_logits: Sequence[torch.Tensor], *, truth: bool
) -> torch.Tensor:
    """Return the loss of one width: the mean of its cross-entropy (if ``truth``) and its KL to each teacher, nats per
    token.

    logits, teacher_logits: [..., vocabulary]; targets: token ids [...].
    """
    log_probability = functional.log_softmax(logits.float().flatten(0, -2), dim=-1)
    losses = [functional.nll_loss(log_probability, targets.flatten())] if truth else []
    for teacher in teacher_logits:
        target = functional.log_softmax(teacher.detach().float().flatten(0, -2), dim=-1)
        losses.append(functional.kl_div(log_probability, target, reduction="batchmean", log_target=True))
    return torch.stack(losses).mean()


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
