"""Whether the output head is the embedding: decided once, where a float model is read, and written into its config.

As transformers 5 has it: ``tie_word_embeddings`` ties the two unless the files store both with different numbers; if
they store the head alone, that is the embedding too. Everything downstream (methods, checkpoint, engine, exporters)
reads ``tie_word_embeddings``, which ``record_ties`` makes true to the model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import safe_open

Model = Any  # a transformers PreTrainedModel
Parts = tuple[dict[str, torch.Tensor], bool]  # what files hold of a parameter, on meta; whether that is all of it
Files = dict[str, tuple[str, tuple[int, ...], torch.dtype]]  # tensor name -> its file, shape and dtype


def tied_weights(model: Model) -> dict[str, str]:
    """Parameter name -> the parameter whose numbers it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def untie(model: Model, name: str) -> torch.nn.Parameter:
    """Give a tied parameter numbers of its own, which are not set; returns it."""
    model.all_tied_weights_keys.pop(name)
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    separate = torch.nn.Parameter(torch.empty_like(module.get_parameter(leaf)))
    setattr(module, leaf, separate)
    return separate


def record_ties(model: Model) -> None:
    """Make the model's configuration, and that of its text part, say whether head and embedding are tied."""
    name = head_name(model)
    if name is None:
        return
    tied = name in tied_weights(model)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", None) is not tied:
            config.tie_word_embeddings = tied


def head_name(model: Model) -> str | None:
    """The name of the weight of a model's output head; None if it has no head."""
    head = model.get_output_embeddings()
    names = (name for name, module in model.named_modules(remove_duplicate=False) if module is head)
    path = next(names, None) if head is not None else None
    return None if path is None else f"{path}.weight"


def plain_names(model: Model, stored: Mapping[str, Parts], files: Files) -> dict[str, Parts]:
    """Parts of the tied parameters that files store by the model's own names, where these differ from the usual."""
    return {
        name: ({name: torch.empty(files[name][1], dtype=files[name][2], device="meta")}, True)
        for name in tied_weights(model)
        if name in files and not stored[name][0].keys() <= files.keys()
    }


def resolve_ties(
    model: Model, stored: Mapping[str, Parts], files: Files, dtype: torch.dtype | None
) -> dict[str, Parts]:
    """``stored`` without tied parameters, of which some may turn out to be none: these are untied in ``model``.

    A parameter of which only the tied copy is stored has the parts of that.
    """
    resolved = dict(stored)
    for name, origin in tied_weights(model).items():
        (here, _), (there, renamed) = stored[name], stored[origin]
        has_copy, has_origin = here.keys() <= files.keys(), there.keys() <= files.keys()
        if has_copy and has_origin and renamed:
            copies = (read_key(files, next(iter(parts))) for parts in (here, there))
            numbers = [tensor.to(dtype or tensor.dtype) for tensor in copies]
            if not torch.equal(*numbers):
                untie(model, name)
                continue
        if has_copy and not has_origin:
            resolved[origin] = stored[name]
        resolved.pop(name)
    return resolved


def read_key(files: Files, key: str) -> torch.Tensor:
    """A stored tensor, in memory of its own."""
    with safe_open(files[key][0], "pt") as file:  # closed again: an open one keeps what was read in memory
        tensor: torch.Tensor = file.get_tensor(key).clone()
    return tensor
