"""Open the model of a run, and derive what depends on it: layers, group size, sequence length."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matquant.core.grid import check_group_size
from matquant.hf_torch.config import check_context, context_length
from matquant.hf_torch.device import bf16_is_fast, choose_device
from matquant.hf_torch.layers import select_ends, select_linears
from matquant.hf_torch.loading import load_float
from matquant.hf_torch.shards import Shards, open_shards
from matquant.hf_torch.views import View
from matquant.options.common import AUTO, GROUP_SIZES
from matquant.options.request import Request
from matquant.system import ranks
from matquant.system.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An open model, and the values derived from it."""

    source: str
    request: Request
    shards: Shards  # the model, with weights, or without them for methods that work layer by layer
    device: torch.device
    views: Mapping[str, View]  # the linear layers to quantise, by module path
    ends: Mapping[str, View]  # embedding and head, if they are quantised
    group_size: int | None  # None for one scale per row
    options: Mapping[str, Any]  # the method's options, with a sequence length that the model supports
    reasons: Mapping[str, str]  # derived option -> reason for its value

    @property
    def settings(self) -> Any:
        """Return the record of the method's options, None for a method without options."""
        record = self.request.method.settings
        return record(**self.options) if record else None


def prepare(model: Path | str, request: Request, *, with_numbers: bool = True) -> Prepared:
    """Open the model, choose its layers and derive what depends on it; InputError if the options do not fit it.

    with_numbers: False reads only names and shapes, for any method.
    """
    common, chosen = request.common, request.method
    device = choose_device(common.device)
    by_tensor = chosen.streamed or not with_numbers or ranks.count() > 1
    shards = open_shards(model) if by_tensor else _in_memory(model, device)
    views = select_linears(shards.model, common.scope, exclude=common.exclude)
    ends = {} if common.baseline_bits is not None else select_ends(shards.model, common.scope, exclude=common.exclude)
    reasons = {}
    group_size = common.group_size
    if group_size == AUTO:
        group_size, reasons["group_size"] = _choose_group_size({**ends, **views})
    assert not isinstance(group_size, str)
    for path, view in (*views.items(), *ends.items()):
        check_group_size(view.shape[1], group_size, name=path)
    fused = [path for path in views if ".experts." in path]
    if fused and common.symmetric is False:
        raise InputError(
            f"--asymmetric does not work with {fused[0]}, a fused expert, which stock transformers "
            "cannot read with zero-points; drop --asymmetric, or use --exclude experts"
        )
    options = dict(request.choice.options)
    if chosen.settings is not None and "seq_len" not in request.choice.named:
        context, usual = context_length(shards.model), options.get("seq_len", chosen.settings.seq_len)
        options["seq_len"] = min(usual, context)
        if context < usual:
            reasons["seq_len"] = "the model's context"
    if chosen.settings is not None:
        check_context(shards.model, options["seq_len"])
    if chosen.settings is not None and trains_in_bf16(request, device):
        options["autocast"], reasons["autocast"] = True, "this processor or GPU is fast at it"
    return Prepared(
        source=str(model),
        request=request,
        shards=shards,
        device=device,
        views=views,
        ends=ends,
        group_size=group_size,
        options=options,
        reasons=reasons,
    )


def trains_in_bf16(request: Request, device: torch.device) -> bool:
    """Return whether a recipe picks bf16: for training, where the hardware has it, unless the user chose."""
    choice = request.choice
    picks = choice.recipe is not None and not request.method.streamed and "autocast" not in choice.options
    return picks and request.method.settings is not None and (device.type == "cuda" or bf16_is_fast())


def _choose_group_size(views: Mapping[str, View]) -> tuple[int | None, str]:
    """Return the first of GROUP_SIZES that divides every layer, None if none does, and the reason."""
    widths = {view.shape[1]: path for path, view in views.items()}
    reason = f"divides the rows of all {len(views)} layers"
    for size in GROUP_SIZES:
        misfit = next((width for width in widths if width % size), None)
        if misfit is None:
            return size, reason
        reason = f"{size} does not divide in_features={misfit} of {widths[misfit]}"
    return None, reason


def _in_memory(model: Path | str, device: torch.device) -> Shards:
    """Load the whole model in float32 on ``device``; dtypes are those of the file."""
    source = load_float(model)
    dtypes = {name: tensor.dtype for name, tensor in source.state_dict().items()}
    source = source.float().to(device)
    state = source.state_dict()
    return Shards(model=source, read=state.__getitem__, read_rows=lambda name, rows: state[name][rows], dtypes=dtypes)
