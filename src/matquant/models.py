"""Hugging Face models in training and evaluation: the one file that imports transformers.

A float model keeps its own classes; we only write other numbers into its parameters. Where a weight of the checkpoint
lies inside the model's parameters is a View: for an ordinary linear the whole parameter, for fused mixture-of-experts
tensors [E, 2I, H] a strided part of it. Views are found by sending index tensors through transformers' own
checkpoint conversion, so every family that transformers can save is covered and none is named here.
"""

import contextlib
import dataclasses
import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from matquant.errors import InputError
from matquant.tensor import NestedTensor

Model = Any  # a transformers PreTrainedModel
Call = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]  # runs a decoder layer on hidden states
CONTEXT = 2048  # tokens
PER_SEQUENCE = ("bloom", "xglm")  # model types whose layers take arguments of the size of the batch


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
    with _loading(source):
        config = _float_config(source)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    _check_loaded(info, source, ("missing_keys", "mismatched_keys"), "repair the model")
    return model.eval()


@contextlib.contextmanager
def _loading(source: Path | str) -> Iterator[None]:
    """Loading from ``source`` without transformers' noise; its errors in our words."""
    check_model_path(source)
    try:
        with _quiet():
            yield
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{source} cannot be loaded as a model ({(str(error) or type(error).__name__).splitlines()[0]}); "
            "give a directory with config.json and safetensors, or a hub id that this machine can reach"
        ) from None


def _float_config(source: Path | str) -> Any:
    config = transformers.AutoConfig.from_pretrained(source)
    if getattr(config, "quantization_config", None):
        raise InputError(f"{source} is quantised already; give the float model it was made from")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{source} is a {config.model_type} model, not a causal language model; give one")
    return config


def hidden_size(source: Path | str) -> int:
    """How wide the hidden states of a model are, from its configuration alone."""
    with _loading(source):
        return int(_float_config(source).get_text_config().hidden_size)


def _check_loaded(info: Mapping[str, Any], source: object, problems: Iterable[str], remedy: str) -> None:
    """InputError if transformers met one of ``problems`` while loading: a weight invented, misfitting or left over."""
    for problem in problems:
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in info[problem])
        if names:
            raise InputError(f"{source} has {problem.replace('_', ' ')}: {names[0]}; {remedy}")


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A float model whose tensors are read when asked for; ``model`` may have no numbers of its own.

    read: parameter or buffer name -> tensor of the stored dtype. dtypes: the same names -> that dtype.
    """

    model: Model
    read: Callable[[str], torch.Tensor]
    dtypes: Mapping[str, torch.dtype]


def open_shards(source: Path | str) -> Shards:
    """Open a model for reading tensor by tensor from its safetensors shards.

    A model that has none, or names its tensors in a way of its own, is loaded whole and read from memory.
    """
    with _loading(source):
        config = _float_config(source)
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.config.name_or_path = str(source)
        files = _shard_files(source)
        parameters = dict(model.named_parameters())
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        stored = {name: _stored(model, name, p) for name, p in parameters.items() if name not in tied}
        if not all(key in files for parts, _ in stored.values() for key in parts):
            return _whole(load_float(source))
        dtypes: dict[str, torch.dtype] = {}
        for name, (parts, _) in stored.items():
            for key, part in parts.items():
                found, dtype = files[key][1:]
                if found != tuple(part.shape):
                    raise InputError(f"{source} has mismatched keys: {key}; repair the model")
                dtypes[name] = config.dtype or dtype
    buffers: dict[str, torch.Tensor] = dict(model.named_buffers())

    def read_key(key: str) -> torch.Tensor:
        with safe_open(files[key][0], "pt") as file:  # closed again: an open one keeps what was read in memory
            tensor: torch.Tensor = file.get_tensor(key).clone()
        return tensor

    def read(name: str) -> torch.Tensor:
        if name in buffers:
            return buffers[name]
        parts, renamed = stored[name]
        if renamed:
            return read_key(next(iter(parts))).to(dtypes[name])
        tensor = torch.empty(parameters[name].shape, dtype=dtypes[name])
        for path, view in _checkpoint_views(model, name, parameters[name]).items():
            view.of(tensor).copy_(read_key(f"{path}.weight"))
        return tensor

    return Shards(model=model, read=read, dtypes=dtypes)


def _whole(model: Model) -> Shards:
    state = model.state_dict()
    return Shards(model=model, read=state.__getitem__, dtypes={name: tensor.dtype for name, tensor in state.items()})


def _shard_files(source: Path | str) -> dict[str, tuple[str, tuple[int, ...], torch.dtype]]:
    """Tensor name -> (its safetensors file, shape, dtype); empty if the model is stored in another way."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    single = cached_file(str(source), SAFE_WEIGHTS_NAME, **missing)
    index = None if single else cached_file(str(source), SAFE_WEIGHTS_INDEX_NAME, **missing)
    found = {}
    for path in [single] if single else get_checkpoint_shard_files(str(source), index)[0] if index else []:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                stored = file.get_slice(key)
                first = stored[tuple(slice(0, 1) for _ in stored.get_shape())]
                found[key] = (path, tuple(stored.get_shape()), first.dtype)
    return found


