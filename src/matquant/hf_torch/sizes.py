"""Check a model's files before allocating memory for it: shapes, dtypes, unused tensors.

transformers allocates memory for every missing or mismatched tensor before reporting it, and drops or casts other
tensors without an error. All of that is rejected here.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.initialization import meta_device_safe_creation_ops
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from matquant.format.facts import REPAIR
from matquant.hf.intact import Shapes, bin_files, check_readable, check_sensible, read_shapes
from matquant.hf.tensors import check_stored, check_unused, read_headers
from matquant.hf_torch import Model
from matquant.system.errors import InputError

PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")  # keys of config.json
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
LARGER, SMALL = 3, 2**26  # a model may have LARGER times the numbers in its files, plus SMALL (masks, tables)


def check_files(source: Path | str) -> Shapes:
    """Return the shapes of a model's stored tensors, after checking for damage and for impossible values."""
    directory = Path(cached_file(str(source), CONFIG_NAME)).parent
    try:
        check_readable(directory)
    except InputError as error:
        raise ValueError(str(error).removesuffix(f"; {REPAIR}")) from None
    shapes = read_shapes(directory)
    for file in bin_files(directory) if not shapes else []:
        try:
            with warnings.catch_warnings(action="ignore"):
                state = load_state_dict(file, map_location="meta")
        except Exception:  # any type; torch's message advises to execute the file
            raise ValueError(f"{file} is damaged, or not a file of tensors written by torch.save") from None
        shapes |= {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    check_sensible(directory, tensors=len(shapes))
    return shapes


def check_fits(source: Path | str, config: Any) -> None:
    """Raise InputError if a model of ``config`` is larger than the tensors in its files, without allocating it.

    transformers allocates memory for every missing or mismatched tensor before reporting it.
    """
    shapes = check_files(source)
    if shapes:  # none: not downloaded yet
        compare_sizes(source, config, shapes)


def compare_sizes(source: object, config: Any, shapes: Shapes) -> None:
    """Raise InputError if a model of ``config`` is larger than tensors of these shapes."""
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = {name: parameter for name, parameter in model.named_parameters() if name not in tied}
    for name, parameter in wanted.items():
        if name in shapes and shapes[name] != tuple(parameter.shape) and parameter.numel() > math.prod(shapes[name]):
            found, size = (" x ".join(map(str, shape)) for shape in (shapes[name], parameter.shape))
            raise InputError(
                f"{source} has mismatched keys: {name}; repair the model ({found} in its files, {size} in config.json)"
            )
    stored = sum(math.prod(shape) for shape in shapes.values())
    for what, tensors in (("weights", wanted.values()), ("buffers", model.buffers())):
        count = sum(tensor.numel() for tensor in tensors)
        if count > LARGER * stored + SMALL:
            raise InputError(
                f"{source} has {stored:,} numbers in its files, but {count:,} {what} according to config.json; "
                "repair the sizes in config.json"
            )


def check_loaded(info: Mapping[str, Any], source: object, problems: Iterable[str], remedy: str) -> None:
    """Raise InputError if loading met one of ``problems``: a weight missing, mismatched or unused."""
    for problem in problems:
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in info[problem])
        if names:
            raise InputError(f"{source} has {problem.replace('_', ' ')}: {names[0]}; {remedy}")


def check_unused_tensors(model: Model, source: object, info: Mapping[str, Any]) -> None:
    """Raise InputError if the files hold tensors that the model does not use."""
    config = model.config.get_text_config()
    extra = next((n for key in PREDICTING if isinstance(n := getattr(config, key, None), int)), 0)
    names = [str(key) for key in info["unexpected_keys"]]
    check_unused(source, names, cls=type(model).__name__, layers=config.num_hidden_layers, extra=extra)


def check_dtypes(source: Path | str) -> None:
    """Raise InputError for weights that are not floats; a local directory's safetensors files were checked already."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = {name: cached_file(str(source), name, **quiet) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)}
    for path in found.values():
        if path:
            check_stored(source, read_headers(Path(path).parent))
            return
    single = cached_file(str(source), WEIGHTS_NAME, **quiet)
    index = None if single else cached_file(str(source), WEIGHTS_INDEX_NAME, **quiet)
    for path in [single] if single else get_checkpoint_shard_files(str(source), index)[0] if index else []:
        tensors = load_state_dict(path, map_location="meta")
        check_stored(source, {name: FLOATS.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()})
