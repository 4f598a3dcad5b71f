"""Quantise one decoder layer at a time, so that a model may be larger than memory.

A block is read from the shards in float32, solved by a method, written to ``work/blocks`` and dropped; the quantised
block computes the input of the next one. Memory holds one block, the method's data for it, and the calibration text's
hidden states (samples x seq_len x hidden_size x 4 bytes for each stream), however deep the model is. A *stream* is the
hidden states of the float model (FLOAT) or of the model read at one width.

A resumed run loads the finished blocks instead of solving them and computes the streams again with them, so its result
is bit-identical to that of an uninterrupted run.
"""

import contextlib
import ctypes
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from matquant.core.grid import check_finite
from matquant.core.nest import UNIFORM
from matquant.core.tensor import NestedTensor
from matquant.hf.text import cut_windows
from matquant.hf_torch.layers import decoder_layers
from matquant.hf_torch.layerwise import Call, embed
from matquant.hf_torch.views import View, write_weights
from matquant.methods.parts.job import LOG, Job, fingerprint
from matquant.methods.parts.sealed import open_sealed, save_sealed
from matquant.options.objective import FLOAT
from matquant.system.errors import InputError
from matquant.system.files import json_text, write_atomically
from matquant.system.interrupted import check_same_run, claim

BLOCKS = "blocks"
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A decoder layer to be solved, and its inputs.

    B sequences, T tokens, H hidden size.
    """

    index: int  # index of the decoder layer, from 0
    count: int  # decoder layers of the model
    name: str  # module name of the layer
    module: torch.nn.Module  # the layer with its float32 weights, not to be changed
    views: Mapping[str, View]  # path -> linear layer to quantise
    inputs: Mapping[int, Sequence[torch.Tensor]]  # stream -> batches [B, T, H]
    call: Call  # runs the module on hidden states [B, T, H]
    config: Any  # transformers' configuration of the model


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A quantised decoder layer."""

    nested: Mapping[str, NestedTensor]  # path -> nested weight
    plain: Mapping[str, torch.Tensor] = field(default_factory=dict)  # parameter name -> changed float tensor
    record: Mapping[str, Any] = field(default_factory=dict)  # for the log: losses, a notice


Solve = Callable[[Job, Block], Solved]


def run_blocks(
    job: Job,
    solve: Solve,
    *,
    streams: Sequence[int],
    tokens: torch.Tensor,
    batch_size: int,
    settings: Mapping[str, Any],
) -> Iterator[tuple[str, NestedTensor]]:
    """Solve every block in order, then return the nested tensors, one at a time, from ``work/blocks``.

    tokens: calibration text, int64 [samples, T]. settings: values that a resumed run must share, besides the job's.
    """
    mark = fingerprint(job, settings)
    layers = decoder_layers(job.model)
    folder = job.work / BLOCKS
    if job.resume:
        claim(job.work, mark, resume=True)
        for file in folder.glob("*.safetensors"):
            _load(file, mark, device=CPU)  # reject another run's blocks, or damaged ones, before any work
    hidden, calls = _embed(job, tokens, batch_size)
    _check_states(hidden, "the embedding", FLOAT)
    if not job.resume:
        claim(job.work, mark, resume=False)
    folder.mkdir(parents=True, exist_ok=True)
    flowing = {stream: list(hidden) for stream in streams}
    del hidden
    records: list[Mapping[str, Any]] = []
    for index, (name, module) in enumerate(layers):
        file = folder / f"{index:05d}.safetensors"
        views = {path: view for path, view in job.views.items() if view.parameter.startswith(f"{name}.")}
        began = time.perf_counter()
        _materialise(job, name, module)
        if not file.is_file():
            block = Block(
                index=index,
                count=len(layers),
                name=name,
                module=module,
                views=views,
                inputs=flowing,
                call=calls[index],
                config=job.model.config,
            )
            _solve_and_save(job, solve, block, file, mark, began=began)
        solved = _load(file, mark, device=job.device)
        records.append(solved.record)
        job.report(dict(solved.record))
        if index + 1 < len(layers):
            for stream in streams:
                _advance(job, solved, module, calls[index], views, flowing[stream], stream)
                _check_states(flowing[stream], name, stream)
        _release(module)
        del solved
        _give_memory_back()
    write_atomically(job.work / LOG, "".join(json_text(record, sort_keys=False) + "\n" for record in records).encode())
    return _finished(job, len(layers), mark)