def _stored(model: Model, name: str, parameter: torch.Tensor) -> tuple[dict[str, torch.Tensor], bool]:
    """What a checkpoint has of a parameter, on meta, and whether that is the parameter itself, under whatever name."""
    whole = parameter.detach().to("meta")
    parts = revert_weight_conversion(model, {name: whole})
    return parts, len(parts) == 1 and whole is next(iter(parts.values()))


# ------------------------------------------------------------------------------------------------------------- layers


def decoder_layers(model: Model) -> list[tuple[str, torch.nn.Module]]:
    """(module name, module) of each decoder layer, in order."""
    decoder, depth = model.get_decoder(), model.config.get_text_config().num_hidden_layers
    found = (module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth)
    layers = next(found)
    (prefix,) = (name for name, module in model.named_modules() if module is layers)
    return [(f"{prefix}.{index}", layer) for index, layer in enumerate(layers)]


def embed(model: Model, batches: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], list[Call]]:
    """What flows into the first decoder layer, [B, T, H] per batch of token ids [B, T], and how each layer is called.

    The layers themselves are not run and may be empty; the rest of the decoder must have its numbers. All batches must
    be of one length: positions and masks are those of the first sequence.
    """
    if model.config.model_type in PER_SEQUENCE:
        raise InputError(
            f"{type(model).__name__} asked to run layer by layer, but it gives layers an argument for each sequence; "
            "use --method qat or rtn, and --strategy pyramid for plans"
        )
    layers, batches = [layer for _, layer in decoder_layers(model)], list(batches)
    hand_on = _hand_on(model, batches[0][:1, :1])
    hidden: list[torch.Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def first(states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        hidden.append(states.detach())
        return hand_on(states)

    def later(states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        arguments.append((rest, named))
        return hand_on(states)

    decoder = model.get_decoder()
    with torch.no_grad():
        with _replaced(layers, [later] * len(layers)):
            decoder(input_ids=batches[0][:1], use_cache=False)
        with _replaced(layers, [first] + [lambda states, *_, **__: hand_on(states)] * (len(layers) - 1)):
            for tokens in batches:
                decoder(input_ids=tokens, use_cache=False)

    def call(rest: tuple[Any, ...], named: dict[str, Any]) -> Call:
        return lambda layer, states: layer_output(layer(states, *rest, **named))

    return hidden, [call(rest, named) for rest, named in arguments]


def layer_output(output: Any) -> torch.Tensor:
    """The hidden states [B, T, H] in what a decoder layer returns: these, or a tuple that begins with them."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


_READS_TUPLES: dict[type, bool] = {}  # by class of decoder, which is asked once


def _hand_on(model: Model, token: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """How a layer must return hidden states for the decoder to read them: as they are, or in a tuple (Falcon)."""
    decoder = model.get_decoder()
    if type(decoder) not in _READS_TUPLES:
        layers = [layer for _, layer in decoder_layers(model)]
        with torch.no_grad(), _replaced(layers, [lambda states, *_, **__: (states, None)] * len(layers)):
            try:
                read = decoder(input_ids=token, use_cache=False)[0]
            except (AttributeError, TypeError):  # of the norm after the layers, which was given the tuple
                read = None
        _READS_TUPLES[type(decoder)] = isinstance(read, torch.Tensor)
    return (lambda states: (states, None)) if _READS_TUPLES[type(decoder)] else (lambda states: states)


def finish(model: Model, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, vocab] of what flows out of the last decoder layer, [B, T, H], for token ids [B, T]."""
    layers, hand_on = [layer for _, layer in decoder_layers(model)], _hand_on(model, tokens[:1, :1])
    with torch.no_grad(), _replaced(layers, [lambda *_, **__: hand_on(states)] * len(layers)):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@contextlib.contextmanager
def _replaced(modules: Sequence[torch.nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Modules with other forward functions."""
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def bf16_is_fast() -> bool:
    """Whether this processor multiplies bf16 in hardware.

    Elsewhere torch emulates it: a training step of the embedded model took 17 times as long as in fp32 (AVX2).
    """
    if platform.machine() in ("aarch64", "arm64"):
        return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def choose_device(name: str | None) -> torch.device:
    """The device of this name; None: cuda if there is one, else cpu. InputError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        found = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"device={name!r} is not there ({reason}); use one of {found}") from None


def check_model_path(source: Path | str) -> None:
    """InputError if ``source`` is no local model and cannot be a hub id either."""
    where = Path(source)
    if where.is_dir():
        if not (where / "config.json").is_file():
            raise InputError(f"{where} has no config.json; give a Hugging Face model directory or a hub id")
    elif where.is_absolute() or str(source).count("/") != 1 or str(source).startswith("."):
        raise InputError(f"{source}: no such model directory; give a Hugging Face model directory or a hub id")


def local_files(source: Path | str) -> Path | None:
    """The directory that a model is read from: itself, or a hub id's snapshot, whose name is its commit."""
    if Path(source).is_dir():
        return Path(source)
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(str(source), "config.json", **missing)
    return Path(found).parent if found else None


def context_length(model: Model) -> int:
    """The context the model was made for, in tokens; CONTEXT if its configuration names none (BLOOM, Mamba)."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", CONTEXT)))


def check_context(model: Model, seq_len: int) -> None:
    """InputError if ``seq_len`` is more than a model with learned positions can read (rotary ones have no end)."""
    context = context_length(model)
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
        parsed = _parse_config(config)
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


def _parse_config(config: Mapping[str, Any]) -> Any:
    """The configuration that a config.json holds; transformers writes infinity as {"__float__": "Infinity"} in it."""

    def decode(part: dict[str, Any]) -> Any:
        return float(part["__float__"]) if "__float__" in part else part

    return transformers.AutoConfig.for_model(**json.loads(json.dumps(dict(config)), object_hook=decode))


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that ``build_model`` gives a model of ``config`` unless told otherwise."""
    dtype: torch.dtype | None = _parse_config(config).dtype
    return dtype or torch.float32


# ---------------------------------------------------------------------------------------------------------- weights


def linear_views(model: Model) -> dict[str, View]:
    """Every linear weight under the decoder layers, by its module path in the checkpoint.

    Fused experts come out as one path per expert and projection. Routers, embeddings, the head and ``whole_experts``
    are left out.
    """
    views: dict[str, View] = {}
    for name, parameter in _weights(model):
        views.update(_checkpoint_views(model, name, parameter))
    return {path: view for path, view in views.items() if path.rsplit(".", 1)[-1] not in ("gate", "router")}


def whole_experts(model: Model) -> list[str]:
    """Names of the fused experts that a checkpoint has in one tensor (gpt-oss, Llama 4): nobody reads their codes."""
    stored = {name: _stored(model, name, weight)[0] for name, weight in _weights(model) if weight.ndim == 3}
    return [name for name, parts in stored.items() if any(part.ndim != 2 for part in parts.values())]


def _weights(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and parameter of every linear and of all fused experts under the decoder layers."""
    layers = tuple(f"{name}." for name, _ in decoder_layers(model))
    for name, module in model.named_modules():
        if not name.startswith(layers):
            continue
        if isinstance(module, torch.nn.Linear):
            yield f"{name}.weight", module.weight
        elif name.rsplit(".", 1)[-1] == "experts":
            yield from ((f"{name}.{n}", p) for n, p in module.named_parameters(recurse=False) if p.ndim == 3)


def unquantised_linears(model: Model, views: Mapping[str, View]) -> list[str]:
    """Names of the linear modules that are not among ``views``."""
    taken = {view.parameter for view in views.values()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in taken
    ]


def plain_items(
    model: Model,
    views: Mapping[str, View],
    dtypes: Mapping[str, torch.dtype],
    *,
    read: Callable[[str], torch.Tensor] | None = None,
) -> Iterator[tuple[str, Any]]:
    """The tensors that are not quantised, under their checkpoint names, as numpy arrays, tied copies left out.

    read: where their numbers are, by name; None: in the model.
    """
    taken = {view.parameter for view in views.values()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in taken and name not in tied:
            value = tensor if read is None else read(name)
            stored = value.detach().to(dtypes.get(name, value.dtype))
            for key, part in revert_weight_conversion(model, {name: stored}).items():
                yield key, to_numpy(part)


def is_linear(model: Model, view: View) -> bool:
    """Whether ``view`` is the whole weight of a plain linear, not a part of a fused tensor."""
    module = model.get_submodule(view.parameter.rpartition(".")[0])
    whole = View(parameter=view.parameter, shape=view.shape, stride=(view.shape[1], 1), offset=0)
    return type(module) is torch.nn.Linear and view == whole and tuple(module.weight.shape) == view.shape


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
    """The same nested tensor with numpy arrays; itself if it has them."""
    return tensor if isinstance(tensor.codes, np.ndarray) else _convert(tensor, to_numpy)


def nested_to_torch(tensor: NestedTensor, *, device: torch.device | str = "cpu") -> NestedTensor:
    """The same nested tensor with torch tensors on ``device``."""
    return _convert(tensor, lambda array: to_torch(array).to(device))


def _convert(tensor: NestedTensor, convert: Callable[[Any], Any]) -> NestedTensor:
    return dataclasses.replace(
        tensor,
        codes=convert(tensor.codes),
        scale=convert(tensor.scale),
        zero=convert(tensor.zero),
        slices={bits: (convert(scale), convert(zero)) for bits, (scale, zero) in tensor.slices.items()},
    )


def _checkpoint_views(model: Model, name: str, parameter: torch.Tensor) -> dict[str, View]:
    """The matrices of the checkpoint in a parameter, by module path; empty if it is stored in another form."""
    parts, renamed = _stored(model, name, parameter)
    if any(part.ndim != 2 for part in parts.values()):
        return {}
    if renamed:
        (key,), (rows, columns) = parts, parameter.shape
        return {key.removesuffix(".weight"): View(parameter=name, shape=(rows, columns), stride=(columns, 1), offset=0)}
    index = torch.arange(parameter.numel()).view(parameter.shape)
    views = {}
    for key, part in revert_weight_conversion(model, {name: index}).items():
        rows, columns = part.shape
        offset = int(part[0, 0])
        stride = (int(part[1, 0]) - offset if rows > 1 else columns, int(part[0, 1]) - offset if columns > 1 else 1)
        view = View(parameter=name, shape=(rows, columns), stride=stride, offset=offset)
        assert torch.equal(view.of(index), part), f"{key} is not a strided part of {name}"
        views[key.removesuffix(".weight")] = view
    return views
