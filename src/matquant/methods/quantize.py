"""Quantise a float model into a nested checkpoint.

``quantize`` has four steps: check every input, open the model, run a method of METHODS, write the checkpoint. Importing
this module imports torch and transformers.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matquant.core.grid import check_finite
from matquant.core.nest import FLOAT, MASTER_BITS, UNIFORM
from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.distributed.collect import check_same, held_rows, on_first, together, wait
from matquant.distributed.group import joined
from matquant.distributed.nested import cut_rows
from matquant.format.read import manifest_sha256, open_checkpoint
from matquant.format.shards import SHARD_BYTES
from matquant.format.side_files import LOG
from matquant.format.write import check_writable, write_checkpoint
from matquant.hf.gguf import ORIGIN, as_directory, quantised_notice
from matquant.hf.gguf_file import is_gguf
from matquant.hf.text import count_windows, data_sha256, token_stream
from matquant.hf_torch import Model
from matquant.hf_torch.arrays import nested_to_numpy, nested_to_torch
from matquant.hf_torch.device import bf16_is_fast
from matquant.hf_torch.experts import experts_record
from matquant.hf_torch.layers import unquantised_linears
from matquant.hf_torch.sharded import split_rows
from matquant.hf_torch.shards import Shards
from matquant.hf_torch.tokenizer import read_texts
from matquant.hf_torch.views import View, plain_items
from matquant.methods import distill
from matquant.methods.parts.blocks import read_tensor
from matquant.methods.parts.ends import nest_ends
from matquant.methods.parts.fake import Grid
from matquant.methods.parts.job import Job, Report, fingerprint, source_files
from matquant.methods.parts.symmetry import choose_symmetry
from matquant.methods.prepare import Prepared, prepare
from matquant.methods.preview import describe, preview
from matquant.options.request import Request, check_request
from matquant.system import ranks
from matquant.system.arguments import check_types
from matquant.system.errors import InputError
from matquant.system.files import check_space
from matquant.system.interrupted import check_work
from matquant.system.locks import hold

Nested = Iterator[tuple[str, NestedTensor]]
SLOW_BF16 = "this processor emulates bf16 arithmetic, many times slower than fp32; drop --bf16"
STREAMED_SHARD_BYTES = 25 * 10**7  # a shard is assembled in memory, and copied once while it is written

# Widths with a per-width scale. Output error of six matrices of SmolLM2 after nested GPTQ, with one over without: int5
# 0.72, int6 1.00 (experiments/log.md, 1 December).
AFFINE_WIDTHS = (2, 3, 4, 5)


def quantize(
    model: Path | str,
    out: Path | str,
    *,
    recipe: str | None = None,
    method: str | None = None,
    report: Report = lambda record: None,
    **options: Any,
) -> Path:
    """Quantise a float model into one nested checkpoint and return its directory.

    model: Hugging Face directory, GGUF file or hub id. out: directory to write; an interrupted run leaves ``.OUT.work``
    beside it, which ``resume=True`` continues. recipe: a name in options.recipes.RECIPES, by default "balanced"; or
    method: a name in options.METHODS, with its own defaults. options: those of all methods (options/common.py) and of
    the method (options/); they override the recipe's. docs/options.md lists them. report: called with each record of
    progress.

    Raises InputError before any work if possible, and never leaves a half-written checkpoint.
    """
    check_types(model=model, out=out)
    with joined(options.get("device")), hold(out):
        request = together(lambda: check_request(model, out, recipe=recipe, method=method, **options))
        return run(model, request, report=report)


def run(
    model: Path | str,
    request: Request,
    *,
    report: Report = lambda record: None,
    announce: Callable[[list[str]], None] | None = None,
) -> Path:
    """Run ``quantize`` for a checked request. InputError if another run writes to the same path.

    announce: called with the settings of the run, in lines for people, once its input is checked.
    """
    common = request.common
    with joined(common.device), hold(request.target, again=True):
        on_first(lambda: _check_output(request))
        if common.threads is not None:
            torch.set_num_threads(common.threads)
        notice = quantised_notice(model)
        if notice:
            report({"notice": notice})
        with _float_directory(model, request.target, report) as directory:
            return _run(directory, request, report, announce)


@contextlib.contextmanager
def _float_directory(model: Path | str, target: Path, report: Report) -> Iterator[Path | str]:
    """Yield the model's directory or hub id; a GGUF file is converted by the first process, for all of them."""
    with contextlib.ExitStack() as made:
        conversion = as_directory(model, beside=target, report=functools.partial(_converted, report))
        directory = on_first(lambda: made.enter_context(conversion))
        yield directory if is_gguf(model) else model
        wait()


