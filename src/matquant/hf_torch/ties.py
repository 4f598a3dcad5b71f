"""Decide whether head and embedding are tied, once, when a float model is read, and record it in its configuration.

The rule is that of transformers 5: ``tie_word_embeddings`` ties the two unless the files store both with different
numbers; if they store only the head, it is the embedding too. All later code (methods, checkpoint, engine, exporters)
reads ``tie_word_embeddings``, which ``record_ties`` sets to match the model.
"""

from collections.abc import Mapping

import torch
from safetensors import safe_open

from matquant.hf_torch import Model

Parts = tuple[dict[str, torch.Tensor], bool]  # stored parts of a parameter, on meta; whether they are all of it
Files = dict[str, tuple[str, tuple[int, ...], torch.dtype]]  # tensor name -> its file, shape and dtype


def tied_weights(model: Model) -> dict[str, str]:
    """Return parameter name -> the parameter whose numbers it shares."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def untie(model: Model, name: str) -> torch.nn.Parameter:
    """Replace a tied parameter by a separate one with uninitialised numbers, and return it."""
    model.all_tied_weights_keys.pop(name)
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    separate = torch.nn.Parameter(torch.empty_like(module.get_parameter(leaf)))
    setattr(module, leaf, separate)
    return separate


def record_ties(model: Model) -> None:
    """Record in the model's configuration, and that of its text part, whether head and embedding are tied."""
    name = head_name(model)
    if name is None:
        return
    tied = name in tied_weights(model)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", None) is not tied:
            config.tie_word_embeddings = tied


def embedding_name(model: Model) -> str | None:
    """Return the name of the weight of a model's token embedding; None if it is not a plain one."""
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, torch.nn.Embedding):
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def head_name(model: Model) -> str | None:
    """Return the name of the weight of a model's output head; None if it has no head."""
    head = model.get_output_embeddings()
    names = (name for name, module in model.named_modules(remove_duplicate=False) if module is head)
    path = next(names, None) if head is not None else None
    return None if path is None else f"{path}.weight"


def plain_names(model: Model, stored: Mapping[str, Parts], files: Files) -> dict[str, Parts]:
    """Return the parts of tied parameters stored under the model's own names, if these differ from the usual."""
    return {
        name: ({name: torch.empty(files[name][1], dtype=files[name][2], device="meta")}, True)
        for name in tied_weights(model)
        if name in files and not stored[name][0].keys() <= files.keys()
    }


def resolve_ties(
    model: Model, stored: Mapping[str, Parts], files: Files, dtype: torch.dtype | None
) -> dict[str, Parts]:
    """Return ``stored`` without tied parameters; parameters that turn out not to be tied are untied in ``model``.

    If only the tied copy of a parameter is stored, the parameter gets its parts.
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


def read_key(files: Files, key: str, *, rows: slice | None = None) -> torch.Tensor:
    """Read a stored tensor into memory, or these rows of it."""
    with safe_open(files[key][0], "pt") as file:  # closed again: an open file keeps read tensors in memory
        stored = file.get_tensor(key) if rows is None else file.get_slice(key)[rows]
        tensor: torch.Tensor = stored.clone()
    return tensor
