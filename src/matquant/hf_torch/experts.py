"""Experts that transformers holds, and the model's files store, in one tensor for all of a layer (core/experts.py).

Orientation and order of gate and up are those that transformers declares on the class of the experts
(``use_experts_implementation``); Llama 4 declares none, so its orientation is read off the sizes of its tensors.
Stock transformers replaces a few such classes by ordinary linear layers when it reads compressed-tensors: these models
stay stock int8 models. For the others nothing in the stock format holds the experts.
"""

from collections.abc import Iterable

import torch
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from matquant.core.experts import EXPERTS, GATE_UP, TENSORS, Experts
from matquant.hf_torch import Model
from matquant.hf_torch.views import View, stored_parts

PATCHED = tuple(
    name
    for name, patch in MODULES_TO_PATCH_FOR_QUANTIZATION.items()
    if QuantizationMethod.COMPRESSED_TENSORS in patch["quantization_methods"]
)


def is_experts(name: str) -> bool:
    """Return whether a module of this name holds fused experts."""
    return name.rpartition(".")[2] == EXPERTS


def expert_tensors(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights of a module of fused experts [E, ..., ...] by name, without biases."""
    return {name: tensor for name, tensor in module.named_parameters(recurse=False) if tensor.ndim == 3}


def expert_count(module: torch.nn.Module) -> int:
    """Return the number of experts in a module of fused experts."""
    return len(next(iter(expert_tensors(module).values())))


def is_transposed(module: torch.nn.Module) -> bool:
    """Return whether the weights of fused experts are [E, in, out]."""
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return bool(declared)
    tensors = expert_tensors(module)
    if GATE_UP not in tensors or "down_proj" not in tensors:
        return False
    first, last = tensors[GATE_UP].shape, tensors["down_proj"].shape
    return bool(first[1] == last[2] and first[2] == 2 * last[1])


def joined_views(model: Model, name: str, parameter: torch.Tensor) -> dict[str, View]:
    """Return the weight of each expert and projection in a tensor of all experts, by path.

    Empty if its name is none that we know: then nothing says how it is divided.
    """
    kind = name.rpartition(".")[2]
    if kind not in TENSORS:
        return {}
    block, _ = _split(model, name, parameter)
    layout = _layout(model.get_submodule(name.rpartition(".")[0]), {})
    return {
        f"{block}.{EXPERTS}.{key}": View(parameter=name, shape=place.shape, stride=place.stride, offset=place.offset)
        for key, place in layout.places(kind, tuple(parameter.shape)).items()
    }


def experts_record(model: Model, quantised: Iterable[str]) -> Experts | None:
    """Return how the model's files hold the experts of which ``quantised`` names the parameters.

    None if they hold none in one tensor, or these stay float and stock tools read them as they are.
    """
    taken, names, whole, found = set(quantised), {}, set(), None
    for path, module in model.named_modules():
        for leaf, parameter in expert_tensors(module).items() if is_experts(path) else ():
            name = f"{path}.{leaf}"
            if leaf in TENSORS and stored_parts(model, name, parameter)[1]:
                found = module
                names[leaf] = _split(model, name, parameter)[1]
                whole.add(name)
    patched = type(found).__name__ in PATCHED
    if found is None or not (patched or whole & taken):
        return None
    return _layout(found, names, stock=patched and whole <= taken)


def _layout(module: torch.nn.Module, names: dict[str, str], *, stock: bool = False) -> Experts:
    interleaved = not getattr(module, "is_concatenated", True)
    return Experts(names=names, transposed=is_transposed(module), interleaved=interleaved, stock=stock)


def _split(model: Model, name: str, parameter: torch.Tensor) -> tuple[str, str]:
    """Return the checkpoint's name of a tensor of all experts in two parts: the block that has them, and the rest."""
    (stored,), _ = stored_parts(model, name, parameter)
    parts = stored.split(".")
    rest = 2 if EXPERTS in parts[-2:] or parts[-1] == "weight" else 1
    return ".".join(parts[:-rest]), ".".join(parts[-rest:])