def _check_output(request: Request) -> None:
    """Raise InputError unless the run may write its output, and start or continue its work."""
    common = request.common
    check_writable(request.target, overwrite=common.overwrite)
    check_work(request.target, method=request.choice.method, resume=common.resume, overwrite=common.overwrite)


def _run(model: Path | str, request: Request, report: Report, announce: Callable[[list[str]], None] | None) -> Path:
    """Run the method on a model that is a directory or on the hub."""
    if request.method.stages is not None:
        if announce is not None:
            announce(preview(model, request))
        return distill.run(quantize, model, request, report=report)
    if request.method.settings is None:
        ranks.check_single(f"method {request.choice.method!r}")
    prepared = prepare(model, request)
    job, files = _make_job(prepared, report)
    check_same(fingerprint(job, {}), "the model, the text or the settings")
    if announce is not None:
        announce(describe(prepared))
    _write(prepared, job, _method(request)(job), files)
    on_first(lambda: shutil.rmtree(request.work, ignore_errors=True))
    return request.target


def _converted(report: Report, done_bytes: int, total_bytes: int) -> None:
    """Report the progress of reading a GGUF file."""
    done, total = (round(size / 1e6) for size in (done_bytes, total_bytes))
    report({"stage": "reading the GGUF file", "unit": "MB", "step": done, "steps": total, "loss": {}})


def _method(request: Request) -> Callable[[Job], Nested]:
    """Return the function that chooses the codes: the row's, or ``run`` of the module that has the method's name."""
    if request.method.run is not None:
        return request.method.run
    found: Callable[[Job], Nested] = importlib.import_module(f"matquant.methods.{request.choice.method}").run
    return found


def _make_job(prepared: Prepared, report: Report) -> tuple[Job, dict[str, bytes]]:
    """Return the method's job, and the small files of the checkpoint."""
    request, shards, views = prepared.request, prepared.shards, prepared.views
    common, chosen, settings = request.common, request.method, prepared.settings
    if not chosen.streamed and ranks.count() == 1:
        _check_finite(shards.model, views)
    on_first(lambda: check_space(request.target, _stored_bytes(shards)))
    vocab_size = shards.model.config.get_text_config().vocab_size
    texts = read_texts(prepared.source, needed=bool(request.documents), vocab_size=vocab_size)
    if getattr(settings, "autocast", False) and prepared.device.type == "cpu" and not bf16_is_fast():
        report = _with_notice(report, SLOW_BF16)
    for notice in texts.notices:
        report({"notice": notice})
    stream = np.zeros(0, dtype=np.int64)
    if request.documents:
        stream = token_stream(request.documents, texts.tokenizer, vocab_size=vocab_size)
        count_windows(len(stream), prepared.settings.seq_len)  # rejects a text shorter than one sequence
        prepared = _fit_samples(prepared, len(stream), report)
    grid = _make_grid(prepared, report)
    kept = {} if getattr(settings, "train_rest", False) else prepared.ends
    before, first = _first(prepared, grid, kept=kept)
    job = Job(
        source=prepared.source,
        model=shards.model,
        read=shards.read,
        read_rows=shards.read_rows,
        dtypes=shards.dtypes,
        device=prepared.device,
        views=views,
        ends=prepared.ends,
        grid=grid,
        spec=_make_spec(prepared, grid, before, stream),
        objective=request.widths,
        work=request.work,
        resume=common.resume,
        stream=stream,
        options=prepared.options if chosen.settings else {},
        report=report,
        first=first,
        start_sha256="" if common.start is None else manifest_sha256(common.start),
        files=source_files(prepared.source) if chosen.settings else {},
    )
    return job, dict(texts.files)


