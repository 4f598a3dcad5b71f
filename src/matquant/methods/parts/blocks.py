"""Quantise one decoder layer at a time, so that a model may be larger than memory.

A block is read from the shards in float32, solved by a method, written to ``work/blocks`` and dropped; the quantised
block computes the input of the next one. Memory holds one block, the method's data for it, and the calibration text's
hidden states (samples x seq_len x hidden_size x 4 bytes for each stream), however deep the model is. A *stream* is the
hidden states of the float model (FLOAT) or of the model read at one width.

After the last block its output, through the final norm, is the head's input: a method may solve the head with it.

A resumed run loads the finished blocks instead of solving them and computes the streams again with them, so its result
is bit-identical to that of an uninterrupted run.
"""

import contextlib
import ctypes
import functools
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
from matquant.distributed.collect import gather_rows, on_first, own_rows, row_counts, sent_bytes, together
from matquant.distributed.sums import Sums
from matquant.format.side_files import LOG
from matquant.hf.text import cut_windows
from matquant.hf_torch.layers import decoder_layers, decoder_of
from matquant.hf_torch.layerwise import Call, embed, head_inputs
from matquant.hf_torch.views import View, write_weights
from matquant.methods.parts.job import Job, fingerprint
from matquant.methods.parts.sealed import open_sealed, save_sealed
from matquant.methods.parts.share import Share, check_parts, deal, pieces_of
from matquant.options.objective import FLOAT
from matquant.system import ranks
from matquant.system.errors import InputError
from matquant.system.files import json_text, write_atomically
from matquant.system.interrupted import check_same_run, claim

BLOCKS, ENDS = "blocks", "ends"
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A decoder layer to be solved, and its inputs.

    B sequences, T tokens, H hidden size.
    """

    index: int  # index of the decoder layer, from 0
    count: int  # blocks of the run: decoder layers, and one more for the head if it is solved too
    name: str  # module name of the layer
    module: torch.nn.Module  # the layer with its float32 weights, not to be changed
    views: Mapping[str, View]  # path -> linear layer to quantise
    inputs: Mapping[int, Sequence[torch.Tensor]]  # stream -> this process's pieces [B, T, H]
    share: Share  # which sequences these are
    call: Call  # runs the module on hidden states [B, T, H]
    config: Any  # transformers' configuration of the model


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A quantised decoder layer."""

    nested: Mapping[str, NestedTensor]  # path -> nested weight
    plain: Mapping[str, torch.Tensor] = field(default_factory=dict)  # parameter name -> changed float tensor
    record: Mapping[str, Any] = field(default_factory=dict)  # for the log: losses, a notice


Solve = Callable[[Job, Block], Solved]
SolveEnds = Callable[[Job, torch.Tensor], Solved]  # given the Hessian [H, H] of the head's inputs


def run_blocks(
    job: Job,
    solve: Solve,
    *,
    streams: Sequence[int],
    tokens: torch.Tensor,
    batch_size: int,
    settings: Mapping[str, Any],
    steps: bool,
    ends: SolveEnds | None = None,
) -> Iterator[tuple[str, NestedTensor]]:
    """Solve every block in order, then return the nested tensors, one at a time, from ``work/blocks``.

    tokens: calibration text, int64 [samples, T]. settings: values that a resumed run must share, besides the job's.
    steps: the method trains, so that processes share each batch. ends: solves the head after the last block, with its
    inputs on the widest stream; None: the head is not solved. Of several processes all solve, and the first one writes.
    """
    ordered = bool(settings["deterministic"])
    settings = {name: value for name, value in settings.items() if name != "deterministic" or value}
    share = deal(len(tokens), batch_size, steps=steps, ordered=ordered)
    check_parts({path: view.shape[0] for path, view in job.views.items()}, ordered=ordered)
    mark, layers, folder = fingerprint(job, settings), decoder_layers(job.model), job.work / BLOCKS
    flowing, calls = _start(job, mark, list(pieces_of(tokens, share)), streams)
    records: list[Mapping[str, Any]] = []
    files = [folder / f"{index:05d}.safetensors" for index in range(len(layers))]
    last = folder / f"{ENDS}.safetensors"
    count = len(layers) + (ends is not None)
    after_last = (max(streams),) if ends is not None and not on_first(last.is_file) else ()
    for index, ((name, module), file) in enumerate(zip(layers, files, strict=True)):
        views = {path: view for path, view in job.views.items() if view.parameter.startswith(f"{name}.")}
        began, sent = time.perf_counter(), sent_bytes()
        _fill(job, module, f"{name}.", [local for local, _ in module.named_parameters()])
        if not on_first(file.is_file):
            block = Block(
                index=index, count=count, name=name, module=module, views=views, inputs=flowing, share=share,
                call=calls[index], config=job.model.config,
            )  # fmt: skip
            at = (index + 1, count)
            found = solve(job, block) if views else Solved(nested={})  # --exclude may name all of a layer
            _save_solved(job, found, file, mark, name=name, at=at, began=began, sent=sent)
        solved = _load(file, mark, device=job.device)
        records.append(solved.record)
        job.report(dict(solved.record))
        for stream in streams if index + 1 < len(layers) else after_last:
            _advance(job, solved, module, calls[index], views, flowing[stream], stream)
            together(functools.partial(_check_states, flowing[stream], name, stream))
        _release(module)
        del solved
        _give_memory_back()
    if ends is not None:
        files.append(last)
        if not on_first(last.is_file):
            _solve_ends(job, ends, last, mark, tokens, flowing.pop(max(streams)), share, count)
        records.append(_load(last, mark, device=CPU).record)
        job.report(dict(records[-1]))
    log = "".join(json_text(record, sort_keys=False) + "\n" for record in records).encode()
    on_first(lambda: write_atomically(job.work / LOG, log))
    return (item for file in files for item in _load(file, mark, device=CPU).nested.items())


