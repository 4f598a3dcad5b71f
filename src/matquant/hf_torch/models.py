"""Hugging Face models in training and evaluation: the one file that imports transformers.

A float model keeps its own classes; we only write other numbers into its parameters. Where a weight of the checkpoint
lies inside the model's parameters is a View: for an ordinary linear the whole parameter, for fused mixture-of-experts
tensors [E, 2I, H] a strided part of it. Views are found by sending index tensors through transformers' own
checkpoint conversion, so every family that transformers can save is covered and none is named here.
"""

import contextlib
import copy
import dataclasses
import json
import math
import platform
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import meta_device_safe_creation_ops
from transformers.modeling_utils import load_state_dict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import get_checkpoint_shard_files

from matquant.core.tensor import NestedTensor
from matquant.format.facts import GENERATION, REPAIR, read_facts
from matquant.format.manifest import listed_only, side_file
from matquant.hf.intact import Shapes, bin_files, check_readable, check_sensible, read_shapes
from matquant.hf.panics import check_merges, one_line
from matquant.hf.sidefiles import missing_packages, readable
from matquant.hf.source import LOADABLE, check_source
from matquant.hf.tensors import check_stored, check_unused, read_headers
from matquant.hf_torch.ties import (
    Files,
    Parts,
    head_name,
    plain_names,
    read_key,
    record_ties,
    resolve_ties,
    tied_weights,
)
from matquant.system.errors import InputError

Model = Any  # a transformers PreTrainedModel
Call = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]  # runs a decoder layer on hidden states
CONTEXT = 2048  # tokens
PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")  # of config.json
FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"}
LARGER, SMALL = 3, 2**26  # a model may have so many times the numbers in its files, and so many more (masks, tables)
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
    with _loading(source), readable(source) as place:
        config = _float_config(source)
        _check_fits(source, config)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
        _check_dtypes(source)
    model.config.name_or_path = str(source)
    head = head_name(model)
    remedy = "repair the model"
    if info["missing_keys"] == {head}:
        remedy = f'add it, or "tie_word_embeddings": true to {CONFIG_NAME} if the head is the embedding'
    _check_loaded(info, source, ("missing_keys", "mismatched_keys"), remedy)
    _check_unused(model, source, info)
    record_ties(model)
    return model.eval()


@contextlib.contextmanager
def _loading(source: Path | str) -> Iterator[None]:
    """Loading from ``source`` without transformers' noise; its errors in our words."""
    check_source(source)
    try:
        with _quiet():
            yield
    except InputError:
        raise
    except Exception as error:  # of every kind: transformers and torch read files that anyone may have written
        raise InputError(f"{source} cannot be loaded as a model ({_reason(error)}); {LOADABLE}") from None


