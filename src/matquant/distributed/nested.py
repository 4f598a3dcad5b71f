"""Rows of nested tensors: cut them, join them, and gather them from all processes. Rows do not depend on each other."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from matquant.core.tensor import NestedTensor
from matquant.distributed.collect import gather_rows
from matquant.system import ranks


def cut_rows(nested: NestedTensor, rows: slice) -> NestedTensor:
    """Return these rows of a nested tensor, of numpy or torch."""
    return _mapped([nested], lambda parts: parts[0][rows])


def join_rows(parts: Sequence[NestedTensor]) -> NestedTensor:
    """Return one nested tensor of the rows of all parts, in order."""
    return parts[0] if len(parts) == 1 else _mapped(parts, torch.cat)


def gather_nested(own: NestedTensor, counts: Sequence[int]) -> NestedTensor:
    """Return the rows of all processes in their order, in every process. counts: how many rows each one has."""
    if ranks.count() == 1:
        return own
    return _mapped([own], lambda parts: gather_rows(parts[0], counts))


def _mapped(parts: Sequence[NestedTensor], join: Callable[[list[Any]], Any]) -> NestedTensor:
    return dataclasses.replace(
        parts[0],
        codes=join([part.codes for part in parts]),
        scale=join([part.scale for part in parts]),
        zero=join([part.zero for part in parts]),
        slices={
            bits: (join([part.slices[bits][0] for part in parts]), join([part.slices[bits][1] for part in parts]))
            for bits in parts[0].slices
        },
    )
