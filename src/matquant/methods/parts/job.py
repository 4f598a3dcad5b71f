"""The input of a method: one record for all methods, so that a new method is a file and a row in METHODS."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.hf.sidefiles import local_directory
from matquant.hf_torch import Model
from matquant.hf_torch.views import View
from matquant.methods.parts.fake import Grid
from matquant.options.objective import Width
from matquant.system.interrupted import describe_files

Report = Callable[[dict[str, Any]], None]  # takes log records, and {"notice": text} for people


@dataclass(frozen=True, kw_only=True)
class Job:
    """A float model and how to quantise it.

    source: the model's origin. model: with weights, or without them for methods that work block by block and for
    several processes; read: reads its tensors by name; read_rows: reads some rows of one; dtypes: their stored dtypes.
    views: the linear layers to quantise, by path. ends: embedding and head, which no method sees. stream: token ids,
    for methods with data. options: the method's settings. work: a folder that outlives an interruption; resume:
    continue from its contents. report: called with each log record. first: tensors to start from, of several processes
    each one's rows; start_sha256: their checkpoint. files: descriptions that change with the source's files, by name.
    """

    source: str
    model: Model
    read: Callable[[str], torch.Tensor]
    read_rows: Callable[[str, slice], torch.Tensor]
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
    ends: Mapping[str, View] = field(default_factory=dict)
    first: Mapping[str, NestedTensor] = field(default_factory=dict)
    start_sha256: str = ""
    files: Mapping[str, str] = field(default_factory=dict)


def source_files(source: Path | str) -> dict[str, str]:
    """Return descriptions that change with a model's files, by name; for a hub id its commit."""
    directory = local_directory(source)
    if directory is None:
        return {}
    return describe_files(directory) if Path(source).is_dir() else {"commit": directory.name}


def fingerprint(job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that a run's numbers depend on, as JSON values; every saved file of a run carries it."""
    local = Path(job.source)
    values = {
        "model": str(local.resolve()) if local.is_dir() else job.source,
        "files": job.files,
        **job.spec.to_json(),
        **settings,
        "affine": job.grid.affine,
        "start": job.start_sha256,
    }
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result
