"""What is exported: a checkpoint, a width per path, and the container that each path gets in a format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.dtypes import FLOATS
from matquant.core.grid import decode
from matquant.core.tensor import NestedTensor
from matquant.export.containers import Container, Encoded, Misfit, choose, encode, read_affine
from matquant.format.read import Checkpoint
from matquant.format.shards import Part, Report, Slot

DENSE = "dense"  # what a path is stored in that has no container


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """A format: a row of FORMATS. Its functions are given paths and tensor names as the checkpoint has them."""

    # what reads it, for people
    engines: str
    # writes the directory, or the one file whose name ends in ``suffix``
    write: "Callable[[Job, Path, Report], None]"
    # what may hold a weight, smallest first; none: the weight becomes dense
    containers: Callable[[Checkpoint, str], Sequence[Container]] = lambda checkpoint, path: ()
    # (checkpoint, path, bits, zeros) -> container or why there is none, where it is not slices that are held
    choose: Callable[[Checkpoint, str, int, str], Container | list[Misfit]] | None = None
    # (tensor, bits, container, zeros) -> the integers and scales that the container holds
    encode: Callable[[NestedTensor, int, Container, str], Encoded] = encode
    # (name in the format, container, shape, groups) -> the stored tensors of one weight
    slots: Callable[[str, Container, tuple[int, int], int], tuple[Slot, ...]] = lambda *what: ()
    # the arrays of ``slots``
    tensors: Callable[[Container, Encoded], Sequence[np.ndarray]] = lambda container, encoded: ()
    # model types of config.json that work; None: all
    families: tuple[str, ...] | None = None
    # how the name of its file ends; "": it is a directory
    suffix: str = ""
    # what a tensor or path is called there
    name: Callable[[Checkpoint, str], str] = lambda checkpoint, name: name
    # the order of a weight's out features there; None: as here
    rows: Callable[[Checkpoint, str], np.ndarray | None] = lambda checkpoint, path: None
    # a tensor that is not quantised
    plain: "Callable[[Job, str], Part]" = lambda job, name: as_stored(job.checkpoint, name)
    # dtype of the weights that no container can hold; None: the model's
    dense: str | None = None
    # whether a dtype that is asked for is that of scales too
    typed: bool = False
    # InputError for containers that do not go together
    check_plan: "Callable[[Job], None]" = lambda job: None
    # InputError if the engine would compute another model than the checkpoint, else what users should know
    check: Callable[[Checkpoint], Sequence[str]] = lambda checkpoint: ()

    def container(
        self, checkpoint: Checkpoint, path: str, bits: int, zero_point: str
    ) -> Container | list[Misfit] | None:
        """What holds the slice of a weight, None if it becomes dense, or why nothing does."""
        if self.choose is not None:
            return self.choose(checkpoint, path, bits, zero_point)
        candidates = self.containers(checkpoint, path)
        return (
            choose(candidates, checkpoint.nested(path, mapped=True), bits, zero_point=zero_point)
            if candidates
            else None
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export."""

    # what is exported
    checkpoint: Checkpoint
    # to which format
    exporter: Exporter
    # path -> bits
    plan: Mapping[str, int]
    # path -> container; None where the weight becomes dense, in ``dtype``
    chosen: Mapping[str, Container | None]
    # EXACT, or MIDRANGE where zero-points are moved to the middle of the codes (containers.read_affine)
    zero_point: str
    # of dense weights, as safetensors names it
    dtype: str
    # the dtype that a user asked for; None: the format decides
    asked: str | None = None
    # facts for the model card, "format" among them
    about: Mapping[str, Any] = field(default_factory=dict)

    def held(self) -> dict[str, Container]:
        """The containers of the paths that have one."""
        return {path: container for path, container in self.chosen.items() if container is not None}

    def kinds(self) -> dict[str, str]:
        """The name of what every path is stored in."""
        return {path: container.name if container else DENSE for path, container in self.chosen.items()}

    def parts(self) -> list[Part]:
        """All tensors of the export: the quantised weights, then the others."""
        return [*map(self.weight, self.plan), *(self.exporter.plain(self, n) for n in self.checkpoint.plain_names())]

    def weight(self, path: str) -> Part:
        """The tensors of one quantised weight."""
        shape, container = self.checkpoint.shapes[path], self.chosen[path]
        rows = self.exporter.rows(self.checkpoint, path)
        if container is None:
            slot = Slot(self.exporter.name(self.checkpoint, f"{path}.weight"), self.dtype, shape)
            return Part((slot,), lambda: [_dense(self, path, rows)])
        groups = shape[1] // (self.checkpoint.spec.group_size or shape[1])
        slots = self.exporter.slots(self.exporter.name(self.checkpoint, path), container, shape, groups)

        def make() -> Sequence[np.ndarray]:
            tensor = self.checkpoint.nested(path, mapped=True)
            encoded = self.exporter.encode(tensor, self.plan[path], container, self.zero_point)
            return self.exporter.tensors(container, encoded.reordered(rows))

        return Part(slots, make)

    def bits_per_weight(self) -> float:
        """Bytes of the quantised weights with scales and all, dense ones among them, in bits per weight."""
        weights = sum(rows * columns for rows, columns in (self.checkpoint.shapes[path] for path in self.plan))
        return 8 * sum(self.weight(path).bytes for path in self.plan) / weights


def _dense(job: Job, path: str, rows: np.ndarray | None) -> np.ndarray:
    tensor, bits = job.checkpoint.nested(path, mapped=True), job.plan[path]
    scale, zero = read_affine(tensor, bits, zero_point=job.zero_point)
    weight: np.ndarray = decode(tensor.positions(bits), scale, zero).astype(FLOATS[job.dtype])
    return weight if rows is None else weight[rows]


def as_stored(checkpoint: Checkpoint, name: str) -> Part:
    """A tensor of the checkpoint as it is."""
    slot = Slot(name, checkpoint.stored_dtype(name), checkpoint.stored_shape(name))
    return Part((slot,), lambda: [checkpoint.array(name)])
