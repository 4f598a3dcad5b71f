"""What a step of joint training sees: its losses, each with a plan of widths, and this process's part of the batch."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from matquant.distributed.collect import own_part
from matquant.hf.text import batch
from matquant.options.objective import Width
from matquant.options.qat import Schedule

Term = tuple[str, Width, dict[str, int]]  # a loss of a step: its name, definition and plan


def own_tokens(windows: np.ndarray, schedule: Schedule, *, index: int, device: torch.device) -> torch.Tensor:
    """Return this process's sequences of batch ``index``, int64 [B, T + 1], on ``device``, without waiting for it."""
    drawn = batch(windows, index, size=schedule.batch_size, seed=schedule.seed)
    rows = torch.from_numpy(drawn[own_part(len(drawn))])
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def make_terms(paths: Sequence[str], objective: Sequence[Width], schedule: Schedule, *, index: int) -> list[Term]:
    """Return the losses of a batch: their names, definitions and plans {path: bits}. paths: of all processes."""
    terms = [(str(width.bits), width, dict.fromkeys(paths, width.bits)) for width in objective]
    if schedule.mix:
        plan = draw_mix(paths, [width.bits for width in objective], index=index, seed=schedule.seed)
        terms.append(("mixed", dataclasses.replace(objective[-1], weight=schedule.mix), plan))
    return terms


def draw_mix(paths: Sequence[str], widths: Sequence[int], *, index: int, seed: int) -> dict[str, int]:
    """Return the plan of a mixed loss: two neighbouring ``widths`` (descending), the wider one from a random layer on.

    The plan depends only on the seed and the index of the batch. paths: at least two, in the order of the model.
    """
    draw = np.random.default_rng([seed, index, 1])  # independent of the batches' random stream
    wider = int(draw.integers(len(widths) - 1))
    narrow = set(paths[: int(draw.integers(1, len(paths)))])
    return {path: widths[wider + (path in narrow)] for path in paths}
