"""One export: a checkpoint, a width per path, and the container of each path in a format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from matquant.core.dtypes import FLOATS
from matquant.core.experts import Experts, Joined
from matquant.core.grid import decode
from matquant.core.tensor import NestedTensor
from matquant.export.containers import Container, Encoded, Misfit, choose, encode, read_affine
from matquant.format.read import Checkpoint
from matquant.format.shards import Part, Report, Slot, as_stored

# runs a directory that transformers reads; DIR is the export
PIPELINE = (
    "python -c \"from transformers import pipeline; print(pipeline('text-generation', 'DIR')('Once upon a time'))\""
)
DENSE = "dense"  # the name of the storage of paths without a container


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """A format: a row of FORMATS. Its functions get the checkpoint's paths and tensor names."""

    # the tools that read it, for people
    engines: str
    # commands that run the export, for the model card; DIR or FILE stands for it
    run: str = ""
    # writes the directory, or the one file whose name ends in ``suffix``
    write: "Callable[[Job, Path, Report], None]"
    # the containers for a weight, smallest first; none: the weight becomes dense
    containers: Callable[[Checkpoint, str], Sequence[Container]] = lambda checkpoint, path: ()
    # (checkpoint, path, bits, zero_point) -> container or misfits, for formats that do not hold slices
    choose: Callable[[Checkpoint, str, int, str], Container | list[Misfit]] | None = None
    # (tensor, bits, container, zero_point) -> the integers and scales of the container
    encode: Callable[[NestedTensor, int, Container, str], Encoded] = encode
    # (name in the format, container, shape, groups) -> the stored tensors of one weight
    slots: Callable[[str, Container, tuple[int, int], int], tuple[Slot, ...]] = lambda *what: ()
    # the arrays of ``slots``
    tensors: Callable[[Container, Encoded], Sequence[np.ndarray]] = lambda container, encoded: ()
    # supported model types of config.json; None: all
    families: tuple[str, ...] | None = None
    # file name suffix; "": the format is a directory
    suffix: str = ""
    # (checkpoint, plan) -> whether a quantised embedding and head stay quantised; otherwise they become dense
    holds_ends: Callable[[Checkpoint, Mapping[str, int]], bool] = lambda checkpoint, plan: False
    # the format's name of a tensor or path
    name: Callable[[Checkpoint, str], str] = lambda checkpoint, name: name
    # the format's order of a weight's out features; None: unchanged
    rows: Callable[[Checkpoint, str], np.ndarray | None] = lambda checkpoint, path: None
    # makes the part of a tensor that is not quantised
    plain: "Callable[[Job, str], Part]" = lambda job, name: as_stored(job.checkpoint, name)
    # dtype of weights that no container holds; None: the model's
    dense: str | None = None
    # whether --dtype applies to scales too
    typed: bool = False
    # whether it holds experts that the model's own files keep in one tensor
    holds_experts: Callable[[Experts], bool] = lambda experts: False
    # raises InputError for containers that do not work together
    check_plan: "Callable[[Job], None]" = lambda job: None
    # what some engines do not read together, for people
    plan_notices: "Callable[[Job], Sequence[str]]" = lambda job: ()
    # raises InputError if the engine would compute another model than the checkpoint; returns notices
    check: Callable[[Checkpoint], Sequence[str]] = lambda checkpoint: ()

    def container(
        self, checkpoint: Checkpoint, path: str, bits: int, zero_point: str
    ) -> Container | list[Misfit] | None:
        """Return the container of a weight's slice, None if it becomes dense, or why no container fits."""
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

    # the checkpoint
    checkpoint: Checkpoint
    # the format
    exporter: Exporter
    # path -> bits
    plan: Mapping[str, int]
    # path -> container; None where the weight becomes dense, in ``dtype``
    chosen: Mapping[str, Container | None]
    # EXACT, or MIDRANGE to move zero-points to mid-range (containers.read_affine)
    zero_point: str
    # dtype of dense weights, as safetensors names it
    dtype: str
    # the dtype given by the user; None: the format decides
    asked: str | None = None
    # dense weights of experts that the model's own files keep in one tensor become one tensor each
    split_experts: bool = False
    # facts for the model card, including "format"
    about: Mapping[str, Any] = field(default_factory=dict)

    def held(self) -> dict[str, Container]:
        """Return the containers of the paths that have one."""
        return {path: container for path, container in self.chosen.items() if container is not None}

    def kinds(self) -> dict[str, str]:
        """Return the name of every path's container."""
        return {path: container.name if container else DENSE for path, container in self.chosen.items()}

    def parts(self) -> list[Part]:
        """Return all tensors of the export: the quantised weights, then the others."""
        joined = {} if self.split_experts or self.held() else self.checkpoint.joined()
        inside = {path for tensor in joined.values() for path in tensor.places}
        return [
            *(self.weight(path) for path in self.plan if path not in inside),
            *(self._joined(name, tensor) for name, tensor in joined.items()),
            *(self.exporter.plain(self, name) for name in self.checkpoint.plain_names()),
        ]

    def _joined(self, name: str, tensor: Joined) -> Part:
        """Return the dense weights of all experts as one tensor of the model's own files."""

        def make() -> Sequence[np.ndarray]:
            whole = np.empty(tensor.shape, FLOATS[self.dtype])
            for path, (shape, stride, offset) in tensor.places.items():
                bytes_apart = [step * whole.itemsize for step in stride]
                as_strided(whole.reshape(-1)[offset:], shape, bytes_apart)[...] = _dense(self, path, None)
            return [whole]

        return Part((Slot(self.exporter.name(self.checkpoint, name), self.dtype, tensor.shape),), make)

    def weight(self, path: str) -> Part:
        """Return the tensors of one quantised weight."""
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
        """Return the bits per quantised weight, all overhead and weights that stay dense included.

        An embedding and head that the format does not quantise are left out.
        """
        plain = {path for path in self.checkpoint.ends if self.chosen[path] is None}
        paths = [path for path in self.plan if path not in plain]
        weights = sum(rows * columns for rows, columns in (self.checkpoint.shapes[path] for path in paths))
        return 8 * sum(self.weight(path).bytes for path in paths) / weights


def _dense(job: Job, path: str, rows: np.ndarray | None) -> np.ndarray:
    tensor, bits = job.checkpoint.nested(path, mapped=True), job.plan[path]
    scale, zero = read_affine(tensor, bits, zero_point=job.zero_point)
    weight: np.ndarray = decode(tensor.positions(bits), scale, zero).astype(FLOATS[job.dtype])
    return weight if rows is None else weight[rows]
