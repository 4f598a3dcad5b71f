"""Quantise embedding and head: rounded to nearest, or the head by nested GPTQ with the Hessian of its inputs.

A token reads one row of the embedding and every row of the head, whose vocabulary is large: in a small model the head
is most of what a narrow width reads. Tied embedding and head share codes.

Added nats per token on SmolLM2-135M, tied, groups of 64: rounded int6 0.010 and int4 0.205, solved int6 0.007, int5
0.026 and int4 0.058 (docs/concepts.md). So reading stops at ``Spec.head_bits`` unless a plan asks for less. PLAIN was
chosen among 0 and 1 on the 6,144 most probable rows: for 0.004 more KL divergence of an int4 head, the plain error,
which is what a tied embedding sees, falls by 40 %, and that of int8 and int6 to a ninth and a quarter. The head is read
at int6 or wider, so its wide widths weigh more than those of the layers: HEAD_RATIO 3 instead of the loss weights
56, 14, 3.6, 1.9 and 1 takes the error down by 73 % at int8 and 25 % at int6, and up by 2 % at int4 and 9 % at int3 and
int2 (3,000 rows of SmolLM2, companded grid, groups of 64).
"""

from collections.abc import Callable, Collection, Iterator, Mapping

import torch

from matquant.core.tensor import NestedTensor
from matquant.distributed.nested import join_rows
from matquant.hf_torch import Model
from matquant.hf_torch.ties import head_name, tied_weights
from matquant.hf_torch.views import View
from matquant.methods.parts.fake import Grid, nest
from matquant.methods.parts.job import Job

HEAD_RATIO = 3.0  # loss weight of a width of the head, over that of a width one bit narrower
PLAIN = 1.0  # weight of the plain squared error of a head, in units of the mean diagonal of its Hessian
ROWS = 8192  # rows encoded at once: bounds memory for any vocabulary


def nest_ends(
    job: Job, read: Callable[[str], torch.Tensor] | None, *, done: Collection[str]
) -> Iterator[tuple[str, NestedTensor]]:
    """Yield path and nested tensor of each of ``job.ends`` that is not ``done``, from ``job.first`` or rounded.

    read: reads a parameter by name; None: take the model's.
    """
    parameters = dict(job.model.named_parameters()) if read is None else {}
    for path, view in job.ends.items():
        if path in done:
            continue
        if path in job.first:
            yield path, job.first[path]
            continue
        weight = parameters[view.parameter].detach() if read is None else read(view.parameter)
        job.report({"notice": f"quantising {path}, {view.shape[0]:,} x {view.shape[1]:,}"})
        yield path, nest_in_parts(view.of(weight.contiguous()), job.grid, name=path)


def head_path(model: Model, ends: Mapping[str, View]) -> str | None:
    """Return the path of the head among ``ends``, the embedding's if the two are tied; None if it is not there."""
    name = head_name(model)
    stored = tied_weights(model).get(name or "", name)
    return next((path for path, view in ends.items() if view.parameter == stored), None)


def with_plain_error(hessian_KK: torch.Tensor) -> torch.Tensor:
    """Return H + PLAIN * mean(diagonal of H) * I, the quadratic form of the error that a head is solved for."""
    diagonal = hessian_KK.diagonal()
    return hessian_KK + torch.diag(torch.full_like(diagonal, PLAIN * float(diagonal.mean())))


def nest_in_parts(weight_NK: torch.Tensor, grid: Grid, *, name: str) -> NestedTensor:
    """Return ``nest`` of a weight without making float32 copies of more than ROWS rows."""
    return join_rows([nest(part.float(), grid, name=name) for part in torch.split(weight_NK, ROWS)])
