"""Find the decoder layers and the linear layers to quantise (FFN, attention or all) in any architecture.

A linear layer in a decoder layer is attention if its path contains ``attn`` or ``attention``, else FFN. This rule
covers every decoder family of transformers, including OPT's bare fc1 and fused experts, without naming one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from matquant.core.experts import is_router
from matquant.hf_torch import Model
from matquant.hf_torch.experts import expert_tensors, is_experts, joined_views
from matquant.hf_torch.ties import embedding_name, head_name, tied_weights
from matquant.hf_torch.views import View, checkpoint_views, stored_parts
from matquant.system.errors import InputError

ALL, LINEARS = "all", "linears"  # scopes with and without embedding and head


def decoder_of(model: Model) -> Any:
    """Return the decoder with its embedding and final norm, without the head."""
    found = model.get_decoder()
    return getattr(found, "model", found) if hasattr(found, "lm_head") else found  # Llama 4's has its head


def decoder_layers(model: Model) -> list[tuple[str, torch.nn.Module]]:
    """Return (module name, module) of each decoder layer, in order."""
    decoder, depth = decoder_of(model), model.config.get_text_config().num_hidden_layers
    found = (module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth)
    layers = next(found)
    (prefix,) = (name for name, module in model.named_modules() if module is layers)
    return [(f"{prefix}.{index}", layer) for index, layer in enumerate(layers)]


def linear_views(model: Model) -> dict[str, View]:
    """Return every linear weight in the decoder layers, by its module path in the checkpoint.

    Fused experts give one path per expert and projection. Embeddings, the head and ``unknown_experts`` are left out.
    """
    views: dict[str, View] = {}
    for name, parameter in _weights(model):
        joined = parameter.ndim == 3 and stored_parts(model, name, parameter)[1]
        views.update((joined_views if joined else checkpoint_views)(model, name, parameter))
    return views


def end_views(model: Model) -> dict[str, View]:
    """Return the embedding and, unless it is tied to it, the head by module path; empty if they are not matrices."""
    names = {name for name in (embedding_name(model), head_name(model)) if name is not None}
    views: dict[str, View] = {}
    for name in sorted(names - tied_weights(model).keys()):
        views |= checkpoint_views(model, name, model.get_parameter(name))
    return views


def unknown_experts(model: Model, views: Mapping[str, View]) -> list[str]:
    """Return the tensors of fused experts that are stored in a form that we do not know how to divide."""
    taken = {view.parameter for view in views.values()}
    return [name for name, weight in _weights(model) if weight.ndim == 3 and name not in taken]


def _weights(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and parameter of every linear layer and of all fused experts in the decoder layers."""
    layers = tuple(f"{name}." for name, _ in decoder_layers(model))
    for name, module in model.named_modules():
        if not name.startswith(layers):
            continue
        if isinstance(module, torch.nn.Linear):
            yield f"{name}.weight", module.weight
        elif is_experts(name):
            yield from ((f"{name}.{leaf}", tensor) for leaf, tensor in expert_tensors(module).items())


def unquantised_linears(model: Model, views: Mapping[str, View]) -> list[str]:
    """Return the names of the linear modules that are not among ``views``."""
    taken = {view.parameter for view in views.values()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in taken
    ]


def select_ends(model: Model, scope: str, *, exclude: Sequence[str] = ()) -> Mapping[str, View]:
    """Return path -> View of embedding and head if ``scope`` is all, without those that match ``exclude``."""
    found = end_views(model) if scope == ALL else {}
    return {path: view for path, view in found.items() if not any(re.search(pattern, path) for pattern in exclude)}


def select_linears(model: Model, scope: str, *, exclude: Sequence[str] = ()) -> Mapping[str, View]:
    """Return path -> View of the linear layers in ``scope`` whose paths match no pattern of ``exclude``.

    Embedding, head (see ``select_ends``) and the routers of experts are not among them.

    InputError if there are none, a pattern is not a regular expression or would split a fused parameter, or experts
    that cannot be quantised are not excluded.
    """
    everything = linear_views(model)
    views = {path: view for path, view in everything.items() if not is_router(path)}
    every = scope in (ALL, LINEARS)
    chosen = {path: view for path, view in views.items() if every or is_attention(path) == (scope == "attention")}
    for pattern in exclude:
        try:
            chosen = {path: view for path, view in chosen.items() if not re.search(pattern, path)}
        except re.error as error:
            raise InputError(f"--exclude {pattern!r} is not a regular expression ({error}); escape it") from None
    unknown = unknown_experts(model, everything)
    kept = [name for name in unknown if not any(re.search(pattern, name) for pattern in exclude)]
    if kept and scope != "attention":
        raise InputError(f"{kept[0]} holds all experts in a form that is not supported; use --exclude experts")
    split = {views[path].parameter for path in views.keys() - chosen} & {view.parameter for view in chosen.values()}
    if split:
        path = next(path for path in views if path not in chosen and views[path].parameter in split)
        raise InputError(
            f"--exclude removes {path} from {views[path].parameter}, which transformers reads as one tensor; "
            "exclude all of it or none"
        )
    if not chosen:
        raise InputError(
            f"{type(model).__name__} has no linear layer in scope {scope!r} "
            f"(found {len(views)} in its decoder layers); use another --scope"
        )
    return chosen


def is_attention(path: str) -> bool:
    """Return whether a module path belongs to an attention block."""
    return re.search(r"attn|attention", path) is not None
