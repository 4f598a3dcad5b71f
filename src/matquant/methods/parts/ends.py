"""Quantise embedding and head, at the end of every method, by rounding to nearest.

A token reads one row of the embedding and every row of the head, whose vocabulary is large: in a small model the head
is most of what a narrow width reads. Rounded on the grid of the other weights with a per-width scale, int8
adds 0.003 nats per token and int6 0.010, but int4 0.18 (SmolLM2-135M, groups of 64); so reading stops at
``Spec.head_bits`` unless a plan asks for less. Tied embedding and head share codes.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from matquant.core.tensor import NestedTensor
from matquant.methods.parts.fake import Grid, nest
from matquant.methods.parts.job import Job

ROWS = 8192  # rows encoded at once: bounds memory for any vocabulary


def nest_ends(job: Job, read: Callable[[str], torch.Tensor] | None) -> Iterator[tuple[str, NestedTensor]]:
    """Yield path and nested tensor of each of ``job.ends``. read: reads a parameter by name; None: take the model's."""
    parameters = dict(job.model.named_parameters()) if read is None else {}
    for path, view in job.ends.items():
        weight = parameters[view.parameter].detach() if read is None else read(view.parameter)
        job.report({"notice": f"quantising {path}, {view.shape[0]:,} x {view.shape[1]:,}"})
        yield path, nest_in_parts(view.of(weight.contiguous()), job.grid, name=path)


def nest_in_parts(weight_NK: torch.Tensor, grid: Grid, *, name: str) -> NestedTensor:
    """Return ``nest`` of a weight without making float32 copies of more than ROWS rows: rows do not interact."""
    parts = [nest(rows.float(), grid, name=name) for rows in torch.split(weight_NK, ROWS)]
    first = parts[0]
    return dataclasses.replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat([part.zero for part in parts]),
        slices={
            bits: (torch.cat([part.slices[bits][0] for part in parts]), torch.cat([p.slices[bits][1] for p in parts]))
            for bits in first.slices
        },
    )