def _fit_samples(prepared: Prepared, tokens: int, report: Report) -> Prepared:
    """Reduce the number of calibration sequences to those of the text, unless the user set it."""
    settings, named = prepared.settings, prepared.request.choice.named
    if "samples" in named or not hasattr(settings, "samples"):
        return prepared
    windows = count_windows(tokens, settings.seq_len)
    if windows >= settings.samples:
        return prepared
    fewer = f"fewer than the usual {settings.samples}"
    report({"notice": f"the text has {windows} sequences of {settings.seq_len} tokens, {fewer}; more text is better"})
    return dataclasses.replace(prepared, options={**prepared.options, "samples": windows})


def _make_grid(prepared: Prepared, report: Report) -> Grid:
    """Return the grid of all weights; by default symmetric, or for rtn the better one."""
    request, common = prepared.request, prepared.request.common
    baseline = common.baseline_bits
    grid = Grid(
        rule="prefix" if baseline and baseline < MASTER_BITS else common.rule,
        bits=baseline or MASTER_BITS,
        group_size=prepared.group_size,
        symmetric=common.symmetric is not False,
        affine=request.affine,
        zeros=request.zeros,
        storable=common.scale_dtype == "bfloat16",
        sliced=_own_affines(request.affine, baseline, common.grid),
        kind=common.grid,
    )
    may_choose = common.symmetric is None and baseline is None and common.grid == UNIFORM
    if request.choice.method != "rtn" or not may_choose or common.zero_point != "stored":
        return grid
    symmetric, reason = choose_symmetry(prepared.shards.model, prepared.views, grid)
    if reason:
        report({"notice": reason})
    return dataclasses.replace(grid, symmetric=symmetric)


def _make_spec(prepared: Prepared, grid: Grid, before: list[str], stream: np.ndarray) -> Spec:
    """Return the checkpoint's Spec. before: the methods of its starting checkpoint."""
    request, common = prepared.request, prepared.request.common
    baseline = common.baseline_bits
    return Spec(
        rule=grid.rule,
        widths=tuple(width.bits for width in request.widths),
        slices=grid.sliced or ((baseline,) if baseline and baseline < MASTER_BITS else ()),
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        zeros=grid.zeros,
        grid=grid.kind,
        head_bits=common.head_bits if prepared.ends else None,
        experts=experts_record(prepared.shards.model, (view.parameter for view in prepared.views.values())),
        scale_dtype=common.scale_dtype,
        scope=common.scope,
        method=", ".join([*before, request.choice.method]),
        objective=_objective(request) if request.widths else "",
        weights=tuple(width.weight for width in request.widths),
        baseline_bits=baseline,
        steps=getattr(prepared.settings, "steps", 0),
        seed=prepared.options.get("seed", 0),
        data_sha256=data_sha256(stream) if len(stream) else "",
    )


def _first(prepared: Prepared, grid: Grid, *, kept: Mapping[str, View]) -> tuple[list[str], dict[str, NestedTensor]]:
    """Return ``--start``'s method and nested tensors on the device; InputError unless qat can continue from it.

    Of several processes each gets its rows. kept: embedding and head, taken as they are if the checkpoint has them.
    """
    start, views = prepared.request.common.start, prepared.views
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
            raise InputError(
                f"--start {start} has {name}={found!r}, this run needs {wanted!r}; quantise it again with {wanted!r}"
            )
    shapes = {path: view.shape for path, view in views.items()}
    there = {path: shape for path, shape in checkpoint.shapes.items() if path not in checkpoint.ends}
    if there != shapes:
        other = sorted(set(there.items()) ^ set(shapes.items()))[0][0]
        raise InputError(f"--start {start} and this run quantise different weights: {other}; use the same --scope")
    same = [path for path in checkpoint.ends if path in kept and checkpoint.shapes[path] == kept[path].shape]
    counts = split_rows(views, prepared.shards.model)
    device, first = prepared.device, {}
    for path in shapes:
        own = held_rows(counts[path])
        first[path] = nested_to_torch(cut_rows(checkpoint.nested(path), own), device=device)
    for path in same if ranks.leads() else ():
        first[path] = nested_to_torch(checkpoint.nested(path), device=device)
    return [checkpoint.spec.method], first


