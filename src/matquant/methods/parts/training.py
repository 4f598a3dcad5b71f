"""The state of quantisation-aware training, its optimiser, and the file from which an interrupted run continues.

A State holds the float masters of all weights, separate masters of narrower widths if any, learned clips, scales and
zero-points, and the unquantised parameters if they are trained too. ``start`` makes it, ``make_optimizer`` returns
AdamW for it, ``save`` writes both as safetensors, atomically, and ``restore`` reads them back if the run is the same.
Shapes: weights [N, K] of N out features and K in features.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from matquant.core.nest import MASTER_BITS
from matquant.core.tensor import NestedTensor
from matquant.format.side_files import LOG
from matquant.hf_torch import Model
from matquant.hf_torch.views import View, local
from matquant.methods.parts.fake import Grid, Learned, start_learning
from matquant.methods.parts.sealed import open_sealed, save_sealed
from matquant.options.qat import Schedule
from matquant.system import ranks
from matquant.system.errors import InputError
from matquant.system.files import json_text, write_atomically
from matquant.system.interrupted import check_same_run

STATE = "state.safetensors"


@dataclass(kw_only=True)
class State:
    """The tensors being trained, and the number of steps done. Of several processes each holds its rows of them."""

    masters: dict[str, torch.Tensor]  # path -> float weight [N, K] for all widths, or for the widest
    coarse: dict[str, dict[int, torch.Tensor]]  # path -> width -> float weight of a narrower width
    learned: dict[str, Learned]  # path -> clips, scales and zero-points
    rest: dict[str, torch.Tensor]  # parameter name -> unquantised parameter, if it is trained
    step: int = 0  # optimiser steps done

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every trained tensor under a unique name."""
        yield from ((f"{path}/weight", tensor) for path, tensor in self.masters.items())
        for path, masters in self.coarse.items():
            yield from ((f"{path}/{bits}/weight", tensor) for bits, tensor in masters.items())
        yield from ((f"{name}/rest", tensor) for name, tensor in self.rest.items())
        yield from self.named_learned()

    def named_learned(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the learned clips, scales and zero-points."""
        for path, learned in self.learned.items():
            if learned.clip is not None:
                yield f"{path}/clip", learned.clip
            for bits, (reach, centre) in learned.affines.items():
                yield f"{path}/{bits}/reach", reach
                if centre is not None:
                    yield f"{path}/{bits}/centre", centre


def start(
    model: Model,
    views: Mapping[str, View],
    grid: Grid,
    schedule: Schedule,
    *,
    trained: Sequence[int],
    first: Mapping[str, NestedTensor] | None = None,
) -> State:
    """Return the state before step 0: float masters and other learned tensors, from the model or from ``first``."""
    parameters = dict(model.named_parameters())
    taken = {view.parameter for view in views.values()}
    first = first or {}
    masters = {
        path: view.of(local(parameters[view.parameter]).detach()).float().clone() for path, view in views.items()
    }
    masters |= {path: nested.read(grid.bits) for path, nested in first.items()}
    several = schedule.masters == "each" and MASTER_BITS in trained
    own = [bits for bits in trained if bits < MASTER_BITS] if several else []
    learned = {
        path: start_learning(
            w, grid, trained=trained, clip=bool(schedule.learn_clip), nested=first.get(path), name=path
        )
        for path, w in masters.items()
    }
    if schedule.freeze:  # the grid is fixed, even if its weights move
        learned = {path: dataclasses.replace(tensors, limit=math.inf) for path, tensors in learned.items()}
    return State(
        masters=masters,
        coarse={path: {bits: weight.clone() for bits in own} for path, weight in masters.items()},
        learned=learned,
        rest={name: local(p) for name, p in parameters.items() if name not in taken} if schedule.train_rest else {},
    )


def make_optimizer(state: State, schedule: Schedule) -> torch.optim.Optimizer:
    """Return AdamW over everything trained; clips, scales and zero-points form a separate group without decay."""
    learned = [tensor for _, tensor in state.named_learned()]
    by_width: dict[int, list[torch.Tensor]] = {MASTER_BITS: [*state.masters.values(), *state.rest.values()]}
    for masters in state.coarse.values():
        for bits, tensor in masters.items():
            by_width.setdefault(bits, []).append(tensor)
    for tensor in (*learned, *itertools.chain.from_iterable(by_width.values())):
        tensor.requires_grad_(True)
    narrowest = min(by_width)
    groups = [
        {
            "params": tensors,
            "factor": schedule.wide_lr ** ((bits - narrowest) / max(1, MASTER_BITS - narrowest)),
            "weight_decay": schedule.weight_decay,
        }
        for bits, tensors in by_width.items()
    ]
    groups += [{"params": learned, "factor": schedule.affine_lr, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=schedule.lr or 0.0, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, schedule: Schedule) -> float:
    """Return the learning rate: linear warm-up to ``lr``, then cosine to 0 (App. B)."""
    peak, warmup, steps = schedule.lr or 0.0, schedule.warmup or 0, schedule.steps
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return peak * (1 + math.cos(math.pi * done)) / 2


def save(state: State, optimizer: torch.optim.Optimizer, work: Path, mark: Mapping[str, Any]) -> None:
    """Write everything the next step depends on, atomically."""
    tensors = {name: tensor.detach() for name, tensor in state.named()}
    for name, tensor in state.named():
        for key, value in optimizer.state[tensor].items():
            tensors[f"{name}//{key}"] = value
    save_sealed(work / STATE, tensors, {"step": str(state.step), "fingerprint": json_text(mark)})


def restore(state: State, optimizer: torch.optim.Optimizer, work: Path, mark: Mapping[str, Any]) -> None:
    """Continue from a saved state; InputError naming the first setting that differs from the run that wrote it."""
    with open_sealed(work / STATE, remedy="use --overwrite to start again") as (file, metadata):
        check_same_run(json.loads(metadata["fingerprint"]), mark)
        state.step = int(metadata["step"])
        names = set(file.keys())
        for name, tensor in state.named():
            with torch.no_grad():
                tensor.copy_(file.get_tensor(name))
            moments = [key for key in names if key.startswith(f"{name}//")]
            optimizer.state[tensor] = {
                key.rpartition("//")[2]: file.get_tensor(key).to(tensor.device) for key in moments
            }


def open_log(work: Path) -> TextIO:
    """Open the log of the training to append to it; of several processes the first one's is kept."""
    if not ranks.leads():
        return Path(os.devnull).open("a")
    work.mkdir(parents=True, exist_ok=True)
    return (work / LOG).open("a")


def trim_log(log: Path, step: int) -> None:
    """Drop the records of steps that will be repeated; InputError for a damaged log."""
    if not log.is_file():
        return
    lines = [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        kept = [line for line in lines if json.loads(line)["step"] <= step]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{log} is damaged; delete it to continue without its records") from None
    write_atomically(log, b"".join(kept))
