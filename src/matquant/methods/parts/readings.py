"""Numbers of training steps, which stay on the device until those of several steps are read together.

Reading a number waits until the device has done everything before it. A step that reads its losses therefore leaves a
GPU idle while Python prepares the next step. Steps only add their numbers to a list; ``read`` copies all of them at
once, and adds what processes have of a loss. Until then a step that is not finite must do no harm:
``stop_unless_finite`` sets torch's ``found_inf`` flag of the optimiser, on the device, for good and in every process,
with which the fused optimiser changes nothing.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from matquant.distributed.collect import all_true, total

EVERY = 10  # steps between two readings; on a CPU, which waits for every step anyway, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The numbers of one optimiser step, not read yet."""

    step: int  # optimiser steps done, this one included
    began_s: float  # time.perf_counter() before the step
    lr: float
    losses: Mapping[str, Sequence[torch.Tensor]]  # term -> its loss in every forward pass, of this process, 0-dim.
    gradient_norm: torch.Tensor  # of all processes, 0-dimensional


class NotFiniteError(Exception):
    """A step whose loss or gradient is not finite. term: name of the loss, "" for the gradient; part: forward pass."""

    def __init__(self, step: int, term: str, part: int) -> None:
        super().__init__(f"{term or 'gradient'} at step {step}")
        self.step, self.term, self.part = step, term, part


def steps_at_once(device: torch.device) -> int:
    """Return how many steps are read together on ``device``."""
    return 1 if device.type == "cpu" else EVERY


def stop_unless_finite(optimizer: torch.optim.Optimizer, numbers: Sequence[torch.Tensor]) -> None:
    """Make this and all later steps of a fused optimiser change nothing if one of the ``numbers`` is not finite, in
    any process."""
    finite = all_true(torch.isfinite(torch.stack([number.detach().float() for number in numbers])).all())
    found = getattr(optimizer, "found_inf", None)
    flag = (~finite).float()
    vars(optimizer)["found_inf"] = flag if found is None else torch.maximum(found, flag)


def read(
    readings: Sequence[Reading], *, steps: int, tokens: int, flops: float = 0.0, peak: float = 0.0
) -> Iterator[dict[str, Any]]:
    """Yield the log records of steps in order, with one copy from the device; losses are those of all processes.

    steps: of the run; tokens, flops: of a step. peak: the FLOP/s of all devices; records then have "mfu", the model
    FLOPs' share of it. Raises NotFiniteError at the first step that is not finite, in every process.
    """
    every = (itertools.chain.from_iterable(reading.losses.values()) for reading in readings)
    own = torch.stack([loss.float() for loss in itertools.chain.from_iterable(every)])
    norms = torch.stack([reading.gradient_norm.float() for reading in readings])
    values = torch.cat([total(own), norms]).tolist()
    speed = len(readings) / (time.perf_counter() - readings[0].began_s)
    losses_left = iter(values)
    for reading, norm in zip(readings, values[-len(readings) :], strict=True):
        found = {name: [next(losses_left) for _ in losses] for name, losses in reading.losses.items()}
        for part in range(max(map(len, found.values()))):
            for name, losses in found.items():
                if not math.isfinite(losses[part]):
                    raise NotFiniteError(reading.step, name, part)
        if not math.isfinite(norm):
            raise NotFiniteError(reading.step, "", 0)
        yield {
            "step": reading.step,
            "steps": steps,
            "loss": {name: _mean(losses) for name, losses in found.items()},
            "lr": reading.lr,
            "gradient_norm": norm,
            "tok_s": round(tokens * speed, 1),
            **({"flop_s": flops * speed} if flops else {}),
            **({"mfu": round(flops * speed / peak, 4)} if flops and peak else {}),
        }


def read_losses(steps: Sequence[Mapping[int, torch.Tensor]]) -> list[dict[int, float]]:
    """Return the losses of steps by width, added over all processes, with one copy from the device."""
    values = iter(total(torch.stack([loss for losses in steps for loss in losses.values()])).tolist())
    return [{bits: next(values) for bits in losses} for losses in steps]


def _mean(losses: Sequence[float]) -> float:
    total = 0.0
    for loss in losses:
        total += loss / len(losses)
    return total