def read_tensor(job: Job, name: str) -> torch.Tensor:
    """Read a tensor that is not quantised, with the changes of solved blocks."""
    layer = next((i for i, (prefix, _) in enumerate(decoder_layers(job.model)) if name.startswith(f"{prefix}.")), None)
    if layer is not None:
        with safe_open(job.work / BLOCKS / f"{layer:05d}.safetensors", "pt") as file:
            if f"plain/{name}" in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                tensor: torch.Tensor = file.get_tensor(f"plain/{name}").clone()
                return tensor
    return _read(job, name)


def calibration(job: Job, *, samples: int, seq_len: int, seed: int) -> torch.Tensor:
    """Return ``samples`` sequences of the job's text in a seeded order, int64 [samples, seq_len]."""
    windows = cut_windows(job.stream, seq_len)
    if len(windows) < samples:
        raise InputError(
            f"samples={samples} sequences of {seq_len} tokens need {samples * seq_len + 1:,} tokens, the text has "
            f"{len(job.stream):,}; give more text, --samples {len(windows)} or a smaller --seq-len"
        )
    chosen = np.random.default_rng(seed).permutation(len(windows))[:samples]
    return torch.from_numpy(windows[chosen][:, :-1])


# -------------------------------------------------------------------------------------------------------- one block


def _solve_and_save(job: Job, solve: Solve, block: Block, file: Path, mark: Mapping[str, Any], *, began: float) -> None:
    """Solve one block and write it to ``file``. began: start time of reading its weights, for the log."""
    solved = solve(job, block)
    check_losses({int(bits): loss for bits, loss in solved.record.get("loss", {}).items()}, block.name)
    record = {**solved.record, "step": block.index + 1, "steps": block.count, "block": block.name}
    _save(file, solved, record | {"seconds": round(time.perf_counter() - began, 2)}, mark, job)


def _embed(job: Job, tokens: torch.Tensor, batch_size: int) -> tuple[list[torch.Tensor], list[Call]]:
    inside = tuple(f"{name}." for name, _ in decoder_layers(job.model))
    decoder = job.model.get_decoder()
    prefix = next(f"{name}." if name else "" for name, module in job.model.named_modules() if module is decoder)
    outside = [name for name, _ in decoder.named_parameters() if not f"{prefix}{name}".startswith(inside)]
    for name in outside:
        _set_parameter(decoder, name, _read(job, f"{prefix}{name}").float().to(job.device))
    for name, buffer in decoder.named_buffers():
        _set(decoder, name, buffer.to(job.device))
    parts = (tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size))
    result = embed(job.model, (part.to(job.device) for part in parts))
    for name in outside:
        _set_parameter(decoder, name, decoder.get_parameter(name).detach().to("meta"))
    return result


def _advance(
    job: Job,
    solved: Solved,
    module: torch.nn.Module,
    call: Call,
    views: Mapping[str, View],
    hidden: list[torch.Tensor],
    stream: int,
) -> None:
    """Replace a stream's hidden states by the block's outputs. The float stream comes first: others change weights."""
    if stream != FLOAT:
        parameters = dict(job.model.named_parameters())
        with torch.no_grad():
            for name, tensor in solved.plain.items():
                parameters[name].copy_(tensor)
        write_weights(job.model, views, ((path, tensor.read(stream)) for path, tensor in solved.nested.items()))
    with torch.no_grad():
        for number, states in enumerate(hidden):
            hidden[number] = call(module, states)


