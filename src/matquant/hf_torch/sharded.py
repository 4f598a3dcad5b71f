"""Split a model's parameters by rows among processes with FSDP2 (``fully_shard``), each reading only its rows.

A process keeps ceil(N / processes) rows of every parameter in float32. Each decoder layer is gathered for its forward
and its backward pass only, in bf16 if the layers compute in it; gradients are summed in float32 and scattered to the
rows' owners. Write other numbers into a parameter's ``local`` rows only while it is split: ``split_again`` makes sure.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from matquant.core.grid import check_finite
from matquant.distributed.collect import check_rows, own_rows, together
from matquant.hf_torch import Model
from matquant.hf_torch.layers import decoder_layers
from matquant.hf_torch.views import View
from matquant.system import ranks
from matquant.system.errors import InputError

ReadRows = Callable[[str, slice], torch.Tensor]


def split(model: Model, read_rows: ReadRows, *, device: torch.device, autocast: bool) -> Model:
    """Return a copy of a model without weights that has this process's rows, in float32 on ``device``.

    read_rows: reads rows of a parameter by name. autocast: the decoder layers compute in bf16 under torch.autocast, so
    that their weights are gathered in it, with the same results. Raises InputError, in all processes, for numbers that
    are not finite.
    """
    model = copy.deepcopy(model).float()
    mesh = init_device_mesh(device.type, (ranks.count(),))
    options: dict[str, Any] = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if autocast else None, **options)
    for _, layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=narrow, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**options), reshard_after_forward=True)
    together(lambda: _fill(model, read_rows, device))
    for module in _groups(model):  # sums, not means: each process adds its share of the batch's loss
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)
        module.unshard()  # settles where the rows are stored
        module.reshard()
    return model


def split_again(model: Model) -> None:
    """Drop gathered weights, so that the next pass gathers what was written into the rows."""
    for module in _groups(model):
        module.reshard()


def split_rows(views: Mapping[str, View], model: Model) -> dict[str, tuple[int, ...]]:
    """Return how many rows of each weight the processes hold, in their order, by path; an expert is with one process.

    InputError if a process has no rows of a parameter, or a weight cannot be split.
    """
    if ranks.count() == 1:
        return {path: (view.shape[0],) for path, view in views.items()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    for path, view in views.items():
        shape = shapes[view.parameter]
        check_rows(shape[0], path)
        parts = [view.within(own_rows(shape[0], rank=rank), shape[1:].numel()) for rank in range(ranks.count())]
        if None in parts:
            raise InputError(
                f"{path} cannot be split by rows among {ranks.count()} processes; --exclude it, or use one"
            )
        found[path] = tuple(part.shape[0] for part in parts if part is not None)
    return found


def own_views(views: Mapping[str, View], model: Model) -> dict[str, View]:
    """Return the positions of weights in this process's rows of their parameters, without other processes' experts."""
    if ranks.count() == 1:
        return dict(views)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parts = {
        path: view.within(own_rows(shapes[view.parameter][0]), shapes[view.parameter][1:].numel())
        for path, view in views.items()
    }
    return {path: part for path, part in parts.items() if part is not None and part.shape[0]}


@torch.no_grad()
def _fill(model: Model, read_rows: ReadRows, device: torch.device) -> None:
    """Read this process's rows of every parameter, and move the buffers to ``device``."""
    filled: dict[int, torch.nn.Parameter] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in filled:
                filled[id(parameter)] = _filled(cast(DTensor, parameter), names[id(parameter)], read_rows, device)
            setattr(module, leaf, filled[id(parameter)])
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, buffer.to(device))


def _filled(parameter: DTensor, name: str, read_rows: ReadRows, device: torch.device) -> torch.nn.Parameter:
    rows = own_rows(parameter.shape[0])
    own = read_rows(name, rows)
    check_finite(own, name=name.removesuffix(".weight"))
    found = DTensor.from_local(
        own.to(device, torch.float32),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return torch.nn.Parameter(found, requires_grad=parameter.requires_grad)


def _groups(model: Model) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