def _reason(error: Exception) -> str:
    """What went wrong, on one line: the first one, or of transformers' checks of a configuration the second."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__.startswith("StrictDataclass") and len(lines) > 1:
        return lines[1].partition(": ")[2] or lines[1]  # after "Class validation error for validator"
    return lines[0] if lines else type(error).__name__


def _check_files(source: Path | str) -> Shapes:
    """The shapes of what a model stores, after looking for damage and for values that make no sense."""
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
        except Exception:  # of every kind; torch's own words advise to run what the file says
            raise ValueError(f"{file} is damaged, or no file of tensors that torch.save wrote") from None
        shapes |= {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    check_sensible(directory, tensors=len(shapes))
    return shapes


def _check_fits(source: Path | str, config: Any) -> None:
    """InputError if a model of ``config`` is larger than the tensors in its files: found out without any memory.

    transformers gives memory to every tensor that is missing or misfits, before it says so.
    """
    shapes = _check_files(source)
    if shapes:  # none: not downloaded yet
        _compare_sizes(source, config, shapes)


def _compare_sizes(source: object, config: Any, shapes: Shapes) -> None:
    """InputError if a model of ``config`` is larger than tensors of these shapes."""
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wanted = {name: parameter for name, parameter in model.named_parameters() if name not in tied}
    for name, parameter in wanted.items():
        if name in shapes and shapes[name] != tuple(parameter.shape) and parameter.numel() > math.prod(shapes[name]):
            found, size = (" x ".join(map(str, shape)) for shape in (shapes[name], parameter.shape))
            raise InputError(
                f"{source} has mismatched keys: {name}; repair the model ({found} in its files, {size} by config.json)"
            )
    stored = sum(math.prod(shape) for shape in shapes.values())
    for what, tensors in (("weights", wanted.values()), ("buffers", model.buffers())):
        count = sum(tensor.numel() for tensor in tensors)
        if count > LARGER * stored + SMALL:
            raise InputError(
                f"{source} has {stored:,} numbers in its files, the {what} by its config.json are {count:,}; "
                "repair the sizes in config.json"
            )


def _float_config(source: Path | str) -> Any:
    _check_files(source)
    with readable(source) as place:
        config = transformers.AutoConfig.from_pretrained(place)
    config.name_or_path = str(source)
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
        _check_fits(source, config)
        with init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        model.config.name_or_path = str(source)
        files = _shard_files(source)
        parameters = {name: model.get_parameter(name) for name in (*_names(model), *tied_weights(model))}
        stored = {name: _stored(model, name, p) for name, p in parameters.items()}
        stored |= plain_names(model, stored, files)
        known = {key for parts, _ in stored.values() for key in parts}
        stored = resolve_ties(model, stored, files, config.dtype)
        if not all(key in files for parts, _ in stored.values() for key in parts):
            return _whole(load_float(source))
        _check_dtypes(source)
        if not files.keys() <= known:
            _check_unused(model, source, _read_info(model, files))
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
        for path, view in _checkpoint_views(model, name, parameters[name]).items():
            view.of(tensor).copy_(read_key(files, f"{path}.weight"))
        return tensor

    return Shards(model=model, read=read, dtypes=dtypes)


def _whole(model: Model) -> Shards:
    state = model.state_dict()
    return Shards(model=model, read=state.__getitem__, dtypes={name: tensor.dtype for name, tensor in state.items()})


def _names(model: Model) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _read_info(model: Model, files: Files) -> Mapping[str, Any]:
    """What transformers would say of tensors with these names and shapes: it loads them without numbers."""
    state = {key: torch.empty(shape, dtype=dtype, device="meta") for key, (_, shape, dtype) in files.items()}
    options = {"dtype": model.config.dtype, "ignore_mismatched_sizes": True, "device_map": "meta"}
    _, info = type(model).from_pretrained(
        None, config=copy.deepcopy(model.config), state_dict=state, output_loading_info=True, **options
    )
    return info  # type: ignore[no-any-return]


def _check_unused(model: Model, source: object, info: Mapping[str, Any]) -> None:
    """InputError if the files hold tensors that the model does not use."""
    config = model.config.get_text_config()
    extra = next((n for key in PREDICTING if isinstance(n := getattr(config, key, None), int)), 0)
    names = [str(key) for key in info["unexpected_keys"]]
    check_unused(source, names, cls=type(model).__name__, layers=config.num_hidden_layers, extra=extra)


def _check_dtypes(source: Path | str) -> None:
    """InputError for weights that are no floats; of a local directory's safetensors files this is known already."""
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


def _shard_files(source: Path | str) -> Files:
    """Tensor name -> (its safetensors file, shape, dtype); empty if the model is stored in another way."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with readable(source) as place:
        single = cached_file(str(place), SAFE_WEIGHTS_NAME, **missing)
        index = None if single else cached_file(str(place), SAFE_WEIGHTS_INDEX_NAME, **missing)
        paths = [single] if single else get_checkpoint_shard_files(str(place), index)[0] if index else []
        paths = [str(Path(path).resolve()) for path in paths]  # of links that are gone later
    found = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                stored = file.get_slice(key)
                first = stored[tuple(slice(0, 1) for _ in stored.get_shape())]
                found[key] = (path, tuple(stored.get_shape()), first.dtype)
    return found


def _stored(model: Model, name: str, parameter: torch.Tensor) -> Parts:
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


def context_length(model: Model) -> int:
    """The context the model was made for, in tokens; CONTEXT if its configuration names none (BLOOM, Mamba)."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return int(found or CONTEXT)


