"""Hugging Face models in training and evaluation: the one file that imports transformers.

A float model keeps its own classes; we only write other numbers into its parameters. Where a weight of the checkpoint
lies inside the model's parameters is a View: for an ordinary linear the whole parameter, for fused mixture-of-experts
tensors [E, 2I, H] a strided part of it. Views are found by sending index tensors through transformers' own
checkpoint conversion, so every family that transformers can save is covered and none is named here.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from matquant.errors import InputError
from matquant.tensor import NestedTensor

Model = Any  # a transformers PreTrainedModel
SIDE_FILES = (
    *("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model"),
    *("tokenizer_config.json", "vocab.json", "vocab.txt", "chat_template.jinja", "generation_config.json"),
)


@dataclass(frozen=True, kw_only=True)
class View:
    """Where a weight [N, K] of the checkpoint lies in a model's parameter."""

    parameter: str
    shape: tuple[int, int]
    stride: tuple[int, int]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This weight inside ``tensor``, a contiguous tensor of the parameter's shape: no copy."""
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and advice."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def load_float(source: Path | str, *, dtype: torch.dtype | None = None) -> Model:
    """The float model of a local directory or a hub id, in evaluation mode; ``dtype`` None keeps the file's."""
    check_model_path(source)
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(source)
            if getattr(config, "quantization_config", None):
                raise InputError(f"{source} is quantised already; give the float model it was made from")
            if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
                raise InputError(f"{source} is a {config.model_type} model, not a causal language model; give one")
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{source} cannot be loaded as a model ({(str(error) or type(error).__name__).splitlines()[0]}); "
            "give a directory with config.json and safetensors, or a hub id that this machine can reach"
        ) from None
    _check_loaded(info, source, ("missing_keys", "mismatched_keys"), "repair the model")
    return model.eval()


def _check_loaded(info: Mapping[str, Any], source: object, problems: Iterable[str], remedy: str) -> None:
    """InputError if transformers met one of ``problems`` while loading: a weight invented, misfitting or left over."""
    for problem in problems:
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in info[problem])
        if names:
            raise InputError(f"{source} has {problem.replace('_', ' ')}: {names[0]}; {remedy}")


def check_model_path(source: Path | str) -> None:
    """InputError if ``source`` is no local model and cannot be a hub id either."""
    where = Path(source)
    if where.is_dir():
        if not (where / "config.json").is_file():
            raise InputError(f"{where} has no config.json; give a Hugging Face model directory or a hub id")
    elif where.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
        raise InputError(f"{source}: no such model directory; give a Hugging Face model directory or a hub id")


def check_context(model: Model, seq_len: int) -> None:
    """InputError if ``seq_len`` is more than a model with learned positions can read (rotary ones have no end)."""
    context = model.config.get_text_config().max_position_embeddings
    learned = any(re.search(r"embed_positions|wpe|position_embeddings", name) for name, _ in model.named_parameters())
    if learned and seq_len > context:
        raise InputError(f"seq_len={seq_len} is longer than the model's context, {context}; give at most {context}")


def load_tokenizer(source: Path | str) -> Any:
    """The tokenizer beside a model."""
    try:
        with _quiet():
            return transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source} has no usable tokenizer ({str(error).splitlines()[0]}); put tokenizer.json beside the model"
        ) from None


def build_model(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, directory: Path, dtype: torch.dtype | None
) -> Model:
    """A model of ``config`` with the weights ``state`` (checkpoint names); InputError if any is missing or misfits."""
    with _quiet():
        parsed = transformers.AutoConfig.for_model(**dict(config))
        cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
        try:
            model, info = cls.from_pretrained(
                None, config=parsed, state_dict=dict(state), dtype=dtype or parsed.dtype, output_loading_info=True
            )
        except RuntimeError as error:
            raise InputError(
                f"{directory} does not fit its config.json ({str(error).splitlines()[0]}); write the checkpoint again"
            ) from None
        problems = ("missing_keys", "mismatched_keys", "unexpected_keys")
        _check_loaded(info, directory, problems, "write the checkpoint again")
        with contextlib.suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    model.config.name_or_path = str(directory)
    return model.eval()


