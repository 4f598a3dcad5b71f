"""Read a float model tensor by tensor, so that a model larger than memory can be quantised."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from matquant.hf.sidefiles import readable
from matquant.hf_torch import Model
from matquant.hf_torch.config import loading
from matquant.hf_torch.loading import float_config, load_float
from matquant.hf_torch.sizes import check_dtypes, check_fits, check_unused_tensors
from matquant.hf_torch.ties import Files, plain_names, read_key, record_ties, resolve_ties, tied_weights
from matquant.hf_torch.views import checkpoint_views, stored_parts
from matquant.system.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A float model whose tensors are read one at a time."""

    model: Model  # may be without weights
    read: Callable[[str], torch.Tensor]  # parameter or buffer name -> tensor of the stored dtype
    read_rows: Callable[[str, slice], torch.Tensor]  # the same for a part of its first dimension, and only that part
    dtypes: Mapping[str, torch.dtype]  # the same names -> that dtype


def open_shards(source: Path | str) -> Shards:
    """Open a model for reading tensor by tensor from its safetensors shards.

    A model without such shards, or with unusual tensor names, is loaded whole and read from memory.
    """
    with loading(source):
        config = float_config(source)
        check_fits(source, config)
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.config.name_or_path = str(source)
        files = _shard_files(source)
        parameters = {name: model.get_parameter(name) for name in (*_names(model), *tied_weights(model))}
        stored = {name: stored_parts(model, name, p) for name, p in parameters.items()}
        stored |= plain_names(model, stored, files)
        known = {key for parts, _ in stored.values() for key in parts}
        stored = resolve_ties(model, stored, files, config.dtype)
        if not all(key in files for parts, _ in stored.values() for key in parts):
            return _whole(load_float(source))
        check_dtypes(source)
        if not files.keys() <= known:
            check_unused_tensors(model, source, _read_info(model, files))
        record_ties(model)
        dtypes: dict[str, torch.dtype] = {}
        for name, (parts, _) in stored.items():
            for key, part in parts.items():
                found, dtype = files[key][1:]
                if found != tuple(part.shape):
                    raise InputError(f"{source} has mismatched keys: {key}; repair the model")
                dtypes[name] = config.dtype or dtype
    buffers: dict[str, torch.Tensor] = dict(model.named_buffers())

    def read(name: str) -> torch.Tensor:
        if name in buffers:
            return buffers[name]
        parts, renamed = stored[name]
        if renamed:
            return read_key(files, next(iter(parts))).to(dtypes[name])
        tensor = torch.empty(parameters[name].shape, dtype=dtypes[name])
        for path, view in checkpoint_views(model, name, parameters[name]).items():
            view.of(tensor).copy_(read_key(files, f"{path}.weight"))
        return tensor

    def read_rows(name: str, rows: slice) -> torch.Tensor:
        parts, renamed = stored[name]
        if renamed:
            return read_key(files, next(iter(parts)), rows=rows).to(dtypes[name])
        whole = parameters[name]
        each = whole[0].numel()
        tensor = torch.empty((rows.stop - rows.start, *whole.shape[1:]), dtype=dtypes[name])
        for path, view in checkpoint_views(model, name, whole).items():
            inside = view.within(rows, each)
            if inside is None:
                return read(name)[rows].clone()
            if inside.shape[0]:
                inside.of(tensor).copy_(read_key(files, f"{path}.weight"))
        return tensor

    return Shards(model=model, read=read, read_rows=read_rows, dtypes=dtypes)


def _whole(model: Model) -> Shards:
    state = model.state_dict()
    return Shards(
        model=model,
        read=state.__getitem__,
        read_rows=lambda name, rows: state[name][rows],
        dtypes={name: tensor.dtype for name, tensor in state.items()},
    )


def _names(model: Model) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _read_info(model: Model, files: Files) -> Mapping[str, Any]:
    """Return transformers' loading report for tensors with these names and shapes, without reading data."""
    state = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (_, shape, dtype) in files.items()}
    options = {"dtype": model.config.dtype, "ignore_mismatched_sizes": True, "device_map": "meta"}
    _, info = type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=state, output_loading_info=True, **options
    )
    return info  # type: ignore[no-any-return]


def _shard_files(source: Path | str) -> Files:
    """Return tensor name -> (its safetensors file, shape, dtype); empty if the model is stored in another form."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with readable(source) as place:
        single = cached_file(str(place), SAFE_WEIGHTS_NAME, **missing)
        index = None if single else cached_file(str(place), SAFE_WEIGHTS_INDEX_NAME, **missing)
        paths = [single] if single else get_checkpoint_shard_files(str(place), index)[0] if index else []
        paths = [str(Path(path).resolve()) for path in paths]  # resolve links that are removed later
    found = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                stored = file.get_slice(key)
                first = stored[tuple(slice(0, 1) for _ in stored.get_shape())]
                found[key] = (path, tuple(stored.get_shape()), first.dtype)
    return found
