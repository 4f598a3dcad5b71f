"""What a method is given: one record for all methods, so that a new one is a file and a row in METHODS."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matquant.errors import InputError
from matquant.models import Model, View
from matquant.spec import Spec
from matquant.tensor import NestedTensor
from matquant.train.fake import Grid
from matquant.train.objective import Width

Report = Callable[[dict[str, Any]], None]  # of log records, and of {"notice": text} for people
LOG = "training.jsonl"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A float model and what is to be made of it.

    source: where the model came from. model: with its numbers, or without them for methods that work block by block;
    read: its tensors by name, dtypes: as they are stored. views: the linears to quantise, by path. stream: token ids,
    for methods with data. options: the method's own settings. work: a folder that outlives an interruption; resume:
    go on from what is in it. report: called with each log record.
    """

    source: str
    model: Model
    read: Callable[[str], torch.Tensor]
    dtypes: Mapping[str, torch.dtype]
    device: torch.device
    views: Mapping[str, View]
    grid: Grid
    spec: Spec
    objective: tuple[Width, ...]
    work: Path
    resume: bool = False
    stream: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    options: Mapping[str, Any] = field(default_factory=dict)
    report: Report = lambda record: None
    first: Mapping[str, NestedTensor] = field(default_factory=dict)


def fingerprint(job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the numbers of a run depend on, as JSON has it; what is saved of a run carries it."""
    values = {
        "model": job.source,
        **job.spec.to_json(),
        **settings,
        "affine": job.grid.affine,
        "start": bool(job.first),
    }
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


def check_same_run(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """InputError naming the first setting in which an interrupted run differs from the one that would continue it."""
    for key in sorted(set(ours) | set(theirs)):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"--resume with {key}={ours.get(key)!r}, the interrupted run had {theirs.get(key)!r}; "
                "use the same settings, or --overwrite to start again"
            )