def _stored_bytes(shards: Shards) -> int:
    """Return the bytes of the stored model; its checkpoint is not much larger."""
    tensors = shards.model.state_dict().items()
    return sum(shards.dtypes[name].itemsize * t.numel() for name, t in tensors if name in shards.dtypes)


def _objective(request: Request) -> str:
    """Return the trained objective: the request's, or the baseline's width."""
    baseline = request.common.baseline_bits
    return str(baseline) if baseline is not None and not request.widths[0].teachers else request.objective


def _own_affines(affine: str, baseline_bits: int | None, grid: str) -> tuple[int, ...]:
    """Return the widths with a per-width scale. int4 of the float grid keeps the 8-bit scale: it is nearest already."""
    if affine == "none":
        return ()
    widths = AFFINE_WIDTHS if baseline_bits in (None, MASTER_BITS) else (baseline_bits,)
    return tuple(bits for bits in widths if grid != FLOAT or bits != 4)


def _with_notice(report: Report, notice: str) -> Report:
    return lambda record: report({"notice": notice, **record})


def _write(prepared: Prepared, job: Job, nested: Nested, files: dict[str, bytes]) -> None:
    """Write the checkpoint from tensors as they are made, with the training log; of several processes the first."""
    request, streamed = prepared.request, prepared.request.method.streamed
    read = functools.partial(_read, prepared, job) if streamed or ranks.count() > 1 else None

    def items() -> Iterator[Any]:
        done = set()
        for path, tensor in nested:
            done.add(path)
            yield path, nested_to_numpy(tensor)
        yield from ((path, nested_to_numpy(tensor)) for path, tensor in nest_ends(job, read, done=done))
        yield from plain_items(job.model, quantised, job.dtypes, read=read)

    if not ranks.leads():
        for _ in () if streamed else nested:  # to take part in gathering them
            pass
        return
    quantised = {**job.views, **job.ends}
    folders = [Path(folder) for folder in (request.common.start, request.work) if folder is not None]
    history = b"".join((folder / LOG).read_bytes() for folder in folders if (folder / LOG).is_file())
    config = json.loads(job.model.config.to_json_string(use_diff=False))
    config["dtype"] = str(next(iter(job.dtypes.values()))).removeprefix("torch.")
    config["architectures"] = [type(job.model).__name__]
    config["_name_or_path"] = config.pop(ORIGIN, None) or config.get("_name_or_path")
    write_checkpoint(
        request.target,
        items(),
        spec=job.spec,
        config=config,
        ignore=unquantised_linears(job.model, quantised),
        files={**files, **({LOG: history} if history else {})},
        overwrite=request.common.overwrite,
        shard_bytes=STREAMED_SHARD_BYTES if streamed else SHARD_BYTES,
    )


def _read(prepared: Prepared, job: Job, name: str) -> torch.Tensor:
    """Return a tensor that is not quantised: trained, changed by a solved block, or as the source has it."""
    if prepared.request.method.streamed:
        return read_tensor(job, name)
    trained = dict(job.model.named_parameters()).get(name)
    return job.read(name) if trained is None or trained.is_meta else trained.detach()


def _check_finite(model: Model, views: Mapping[str, View]) -> None:
    parameters = dict(model.named_parameters())
    for path, view in views.items():
        check_finite(view.of(parameters[view.parameter].detach()), name=path)
    taken = {view.parameter for view in views.values()}
    for name, parameter in parameters.items():
        if name not in taken:
            check_finite(parameter.detach(), name=name.removesuffix(".weight"))
