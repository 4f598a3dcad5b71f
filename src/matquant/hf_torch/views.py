"""Locate the weights of a checkpoint inside a model's parameters.

A float model keeps its classes; we only write other numbers into its parameters. For an ordinary linear layer a View is
the whole parameter, for fused mixture-of-experts tensors [E, 2I, H] a strided part of it. Views are found by sending
index tensors through transformers' checkpoint conversion, so every family that transformers can save is covered without
naming any.

Shapes: N out features, K in features, E experts, I intermediate size, H hidden size.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from matquant.hf_torch import Model
from matquant.hf_torch.arrays import to_numpy
from matquant.hf_torch.ties import Parts


@dataclass(frozen=True, kw_only=True)
class View:
    """The position of a weight [N, K] of the checkpoint in a model's parameter."""

    parameter: str  # its name in the model
    shape: tuple[int, int]  # N, K
    stride: tuple[int, int]  # elements from one row, and one column, to the next
    offset: int  # index of the weight's first element in the parameter

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this weight inside ``tensor``, a contiguous tensor of the parameter's shape, without a copy."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    def within(self, rows: slice, each: int) -> "View | None":
        """Return this weight's part in ``rows`` of the parameter's first dimension, as a view of only these.

        each: elements of one row of that dimension. The part has rows of the weight, or, of a fused expert, all or
        none. None if it is neither.
        """
        low, high = rows.start * each, rows.stop * each
        first = self.offset
        last = first + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if low <= first and last < high:
            return dataclasses.replace(self, offset=first - low)
        if last < low or first >= high:
            return dataclasses.replace(self, shape=(0, self.shape[1]), offset=0)
        if self.offset == 0 and self.stride[0] == each:
            count = max(0, min(rows.stop, self.shape[0]) - rows.start)
            return dataclasses.replace(self, shape=(count, self.shape[1]))
        return None


def stored_parts(model: Model, name: str, parameter: torch.Tensor) -> Parts:
    """Return a parameter's parts in a checkpoint, on meta, and whether it is stored whole, perhaps renamed."""
    whole = parameter.detach().to("meta")
    parts = revert_weight_conversion(model, {name: whole})
    return parts, len(parts) == 1 and whole is next(iter(parts.values()))


def checkpoint_views(model: Model, name: str, parameter: torch.Tensor) -> dict[str, View]:
    """Return the checkpoint's matrices in a parameter, by module path; empty if it is stored in another form."""
    parts, renamed = stored_parts(model, name, parameter)
    if any(part.ndim != 2 for part in parts.values()):
        return {}
    if renamed:
        (key,), (rows, columns) = parts, parameter.shape
        return {key.removesuffix(".weight"): View(parameter=name, shape=(rows, columns), stride=(columns, 1), offset=0)}
    index = torch.arange(parameter.numel()).view(parameter.shape)
    views = {}
    for key, part in revert_weight_conversion(model, {name: index}).items():
        rows, columns = part.shape
        offset = int(part[0, 0])
        stride = (int(part[1, 0]) - offset if rows > 1 else columns, int(part[0, 1]) - offset if columns > 1 else 1)
        view = View(parameter=name, shape=(rows, columns), stride=stride, offset=offset)
        assert torch.equal(view.of(index), part), f"{key} is not a strided part of {name}"
        views[key.removesuffix(".weight")] = view
    return views


def plain_items(
    model: Model,
    views: Mapping[str, View],
    dtypes: Mapping[str, torch.dtype],
    *,
    read: Callable[[str], torch.Tensor] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors that are not quantised, under their checkpoint names, as numpy arrays, without tied copies.

    read: reads a tensor by name; None: take the model's.
    """
    taken = {view.parameter for view in views.values()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in taken and name not in tied:
            value = tensor if read is None else read(name)
            stored = value.detach().to(dtypes.get(name, value.dtype))
            for key, part in revert_weight_conversion(model, {name: stored}).items():
                yield key, to_numpy(part)


def is_whole(model: Model, view: View) -> bool:
    """Return whether ``view`` is the whole weight of a plain linear layer or embedding."""
    module = model.get_submodule(view.parameter.rpartition(".")[0])
    whole = View(parameter=view.parameter, shape=view.shape, stride=(view.shape[1], 1), offset=0)
    plain = type(module) in (torch.nn.Linear, torch.nn.Embedding) or hasattr(module, "embed_scale")
    return plain and view == whole and tuple(module.weight.shape) == view.shape


def write_weights(model: Model, views: Mapping[str, View], weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy weights [N, K], by path, into the model's parameters."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, weight in weights:
            view = views[path]
            view.of(local(parameters[view.parameter])).copy_(weight)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of a tensor that is split among processes (a DTensor), detached; else the tensor."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor
