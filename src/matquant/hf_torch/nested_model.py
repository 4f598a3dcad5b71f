"""A nested checkpoint as an ordinary transformers model whose width can be changed in place.

On a CPU every quantised linear layer uses the native kernels, on a GPU those of backends/gpu.py: codes are kept in bit
planes without dense copies, switching costs nothing, and decoding reads ``bits`` bits per weight. Results equal dense
weights to rounding; ``kernels="int8"`` rounds activations too and is faster still (docs/runtime.md).

Where no kernels are available, and with ``kernels="none"``, the codes stay in memory beside dense parameters;
``set_bits`` slices them again and writes the parameters, so that training and every other use of transformers work bit
for bit as on an ordinary model.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from matquant.backends import BACKENDS, DENSE, choose
from matquant.backends.backend import Backend
from matquant.core.nest import MASTER_BITS, check_bits
from matquant.core.spec import Plan
from matquant.core.tensor import NestedTensor
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.format.side_files import nested_side_files
from matquant.format.write import write_checkpoint
from matquant.hf_torch import Model
from matquant.hf_torch.arrays import nested_to_numpy, to_torch
from matquant.hf_torch.config import config_dtype
from matquant.hf_torch.device import choose_device
from matquant.hf_torch.layers import end_views, linear_views
from matquant.hf_torch.linear import NestedEmbedding, NestedLinear, NestedWeight
from matquant.hf_torch.loading import build_model
from matquant.hf_torch.ties import tied_weights
from matquant.hf_torch.views import View, is_whole, plain_items, write_weights
from matquant.system.arguments import check_types
from matquant.system.errors import InputError, InputTypeError
from matquant.system.threads import check_threads

Serve = Callable[[Mapping[str, int]], None]  # sets the widths of the weights at these paths

KERNELS = {"auto": "float", "float": "float", "int8": "int8", "planes": "float"}  # value of ``kernels`` -> activations
NONE, PLANES = "none", "planes"


def load(
    path: Path | str,
    bits: int = MASTER_BITS,
    *,
    plan: Mapping[str, int] | Plan | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    kernels: str = "auto",
    check_hashes: bool = True,
) -> Any:
    """Load a nested checkpoint as a transformers model at ``bits`` bits, or at a plan {path: bits} over ``bits``.

    Returns a model of the checkpoint's class with three additions: ``set_bits(bits, plan=None)``, ``bits_by_path`` and
    ``kernels`` (a line of text: the kernels in use and why). Its ``save_pretrained(directory)`` writes the nested
    checkpoint. dtype None: the checkpoint's. kernels: ``auto``: the device's kernels, equal to dense weights to
    rounding, or dense weights where they are not available (float64, fused experts, ...); ``float`` or ``int8``:
    kernels with these activations, or an error; ``planes``: the GPU's planes on any device (on a CPU a slow reference);
    ``none``: dense weights, which can be trained. With kernels no parameter requires gradients. InputError for
    damage, and if the device or the requested kernels are not available.
    """
    _check_arguments(path, dtype, device, kernels, check_hashes)
    choose_device(str(device))
    check_threads(torch.get_num_threads(), name="torch.get_num_threads()")
    checkpoint = open_checkpoint(path, check_hashes=check_hashes)
    check_bits(bits)
    served = dtype or config_dtype(checkpoint.config)
    name, obstacle, activations = DENSE, "kernels='none' was given", KERNELS.get(kernels, "float")
    if kernels != NONE:
        name, obstacle = _choose(kernels, device, served, activations)
    if not BACKENDS[name].trains:
        tensors = {path: checkpoint.nested(path, mapped=True) for path in checkpoint.shapes}
        nothing = torch.zeros((), dtype=served)
        model, views = _build(checkpoint, nothing.expand, served, device)
        reasons = (_why_not_path(model, path, views[path], tensors[path], BACKENDS[name]) for path in tensors)
        reason = next((reason for reason in reasons if reason is not None), None)
        name, obstacle = (name, obstacle) if reason is None else (DENSE, reason)
    if not BACKENDS[name].trains:
        serve = _use_kernels(model, views, tensors, BACKENDS[name], activations)
        model.kernels = BACKENDS[name].describe(len(views), activations)
    elif kernels in ("auto", NONE):
        pack = BACKENDS[name].pack
        tensors = {path: pack(checkpoint.nested(path), device=device) for path in checkpoint.shapes}
        model, views = _build(checkpoint, torch.zeros, dtype, device)
        serve = functools.partial(_write_dense, model, views, tensors)
        model.kernels = f"no kernels: {obstacle}"
    else:
        raise InputError(f"kernels={kernels!r} does not support {path}: {obstacle}; use kernels='auto' or {NONE!r}")
    model.bits_by_path = {}
    model.set_bits = functools.partial(_set_bits, model, serve, checkpoint)
    model.save_pretrained = functools.partial(_save, model, views, tensors, checkpoint)
    model.set_bits(bits, plan=plan)
    return model


def _choose(kernels: str, device: str | torch.device, dtype: torch.dtype, activations: str) -> tuple[str, str]:
    """Return the backend of these kernels and "", or the dense one and the reason."""
    if kernels != PLANES:
        return choose(device, dtype, activations=activations)
    reason = BACKENDS["gpu"].why_not(device, dtype, activations)
    return ("gpu", "") if reason is None else (DENSE, reason)


def _why_not_path(model: Model, path: str, view: View, tensor: NestedTensor, backend: Backend) -> str | None:
    """Return why a backend cannot serve this layer; None if it can."""
    if not is_whole(model, view):
        return f"{path} is part of a fused tensor"
    reason = backend.why_not_weight(tensor)
    return None if reason is None else f"{path}: {reason}"


def _check_arguments(path: Any, dtype: Any, device: Any, kernels: Any, check_hashes: Any) -> None:
    """Raise InputError for arguments of ``load`` of a wrong type, and for unknown kernels."""
    check_types(path=path, check_hashes=check_hashes)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputTypeError(f"dtype={dtype!r} is of type {type(dtype).__name__}; give a torch.dtype")
    if not isinstance(device, (str, torch.device)):
        raise InputTypeError(f"device={device!r} is of type {type(device).__name__}; give a text or a torch.device")
    if not isinstance(kernels, str) or kernels not in (*KERNELS, NONE):
        kind = InputError if isinstance(kernels, str) else InputTypeError
        raise kind(f"kernels={kernels!r} is not known; use {', '.join(KERNELS)} or {NONE}")


def _build(
    checkpoint: Checkpoint,
    weight: Callable[[tuple[int, ...]], torch.Tensor],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> tuple[Model, dict[str, View]]:
    """Build the model with ``weight(shape)`` for every quantised tensor, and return the positions of the weights."""
    state = {name: weight(shape) for name, shape in checkpoint.model_shapes().items()}
    state |= {name: to_torch(checkpoint.array(name)) for name in checkpoint.plain_names()}
    model = build_model(checkpoint.config, state, directory=checkpoint.directory, dtype=dtype).to(device)
    views = {**linear_views(model), **end_views(model)}
    missing = sorted(set(checkpoint.shapes) - set(views))
    if missing:
        raise InputError(
            f"{checkpoint.directory} quantises {missing[0]}, which {type(model).__name__} does not have; write it again"
        )
    return model, {name: views[name] for name in checkpoint.shapes}


def _use_kernels(
    model: Model,
    views: Mapping[str, View],
    tensors: Mapping[str, NestedTensor],
    backend: Backend,
    activations: str,
) -> Serve:
    """Replace every module of ``tensors`` by a nested one. Afterwards no parameter requires gradients."""
    served: dict[str, list[NestedWeight]] = {}
    tied = tied_weights(model)
    for path, tensor in tensors.items():
        packed = backend.pack(tensor, device=model.device)
        own = views[path].parameter
        for name in (own, *(name for name, origin in tied.items() if origin == own)):
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            block = model.get_submodule(parent)
            module = _nested(tensor, packed, getattr(block, leaf), backend, activations)
            served.setdefault(path, []).append(module)
            setattr(block, leaf, module)
    model.requires_grad_(False)

    def serve(bits_by_path: Mapping[str, int]) -> None:
        for path, bits in bits_by_path.items():
            for module in served[path]:
                module.bits = bits

    return serve


def _nested(tensor: NestedTensor, packed: Any, like: Any, backend: Backend, activations: str) -> NestedWeight:
    """Return the nested module that replaces a linear layer or an embedding."""
    if isinstance(like, torch.nn.Embedding):
        return NestedEmbedding(tensor, packed, like, backend=backend).eval()
    return NestedLinear(tensor, packed, like, backend=backend, activations=activations).eval()


def _write_dense(
    model: Model, views: Mapping[str, View], tensors: Mapping[str, NestedTensor], bits_by_path: Mapping[str, int]
) -> None:
    write_weights(model, views, ((path, tensors[path].read(bits)) for path, bits in bits_by_path.items()))


def _set_bits(
    model: Model,
    serve: Serve,
    checkpoint: Checkpoint,
    bits: int = MASTER_BITS,
    *,
    plan: Mapping[str, int] | Plan | None = None,
) -> None:
    """Switch the model in place to ``bits``, or to a plan over it. Only weights whose width changes are rewritten."""
    wanted = checkpoint.widths(Plan.over(bits, plan))
    serve({path: width for path, width in wanted.items() if model.bits_by_path.get(path) != width})
    model.bits_by_path = wanted


def _save(
    model: Model,
    views: Mapping[str, View],
    tensors: Mapping[str, NestedTensor],
    checkpoint: Checkpoint,
    directory: Path | str,
    *,
    overwrite: bool = False,
) -> None:
    """Write the nested checkpoint: codes as loaded, all other tensors as they are in the model now."""

    def items() -> Iterator[Any]:
        yield from ((path, nested_to_numpy(tensor)) for path, tensor in tensors.items())
        yield from plain_items(model, views, {})

    write_checkpoint(
        directory,
        items(),
        spec=checkpoint.spec,
        config=checkpoint.config,
        ignore=checkpoint.ignore,
        files=nested_side_files(checkpoint.directory),
        overwrite=overwrite,
    )
