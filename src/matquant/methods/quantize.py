"""Training world: a float model in, a nested checkpoint out. torch and transformers live here and below.

``quantize`` is the whole of it: check every input first, load the model, run a method of METHODS, write the checkpoint.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matquant.core.grid import check_finite, check_group_size
from matquant.core.nest import MASTER_BITS, OWN, UNIFORM
from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.format.checkpoint import SHARD_BYTES, manifest_sha256, open_checkpoint, write_checkpoint
from matquant.hf.text import data_sha256, token_stream
from matquant.hf_torch.arrays import nested_to_numpy, nested_to_torch
from matquant.hf_torch.config import context_length
from matquant.hf_torch.device import bf16_is_fast, choose_device
from matquant.hf_torch.layers import select_linears, unquantised_linears
from matquant.hf_torch.loading import load_float
from matquant.hf_torch.shards import Shards, open_shards
from matquant.hf_torch.ties import Model
from matquant.hf_torch.tokenizer import read_texts
from matquant.hf_torch.views import View, plain_items
from matquant.methods import distill, gptq, omniquant, qat
from matquant.methods.parts.blocks import read_tensor
from matquant.methods.parts.fake import Grid
from matquant.methods.parts.job import LOG, Job, Report, source_files
from matquant.methods.parts.symmetry import choose_symmetry
from matquant.methods.rtn import round_to_nearest
from matquant.options import METHODS
from matquant.options.distill import NAME as DISTILL
from matquant.options.objective import Width
from matquant.options.request import check_request
from matquant.system.errors import InputError
from matquant.system.files import check_space
from matquant.system.locks import holding

Nested = Iterator[tuple[str, NestedTensor]]
SLOW_BF16 = "this processor has no bf16 arithmetic and emulates it, many times slower than fp32; better without --bf16"
STREAMED_SHARD_BYTES = 25 * 10**7  # a shard is put together in memory, twice while it is written

RUN: dict[str, Callable[[Job], Nested]] = {
    "rtn": round_to_nearest,
    "gptq": gptq.train,
    "omniquant": omniquant.train,
    "qat": qat.train,
}

# An affine of its own costs 4 bytes per row and width; from 5 bits on the fit gains nothing (measured: int6 0 %).
AFFINE_WIDTHS = (2, 3, 4)


@holding("out")
def quantize(
    model: Path | str,
    out: Path | str,
    *,
    method: str = "qat",
    objective: str | None = None,
    weights: Sequence[float] | None = None,
    rule: str = "prefix",
    scope: str = "ffn",
    exclude: Sequence[str] = (),
    group_size: int | None = None,
    symmetric: bool | None = None,
    affine: str | None = None,
    zeros: str = OWN,
    grid: str = UNIFORM,
    scale_dtype: str = "bfloat16",
    baseline_bits: int | None = None,
    start: Path | str | None = None,
    text: Sequence[Path | str] = (),
    threads: int | None = None,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda record: None,
    **options: Any,
) -> Path:
    """Quantise a float model into one nested checkpoint and return its directory.

    model: Hugging Face directory or hub id. out: directory to write; an interrupted run leaves ``.OUT.work`` beside it,
    which ``resume`` continues. method: one of METHODS, or "distill", three of them in a row (distill.py). objective,
    weights: see ``objective.parse_objective``; None: the method's own (METHODS).
    exclude: regular expressions of paths to leave out. baseline_bits: train the dedicated model of that width instead,
    on its own grid (on the method's own target, or ``objective`` if it names that width alone). affine None: the
    method's. zeros: of the widths with an affine of their own: "own", or "centre" for the middle of their codes, which
    is not stored. symmetric None: symmetric, with rtn whichever of both suits the weights (symmetry.py).
    start: a nested checkpoint of the same model whose codes qat starts from (one made by gptq is better than rounding);
    its training log comes before this run's. device None: cuda if there is one.
    options: the method's own: the fields of ``qat.Schedule``, ``gptq.Settings`` or ``omniquant.Settings``, or those of
    ``distill.stages``; seq_len is by default at most the model's context.
    Raises InputError before any work for whatever can be known before it, and never leaves a half-written checkpoint.
    """
    request = check_request(
        model,
        out,
        method=method,
        objective=objective,
        weights=weights,
        rule=rule,
        scope=scope,
        exclude=exclude,
        group_size=group_size,
        symmetric=symmetric,
        affine=affine,
        zeros=zeros,
        grid=grid,
        scale_dtype=scale_dtype,
        baseline_bits=baseline_bits,
        start=start,
        text=text,
        threads=threads,
        resume=resume,
        overwrite=overwrite,
        **options,
    )
    target, work = request.target, request.work
    if threads is not None:
        torch.set_num_threads(threads)
    if method == DISTILL:
        common = {"scope": scope, "exclude": exclude, "group_size": group_size, "zeros": zeros, "grid": grid}
        common |= {"scale_dtype": scale_dtype, "device": device}
        return distill.run(
            quantize,
            model,
            target,
            text=text,
            common=common,
            options=options,
            work=work,
            resume=resume,
            overwrite=overwrite,
            report=report,
        )
    chosen, objective, affine = METHODS[method], request.objective, request.affine
    widths, documents = request.widths, request.documents

    place = choose_device(device)
    source = open_shards(model) if chosen.streamed else _in_memory(model, place)
    views = select_linears(source.model, scope, exclude=exclude)
    for path, view in views.items():
        check_group_size(view.shape[1], group_size, name=path)
    if not chosen.streamed:
        _check_finite(source.model, views)
    fused = [path for path in views if ".experts." in path]
    if fused and symmetric is False:
        raise InputError(
            f"--asymmetric asked for {fused[0]}, a fused expert, which stock transformers "
            "cannot read with zero points; leave --asymmetric out, or --exclude experts"
        )
    check_space(
        target,
        sum(source.dtypes[n].itemsize * t.numel() for n, t in source.model.state_dict().items() if n in source.dtypes),
    )
    vocab_size = source.model.config.get_text_config().vocab_size
    texts = read_texts(model, needed=bool(documents), vocab_size=vocab_size)
    for notice in texts.notices:
        report({"notice": notice})
    stream = np.zeros(0, dtype=np.int64)
    if documents:
        stream = token_stream(documents, texts.tokenizer, vocab_size=vocab_size)
    shape = Grid(
        rule="prefix" if baseline_bits and baseline_bits < MASTER_BITS else rule,
        bits=baseline_bits or MASTER_BITS,
        group_size=group_size,
        symmetric=symmetric is not False,
        affine=affine,
        zeros=zeros,
        storable=scale_dtype == "bfloat16",
        sliced=_own_affines(affine, baseline_bits),
        kind=grid,
    )
    if symmetric is None and method == "rtn" and baseline_bits is None and grid == UNIFORM:
        suits, reason = choose_symmetry(source.model, views, shape)
        shape = dataclasses.replace(shape, symmetric=suits)
        if reason:
            report({"notice": reason})
    if chosen.settings:  # windows no longer than what the model was made for, unless told otherwise
        options = {"seq_len": min(chosen.settings.seq_len, context_length(source.model)), **options}
    settings = chosen.settings(**options) if chosen.settings else None
    slow = getattr(settings, "autocast", False) and place.type == "cpu" and not bf16_is_fast()
    before, first = _first(start, method, shape, views, place)
    spec = Spec(
        rule=shape.rule,
        widths=tuple(width.bits for width in widths),
        slices=shape.sliced or ((baseline_bits,) if baseline_bits and baseline_bits < MASTER_BITS else ()),
        group_size=group_size,
        symmetric=shape.symmetric,
        zeros=zeros,
        grid=grid,
        scale_dtype=scale_dtype,
        scope=scope,
        method=", ".join([*before, method]),
        objective=_objective(objective, baseline_bits, widths) if widths else "",
        weights=tuple(width.weight for width in widths),
        baseline_bits=baseline_bits,
        steps=getattr(settings, "steps", 0),
        seed=options.get("seed", 0),
        data_sha256=data_sha256(stream) if len(stream) else "",
    )
    job = Job(
        source=str(model),
        model=source.model,
        read=source.read,
        dtypes=source.dtypes,
        device=place,
        views=views,
        grid=shape,
        spec=spec,
        objective=widths,
        work=work,
        resume=resume,
        stream=stream,
        options=options if chosen.settings else {},
        report=_with_notice(report, SLOW_BF16) if slow else report,
        first=first,
        start_sha256="" if start is None else manifest_sha256(start),
        files=source_files(model) if chosen.settings else {},
    )
    nested = RUN[method](job)
    logs = [Path(folder) / LOG for folder in (start, work) if folder is not None]  # its own after start's
    history = b"".join(log.read_bytes() for log in logs if log.is_file())
    files = {**texts.files, **({LOG: history} if history else {})}
    _write(target, job, nested, streamed=chosen.streamed, files=files, overwrite=overwrite)
    shutil.rmtree(work, ignore_errors=True)
    return target


def _with_notice(report: Report, notice: str) -> Report:
    return lambda record: report({"notice": notice, **record})


def _first(
    start: Path | str | None, method: str, grid: Grid, views: Mapping[str, View], device: torch.device
) -> tuple[list[str], dict[str, NestedTensor]]:
    """The method of ``start`` and its nested tensors, torch, on ``device``; InputError unless qat can go on from it."""
    if start is None:
        return [], {}
    checkpoint = open_checkpoint(start)
    for name, found, wanted in (
        ("rule", checkpoint.spec.rule, grid.rule),
        ("group_size", checkpoint.spec.group_size, grid.group_size),
        ("symmetric", checkpoint.spec.symmetric, True),
        ("symmetric", grid.symmetric, True),
        ("zeros", checkpoint.spec.zeros, grid.zeros),
        ("grid", checkpoint.spec.grid, grid.kind),
        ("baseline_bits", checkpoint.spec.baseline_bits or MASTER_BITS, grid.bits),
    ):
        if found != wanted:
            raise InputError(f"--start {start} has {name}={found!r}, this run needs {wanted!r}; make it with that")
    shapes = {path: view.shape for path, view in views.items()}
    if dict(checkpoint.shapes) != shapes:
        other = sorted(set(checkpoint.shapes.items()) ^ set(shapes.items()))[0][0]
        raise InputError(
            f"--start {start} and this run do not quantise the same weights: {other}; use the same --scope"
        )
    first = {path: nested_to_torch(checkpoint.nested(path), device=device) for path in checkpoint.shapes}
    return [checkpoint.spec.method], first


def _in_memory(model: Path | str, device: torch.device) -> Shards:
    """The whole model in float32 on ``device``; dtypes are those of the file."""
    source = load_float(model)
    dtypes = {name: tensor.dtype for name, tensor in source.state_dict().items()}
    source = source.float().to(device)
    return Shards(model=source, read=lambda name: source.state_dict()[name], dtypes=dtypes)


def _objective(objective: str, baseline_bits: int | None, widths: tuple[Width, ...]) -> str:
    """What was really trained: ``objective`` unless a baseline put its own width in its place."""
    return str(baseline_bits) if baseline_bits is not None and not widths[0].teachers else objective


def _own_affines(affine: str, baseline_bits: int | None) -> tuple[int, ...]:
    if affine == "none":
        return ()
    return AFFINE_WIDTHS if baseline_bits in (None, MASTER_BITS) else (baseline_bits,)


def _write(
    target: Path, job: Job, nested: Nested, *, streamed: bool, files: Mapping[str, bytes], overwrite: bool
) -> None:
    def items() -> Iterator[Any]:
        yield from ((path, nested_to_numpy(tensor)) for path, tensor in nested)
        read = functools.partial(read_tensor, job) if streamed else None
        yield from plain_items(job.model, job.views, job.dtypes, read=read)

    config = json.loads(job.model.config.to_json_string(use_diff=False))
    config["dtype"] = str(next(iter(job.dtypes.values()))).removeprefix("torch.")
    config["architectures"] = [type(job.model).__name__]
    write_checkpoint(
        target,
        items(),
        spec=job.spec,
        config=config,
        ignore=unquantised_linears(job.model, job.views),
        files=files,
        overwrite=overwrite,
        shard_bytes=STREAMED_SHARD_BYTES if streamed else SHARD_BYTES,
    )


def _check_finite(model: Model, views: Mapping[str, View]) -> None:
    parameters = dict(model.named_parameters())
    for path, view in views.items():
        check_finite(view.of(parameters[view.parameter].detach()), name=path)
    taken = {view.parameter for view in views.values()}
    for name, parameter in parameters.items():
        if name not in taken:
            check_finite(parameter.detach(), name=name.removesuffix(".weight"))