def side_files(source: Path | str) -> dict[str, bytes]:
    """Tokenizer and generation files that belong to a model, by name; empty for a hub id."""
    return {name: (Path(source) / name).read_bytes() for name in SIDE_FILES if (Path(source) / name).is_file()}


# ---------------------------------------------------------------------------------------------------------- weights


def linear_views(model: Model) -> dict[str, View]:
    """Every linear weight under the decoder layers, by its module path in the checkpoint.

    Fused experts come out as one path per expert and projection. Routers, embeddings and the head are left out.
    """
    layers = _layer_prefixes(model)
    views: dict[str, View] = {}
    for module_name, module in model.named_modules():
        if not module_name.startswith(layers):
            continue
        if isinstance(module, torch.nn.Linear):
            views.update(_checkpoint_views(model, f"{module_name}.weight", module.weight))
        elif module_name.rsplit(".", 1)[-1] == "experts":
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    views.update(_checkpoint_views(model, f"{module_name}.{name}", parameter))
    return {path: view for path, view in views.items() if path.rsplit(".", 1)[-1] not in ("gate", "router")}


def unquantised_linears(model: Model, views: Mapping[str, View]) -> list[str]:
    """Names of the linear modules that are not among ``views``."""
    taken = {view.parameter for view in views.values()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in taken
    ]


def plain_items(
    model: Model, views: Mapping[str, View], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Any]]:
    """The tensors that are not quantised, under their checkpoint names, as numpy arrays, tied copies left out."""
    taken = {view.parameter for view in views.values()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict().items():
        if name not in taken and name not in tied:
            stored = tensor.detach().to(dtypes.get(name, tensor.dtype))
            for key, value in revert_weight_conversion(model, {name: stored}).items():
                yield key, to_numpy(value)


def write_weights(model: Model, views: Mapping[str, View], weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy weights [N, K], by path, into the model's parameters."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, weight in weights:
            view = views[path]
            view.of(parameters[view.parameter]).copy_(weight)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array of the same numbers; bfloat16 as ml_dtypes.bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The reverse of ``to_numpy``; a copy, so that it may be written to."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def nested_to_numpy(tensor: NestedTensor) -> NestedTensor:
    """The same nested tensor with numpy arrays."""
    return _convert(tensor, to_numpy)


def nested_to_torch(tensor: NestedTensor) -> NestedTensor:
    """The same nested tensor with torch tensors."""
    return _convert(tensor, to_torch)


def _convert(tensor: NestedTensor, convert: Callable[[Any], Any]) -> NestedTensor:
    return dataclasses.replace(
        tensor,
        codes=convert(tensor.codes),
        scale=convert(tensor.scale),
        zero=convert(tensor.zero),
        slices={bits: (convert(scale), convert(zero)) for bits, (scale, zero) in tensor.slices.items()},
    )


def _layer_prefixes(model: Model) -> tuple[str, ...]:
    depth = model.config.get_text_config().num_hidden_layers
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth and name.count(".") < 4
    )


def _checkpoint_views(model: Model, name: str, parameter: torch.Tensor) -> dict[str, View]:
    index = torch.arange(parameter.numel()).view(parameter.shape)
    views = {}
    for key, part in revert_weight_conversion(model, {name: index}).items():
        if part.ndim != 2:
            raise InputError(f"{name} is stored as {tuple(part.shape)}, not as matrices; exclude this path")
        rows, columns = part.shape
        offset = int(part[0, 0])
        stride = (int(part[1, 0]) - offset if rows > 1 else columns, int(part[0, 1]) - offset if columns > 1 else 1)
        view = View(parameter=name, shape=(rows, columns), stride=stride, offset=offset)
        assert torch.equal(view.of(index), part), f"{key} is not a strided part of {name}"
        views[key.removesuffix(".weight")] = view
    return views