def _start(
    job: Job, mark: Mapping[str, Any], pieces: Sequence[torch.Tensor], streams: Sequence[int]
) -> tuple[dict[int, list[torch.Tensor]], list[Call]]:
    """Check the work of a resumed run, or claim the folder; return each stream's first input, and the layers' calls."""
    folder = job.work / BLOCKS

    def resume() -> None:
        claim(job.work, mark, resume=True)
        for file in folder.glob("*.safetensors"):
            _load(file, mark, device=CPU)  # reject another run's blocks, or damaged ones, before any work

    def begin() -> None:
        if not job.resume:
            claim(job.work, mark, resume=False)
        folder.mkdir(parents=True, exist_ok=True)

    if job.resume:
        on_first(resume)
    hidden, calls = _embed(job, pieces)
    together(lambda: _check_states(hidden, "the embedding", FLOAT))
    on_first(begin)
    return {stream: list(hidden) for stream in streams}, calls


def read_tensor(job: Job, name: str) -> torch.Tensor:
    """Read a tensor that is not quantised, with the changes of solved blocks."""
    layer = next((i for i, (prefix, _) in enumerate(decoder_layers(job.model)) if name.startswith(f"{prefix}.")), None)
    if layer is not None:
        with safe_open(job.work / BLOCKS / f"{layer:05d}.safetensors", "pt") as file:
            if f"plain/{name}" in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                tensor: torch.Tensor = file.get_tensor(f"plain/{name}").clone()
                return tensor
    tensor = job.read(name)
    check_finite(tensor, name=name.removesuffix(".weight"))
    return tensor


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


def _save_solved(
    job: Job,
    solved: Solved,
    file: Path,
    mark: Mapping[str, Any],
    *,
    name: str,
    at: tuple[int, int],
    began: float,
    sent: float,
) -> None:
    """Write a solved block to ``file``, in the first process.

    at: its number and how many there are; began, sent: the time, and the bytes sent to other processes, before it.
    """
    check_losses({int(bits): loss for bits, loss in solved.record.get("loss", {}).items()}, name)
    record = {**solved.record, "step": at[0], "steps": at[1], "block": name}
    record["seconds"] = round(time.perf_counter() - began, 2)
    if ranks.count() > 1:
        record["sent_mb"] = round((sent_bytes() - sent) / 1e6, 3)  # by each process
    on_first(lambda: _save(file, solved, record, mark, job))


def _solve_ends(
    job: Job,
    ends: SolveEnds,
    file: Path,
    mark: Mapping[str, Any],
    tokens: torch.Tensor,
    outputs: Sequence[torch.Tensor],
    share: Share,
    count: int,
) -> None:
    """Solve the head with the last layer's ``outputs``, and write it to ``file``. count: blocks of the run."""
    began, sent = time.perf_counter(), sent_bytes()
    hessian = _head_hessian(job, list(pieces_of(tokens, share)), outputs, share)
    _save_solved(job, ends(job, hessian), file, mark, name="the head", at=(count, count), began=began, sent=sent)


def _embed(job: Job, pieces: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[Call]]:
    with _outside_layers(job):
        return embed(job.model, (piece.to(job.device) for piece in pieces))


def _head_hessian(
    job: Job, pieces: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], share: Share
) -> torch.Tensor:
    """Return X^T X [H, H], float32, of the head's inputs. outputs: the last layer's, [B, T, H], for token ids
    ``pieces``."""
    sums = Sums(share.ranges)
    with _outside_layers(job):
        for tokens, states in zip(pieces, outputs, strict=True):
            for inputs_TH in head_inputs(job.model, tokens.to(job.device), states):
                sums.add([inputs_TH.T @ inputs_TH])
    size = outputs[0].shape[-1]
    (total,) = sums.total([torch.empty((size, size), device=job.device)])
    if not bool(torch.isfinite(total).all()):
        raise InputError(
            "the inputs of the head are not finite; check the float model with matquant eval --reference, "
            "or quantise with --scope linears"
        )
    return total


@contextlib.contextmanager
def _outside_layers(job: Job) -> Iterator[None]:
    """Load the decoder's parameters outside its layers, such as the embedding and the final norm, in this context."""
    inside = tuple(f"{name}." for name, _ in decoder_layers(job.model))
    decoder = decoder_of(job.model)
    prefix = next(f"{name}." if name else "" for name, module in job.model.named_modules() if module is decoder)
    outside = [name for name, _ in decoder.named_parameters() if not f"{prefix}{name}".startswith(inside)]
    _fill(job, decoder, prefix, outside)
    for name, buffer in decoder.named_buffers():
        _set(decoder, name, buffer.to(job.device))
    yield
    for name in outside:
        _set_parameter(decoder, name, decoder.get_parameter(name).detach().to("meta"))


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


def _fill(job: Job, module: torch.nn.Module, prefix: str, names: Sequence[str]) -> None:
    """Read parameters of a module in float32; each of several processes reads some rows, and gets the others."""
    rows = {local: module.get_parameter(local).shape[0] for local in names}
    found = together(lambda: [read_rows(job, f"{prefix}{local}", own_rows(rows[local])) for local in names])
    for local, own in zip(names, found, strict=True):
        whole = gather_rows(own.to(job.device), row_counts(rows[local]))
        _set_parameter(module, local, whole.float())


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


def read_rows(job: Job, name: str, rows: slice) -> torch.Tensor:
    """Read this process's rows of a tensor as the source has it, all of them for a single process."""
    tensor = job.read(name) if ranks.count() == 1 else job.read_rows(name, rows)
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
