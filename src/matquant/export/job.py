"""What is exported: a checkpoint, a width per path, and the container that each path gets in a format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from matquant.checkpoint import Checkpoint
from matquant.export.containers import DTYPES, Container, Encoded, Fit, encode, fit, read_affine
from matquant.export.stream import Part, Report, Slot
from matquant.grid import decode
from matquant.nest import slice_codes


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """A format. Its functions are given the checkpoint and a path or tensor name as the checkpoint has it.

    engines: what reads it. write: writes the directory, or the one file whose name ends in ``suffix``. containers: what
    may hold a weight, smallest first; none: it becomes dense. slots, tensors: the stored tensors of one weight in a
    container, named after the path in the format, and their arrays. families: model types of config.json that work,
    None: all. name: what a tensor or path is called there. rows: the order of a weight's out features there, None: as
    here. plain: a tensor that is not quantised. dense: dtype of the weights no container can hold, None: the model's.
    typed: a dtype that is asked for is that of scales too. check: InputError for containers that do not go together.
    """

    engines: str
    write: "Callable[[Job, Path, Report], None]"
    containers: Callable[[Checkpoint, str], Sequence[Container]] = lambda checkpoint, path: ()
    slots: Callable[[str, Container, tuple[int, int], int], tuple[Slot, ...]] = lambda *what: ()
    tensors: Callable[[Container, Encoded], Sequence[np.ndarray]] = lambda container, encoded: ()
    families: tuple[str, ...] | None = None
    suffix: str = ""
    name: Callable[[Checkpoint, str], str] = lambda checkpoint, name: name
    rows: Callable[[Checkpoint, str], np.ndarray | None] = lambda checkpoint, path: None
    plain: "Callable[[Job, str], Part] | None" = None
    dense: str | None = None
    typed: bool = False
    check: "Callable[[Job], None]" = lambda job: None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export. plan: path -> bits. chosen: path -> container, None where the weight becomes dense, in ``dtype``.

    zeros: EXACT, or CENTRE where zeros are moved to the middle of the codes (``containers.read_affine``). about: facts
    for the model card.
    """

    checkpoint: Checkpoint
    exporter: Exporter
    plan: Mapping[str, int]
    chosen: Mapping[str, Container | None]
    zeros: str
    dtype: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def parts(self) -> list[Part]:
        """All tensors of the export: the quantised weights, then the others."""
        plain = self.exporter.plain or _as_stored
        return [self.weight(path) for path in self.plan] + [plain(self, name) for name in self.checkpoint.plain_names()]

    def weight(self, path: str) -> Part:
        """The tensors of one quantised weight."""
        shape, container = self.checkpoint.shapes[path], self.chosen[path]
        rows = self.exporter.rows(self.checkpoint, path)
        if container is None:
            slot = Slot(self.exporter.name(self.checkpoint, f"{path}.weight"), self.dtype, shape)
            return Part((slot,), lambda: [_dense(self, path, rows)])
        groups = shape[1] // (self.checkpoint.spec.group_size or shape[1])
        slots = self.exporter.slots(self.exporter.name(self.checkpoint, path), container, shape, groups)
        return Part(slots, lambda: self.exporter.tensors(container, _encoded(self, path, container, rows)))

    def bits_per_weight(self) -> float:
        """Bytes of the quantised weights with scales and all, dense ones among them, in bits per weight."""
        weights = sum(rows * columns for rows, columns in (self.checkpoint.shapes[path] for path in self.plan))
        return 8 * sum(self.weight(path).bytes for path in self.plan) / weights


def _encoded(job: Job, path: str, container: Container, rows: np.ndarray | None) -> Encoded:
    tensor = job.checkpoint.nested(path, mapped=True)
    found = fit(container, tensor, job.plan[path], zeros=job.zeros)
    assert isinstance(found, Fit)  # it was when the container was chosen
    return encode(tensor, job.plan[path], found).reordered(rows)


def _dense(job: Job, path: str, rows: np.ndarray | None) -> np.ndarray:
    tensor, bits = job.checkpoint.nested(path, mapped=True), job.plan[path]
    codes = slice_codes(tensor.codes, bits, rule=tensor.rule)
    weight: np.ndarray = decode(codes, *read_affine(tensor, bits, zeros=job.zeros)).astype(DTYPES[job.dtype])
    return weight if rows is None else weight[rows]


def _as_stored(job: Job, name: str) -> Part:
    slot = Slot(name, job.checkpoint.stored_dtype(name), tuple(job.checkpoint.stored_shape(name)))
    return Part((slot,), lambda: [job.checkpoint.array(name)])