def check_context(model: Model, seq_len: int) -> None:
    """InputError if ``seq_len`` is more than a model with learned positions can read (rotary ones have no end)."""
    context = context_length(model)
    learned = any(re.search(r"embed_positions|wpe|position_embeddings", name) for name, _ in model.named_parameters())
    if learned and seq_len > context:
        raise InputError(f"seq_len={seq_len} is longer than the model's context, {context}; give at most {context}")


def load_tokenizer(source: Path | str) -> Any:
    """The tokenizer beside a model; InputError if there is none, or a package that transformers needs for it."""
    check_merges(Path(source) / "tokenizer.json")
    there = (Path(source) / "tokenizer.json").is_file()
    remedy = "repair its tokenizer files" if there else "put tokenizer.json beside the model"
    try:
        with (
            _quiet(),
            listed_only(Path(source)) as where,
            readable(source if where == Path(source) else where) as place,
            one_line(f"{source} has no usable tokenizer", remedy),
        ):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            tokenizer.decode(tokenizer.encode("a b"))  # some damage shows only now
            tokenizer.name_or_path = str(source)
    except InputError:
        missing = missing_packages(source)
        if missing is None:
            raise
        raise InputError(
            f"{source} has its tokenizer in {missing.file}, which transformers needs {missing.packages} to read; "
            f"pip install {missing.packages}, or put tokenizer.json beside the model"
        ) from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of no files at all
        raise InputError(f"{source} has no usable tokenizer (no vocabulary); put tokenizer.json beside the model")
    return tokenizer


def build_model(
    config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, directory: Path, dtype: torch.dtype | None
) -> Model:
    """A model of ``config`` with the weights ``state`` (checkpoint names); InputError if any is missing or misfits."""
    with _quiet():
        parsed = _parse_config(config)
        try:
            cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)]
            _compare_sizes(directory, parsed, {name: tuple(tensor.shape) for name, tensor in state.items()})
            model, info = cls.from_pretrained(
                None, config=parsed, state_dict=dict(state), dtype=dtype or parsed.dtype, output_loading_info=True
            )
        except InputError:
            raise
        except Exception as error:  # of every kind, as in _loading
            raise InputError(
                f"{directory} does not fit its config.json ({_reason(error)}); write the checkpoint again"
            ) from None
        problems = ("missing_keys", "mismatched_keys", "unexpected_keys")
        _check_loaded(info, directory, problems, "write the checkpoint again")
        model.generation_config = _generation_config(directory) or model.generation_config
    model.config.name_or_path = str(directory)
    return model.eval()


def _parse_config(config: Mapping[str, Any]) -> Any:
    """The configuration that a config.json holds; transformers writes infinity as {"__float__": "Infinity"} in it."""

    def decode(part: dict[str, Any]) -> Any:
        return float(part["__float__"]) if "__float__" in part else part

    try:
        return transformers.AutoConfig.for_model(**json.loads(json.dumps(dict(config)), object_hook=decode))
    except Exception as error:  # of every kind, as in _loading
        raise InputError(f"config.json describes no model ({_reason(error)}); repair it") from None


def _generation_config(directory: Path) -> Any:
    """transformers' generation settings beside a checkpoint, None if there are none; InputError for wrong ones."""
    file = side_file(directory, GENERATION_CONFIG_NAME)
    if file is None:
        return None
    read_facts(file, GENERATION)
    try:
        return transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:  # of every kind, as in _loading
        raise InputError(f"{file} cannot be read ({_reason(error)}); {REPAIR}") from None


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Rows of the embedding of a model of ``config``."""
    return int(_parse_config(config).get_text_config().vocab_size)


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