def check_losses(losses: Mapping[int, float], name: str) -> None:
    """Raise InputError naming the block and the width if a loss is not finite."""
    for bits, loss in losses.items():
        if not math.isfinite(loss):
            raise InputError(
                f"the loss of {name} at {bits} bits is {loss}: its weights or inputs are too large to square; "
                "scale or repair the float model, or use --method rtn"
            )


def _check_states(hidden: Iterable[torch.Tensor], name: str, stream: int) -> None:
    """Raise InputError naming the block and the width if hidden states are not finite."""
    if not all(bool(torch.isfinite(states).all()) for states in hidden):
        width = "the float model" if stream == FLOAT else f"int{stream}"
        raise InputError(
            f"the output of {name} is not finite in {width}; check the float model with matquant eval --reference, "
            "or exclude this block with --exclude"
        )


def _materialise(job: Job, name: str, module: torch.nn.Module) -> None:
    for local, _ in list(module.named_parameters()):
        _set_parameter(module, local, _read(job, f"{name}.{local}").float().to(job.device))


def _release(module: torch.nn.Module) -> None:
    for local, parameter in list(module.named_parameters()):
        _set_parameter(module, local, parameter.detach().to("meta"))


def _give_memory_back() -> None:
    """Return freed small blocks to the system (glibc's malloc_trim); other C libraries do so themselves."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _set_parameter(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    _set(module, name, torch.nn.Parameter(tensor, requires_grad=False))


def _set(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)


def _read(job: Job, name: str) -> torch.Tensor:
    tensor = job.read(name)
    check_finite(tensor, name=name.removesuffix(".weight"))
    return tensor


# ---------------------------------------------------------------------------------------------------- finished blocks


def _save(file: Path, solved: Solved, record: Mapping[str, Any], mark: Mapping[str, Any], job: Job) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path, nested in solved.nested.items():
        tensors |= {f"{path}/codes": nested.codes, f"{path}/scale": nested.scale, f"{path}/zero": nested.zero}
        for bits, (scale, zero) in nested.slices.items():
            tensors |= {f"{path}/{bits}/scale": scale, f"{path}/{bits}/zero": zero}
    tensors |= {f"plain/{name}": tensor.to(job.dtypes[name]) for name, tensor in solved.plain.items()}
    metadata = {"fingerprint": json_text(mark), "record": json_text(record, sort_keys=False)}
    save_sealed(file, tensors, metadata)


def _load(file: Path, mark: Mapping[str, Any], *, device: torch.device) -> Solved:
    """Load a finished block; InputError if the file is damaged or belongs to another run."""
    with open_sealed(file, remedy="delete it to solve this block again") as (stored, metadata):
        check_same_run(json.loads(metadata["fingerprint"]), mark)
        tensors = {name: stored.get_tensor(name).clone().to(device) for name in stored.keys()}  # noqa: SIM118
    rule = mark["rule"]
    nested, plain = {}, {}
    for name in [name for name in tensors if name.endswith("/codes")]:
        path = name.removesuffix("/codes")
        widths = [int(key.split("/")[1]) for key in tensors if key.startswith(f"{path}/") and key.count("/") == 2]
        slices = {
            bits: (tensors[f"{path}/{bits}/scale"], tensors[f"{path}/{bits}/zero"]) for bits in sorted(set(widths))
        }
        nested[path] = NestedTensor(
            codes=tensors[name],
            scale=tensors[f"{path}/scale"],
            zero=tensors[f"{path}/zero"],
            rule=rule,
            slices=slices,
            grid=mark.get("grid", UNIFORM),
        )
    for name, tensor in tensors.items():
        if name.startswith("plain/"):
            plain[name.removeprefix("plain/")] = tensor
    return Solved(nested=nested, plain=plain, record=json.loads(metadata["record"]))


def _finished(job: Job, count: int, mark: Mapping[str, Any]) -> Iterator[tuple[str, NestedTensor]]:
    for index in range(count):
        yield from _load(job.work / BLOCKS / f"{index:05d}.safetensors", mark, device=CPU).nested.items()
