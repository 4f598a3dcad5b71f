"""A nested checkpoint as an ordinary transformers model whose width can be changed in place.

The codes stay in memory beside the dense parameters; ``set_bits`` slices them again and writes the parameters, so
``generate``, hooks and everything else of transformers work as on any model.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from matquant.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from matquant.errors import InputError
from matquant.models import (
    Model,
    build_model,
    linear_views,
    nested_to_numpy,
    nested_to_torch,
    plain_items,
    side_files,
    to_torch,
    write_weights,
)
from matquant.nest import MASTER_BITS, check_bits
from matquant.spec import Plan
from matquant.tensor import NestedTensor


def load(
    path: Path | str,
    bits: int = MASTER_BITS,
    *,
    plan: Mapping[str, int] | Plan | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    check_hashes: bool = True,
) -> Any:
    """Load a nested checkpoint as a transformers model at ``bits`` bits, or at a plan {path: bits} over ``bits``.

    Returns a model of its own class that also has ``set_bits(bits, plan=None)`` and ``bits_by_path``, and whose
    ``save_pretrained(directory)`` writes the nested checkpoint. dtype None: the checkpoint's. InputError on damage.
    """
    checkpoint = open_checkpoint(path, check_hashes=check_hashes)
    check_bits(bits)
    tensors = {name: nested_to_torch(checkpoint.nested(name)) for name in checkpoint.shapes}
    state = {f"{name}.weight": tensor.read(bits) for name, tensor in tensors.items()}
    state |= {name: to_torch(checkpoint.array(name)) for name in checkpoint.plain_names()}
    model = build_model(checkpoint.config, state, directory=checkpoint.directory, dtype=dtype).to(device)
    views = linear_views(model)
    missing = sorted(set(tensors) - set(views))
    if missing:
        raise InputError(f"{path} quantises {missing[0]}, which {type(model).__name__} does not have; write it again")
    views = {name: views[name] for name in tensors}
    model.bits_by_path = {}
    model.set_bits = functools.partial(_set_bits, model, views, tensors)
    model.save_pretrained = functools.partial(_save, model, views, tensors, checkpoint)
    model.set_bits(bits, plan=plan)
    return model


def _set_bits(
    model: Model,
    views: Mapping[str, Any],
    tensors: Mapping[str, NestedTensor],
    bits: int = MASTER_BITS,
    *,
    plan: Mapping[str, int] | Plan | None = None,
) -> None:
    """Switch the model in place to ``bits``, or to a plan over it. Only weights whose width changes are rewritten."""
    if not isinstance(plan, Plan):
        plan = Plan(default=bits, bits=dict(plan or {}))
    wanted = plan.resolve(tensors)
    changed = [path for path, width in wanted.items() if model.bits_by_path.get(path) != width]
    write_weights(model, views, ((path, tensors[path].read(wanted[path])) for path in changed))
    model.bits_by_path = wanted


def _save(
    model: Model,
    views: Mapping[str, Any],
    tensors: Mapping[str, NestedTensor],
    checkpoint: Checkpoint,
    directory: Path | str,
    *,
    overwrite: bool = False,
) -> None:
    """Write the nested checkpoint again: codes as loaded, all other tensors as they are in the model now."""

    def items() -> Iterator[Any]:
        yield from ((path, nested_to_numpy(tensor)) for path, tensor in tensors.items())
        yield from plain_items(model, views, {})

    write_checkpoint(
        directory,
        items(),
        spec=checkpoint.spec,
        config=checkpoint.config,
        ignore=checkpoint.ignore,
        files=side_files(checkpoint.directory),
        overwrite=overwrite,
    )
