"""What a method is given: one record for all methods, so that a new one is a file and a row in METHODS."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from matquant.models import Model, View
from matquant.spec import Spec
from matquant.train.fake import Grid
from matquant.train.objective import Width

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A float model and what is to be made of it.

    source: where the model came from. views: the linears to quantise, by path. stream: token ids, for methods with
    data. options: the method's own settings. work: a folder that outlives an interruption; resume: go on from what is
    in it. report: called with each log record.
    """

    source: str
    model: Model
    views: Mapping[str, View]
    grid: Grid
    spec: Spec
    objective: tuple[Width, ...]
    work: Path
    resume: bool = False
    stream: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    options: Mapping[str, Any] = field(default_factory=dict)
    report: Report = lambda record: None
