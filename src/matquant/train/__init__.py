"""Training world: a float model in, a nested checkpoint out. torch and transformers live here and below.

``quantize`` is the whole of it: check every input first, load the model, run a method of METHODS, write the checkpoint.
A method takes (model, views, grid) and returns nested tensors by path; the ones with data take more (see ``quantize``).
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from matquant.checkpoint import check_writable, write_checkpoint
from matquant.errors import InputError
from matquant.grid import check_finite, check_group_size
from matquant.models import (
    Model,
    View,
    check_model_path,
    load_float,
    load_tokenizer,
    nested_to_numpy,
    plain_items,
    side_files,
    unquantised_linears,
)
from matquant.nest import MASTER_BITS, check_bits, check_rule
from matquant.spec import SCALE_DTYPES, Spec
from matquant.tensor import NestedTensor
from matquant.text import cut_windows, data_sha256, read_documents, token_stream
from matquant.train import qat
from matquant.train.fake import AFFINES, Grid
from matquant.train.objective import Width, parse_objective
from matquant.train.rtn import round_to_nearest
from matquant.train.select import select_linears

Nested = Iterator[tuple[str, NestedTensor]]

METHODS: dict[str, str] = {
    "rtn": "round to nearest: no data, seconds",
    "qat": "joint quantisation-aware training of all widths",
}

# An affine of its own costs 4 bytes per row and width; from 5 bits on the fit gains nothing (measured: int6 0 %).
AFFINE_WIDTHS = (2, 3, 4)


def quantize(
    model: Path | str,
    out: Path | str,
    *,
    method: str = "qat",
    objective: str = "8,4,2",
    weights: Sequence[float] | None = None,
    rule: str = "prefix",
    scope: str = "ffn",
    group_size: int | None = None,
    symmetric: bool = True,
    affine: str | None = None,
    scale_dtype: str = "bfloat16",
    baseline_bits: int | None = None,
    text: Sequence[Path | str] = (),
    steps: int = 300,
    batch_size: int = 8,
    seq_len: int = 256,
    lr: float | None = None,
    seed: int = 0,
    warmup: int | None = None,
    affine_lr: float = 1.0,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    accumulate: int = 1,
    autocast: bool = False,
    checkpoint_activations: bool = False,
    train_rest: bool = False,
    learn_clip: bool | None = None,
    save_every: int = 100,
    threads: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: qat.Report = lambda record: None,
) -> Path:
    """Quantise a float model into one nested checkpoint and return its directory.

    model: Hugging Face directory or hub id. out: directory to write; an interrupted run leaves ``.OUT.work`` beside it,
    which ``resume`` continues. objective, weights: see ``objective.parse_objective``. baseline_bits: train the
    dedicated model of that width instead, on its own grid (cross-entropy, or ``objective`` if it names that width only). affine None: "learned" for qat, "refit" for rtn; learn_clip
    None: where affines are learned. lr None: ``default_lr``. Everything else: see ``Grid`` and ``qat.Schedule``.
    Raises InputError before any work for whatever can be known before it, and never leaves a half-written checkpoint.
    """
    target = Path(out)
    if threads is not None:
        torch.set_num_threads(threads)
    widths = _widths(objective, weights, baseline_bits)
    check_rule(rule)
    affine = affine or ("learned" if method == "qat" else "refit")
    learn_clip = affine == "learned" if learn_clip is None else learn_clip
    _check_choices(
        method,
        affine,
        scale_dtype,
        text,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=1.0 if lr is None else lr,
    )
    check_writable(target, overwrite=overwrite)
    check_model_path(model)
    work = target.with_name(f".{target.name}.work")
    _check_work(work, resume=resume, overwrite=overwrite)

    source = load_float(model)
    dtypes = {name: tensor.dtype for name, tensor in source.state_dict().items()}
    source = source.float()
    views = select_linears(source, scope)
    _check_weights(source, views, group_size)
    grid = Grid(
        rule="prefix" if baseline_bits and baseline_bits < MASTER_BITS else rule,
        bits=baseline_bits or MASTER_BITS,
        group_size=group_size,
        symmetric=symmetric,
        affine=affine,
        storable=scale_dtype == "bfloat16",
        sliced=_own_affines(affine, baseline_bits),
    )
    spec = Spec(
        rule=grid.rule,
        widths=tuple(width.bits for width in widths),
        slices=grid.sliced or ((baseline_bits,) if baseline_bits and baseline_bits < MASTER_BITS else ()),
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        scope=scope,
        method=method,
        objective=objective if baseline_bits is None or widths[0].teachers else str(baseline_bits),
        weights=tuple(width.weight for width in widths),
        baseline_bits=baseline_bits,
        steps=steps if method == "qat" else 0,
        seed=seed,
    )
    files = side_files(model)
    if method == "rtn":
        nested: Nested = round_to_nearest(source, views, grid)
    else:
        stream = token_stream(read_documents(text), load_tokenizer(model))
        spec = dataclasses.replace(spec, data_sha256=data_sha256(stream))
        schedule = qat.Schedule(
            steps=steps,
            batch_size=batch_size,
            seq_len=seq_len,
            lr=default_lr(source.config.get_text_config().hidden_size) if lr is None else lr,
            seed=seed,
            warmup=min(150, max(1, steps // 10)) if warmup is None else warmup,
            affine_lr=affine_lr,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            accumulate=accumulate,
            autocast=autocast,
            checkpoint_activations=checkpoint_activations,
            train_rest=train_rest,
            learn_clip=learn_clip,
            save_every=save_every,
        )
        windows = cut_windows(stream, seq_len)
        work.mkdir(parents=True, exist_ok=True)
        nested = qat.train(
            source,
            views,
            grid,
            objective=widths,
            windows=windows,
            schedule=schedule,
            work=work,
            fingerprint={"model": str(model), **spec.to_json(), **dataclasses.asdict(schedule), "affine": affine},
            report=report,
        )
        files["training.jsonl"] = (work / qat.LOG).read_bytes()
    _write(target, source, views, nested, spec=spec, dtypes=dtypes, files=files, overwrite=overwrite)
    shutil.rmtree(work, ignore_errors=True)
    return target


def _own_affines(affine: str, baseline_bits: int | None) -> tuple[int, ...]:
    if affine == "none":
        return ()
    return AFFINE_WIDTHS if baseline_bits in (None, MASTER_BITS) else (baseline_bits,)


def default_lr(hidden_size: int) -> float:
    """A peak learning rate for a model of this width.

    2e-3 at 64 and 1e-5 at the paper's 2304 (App. B), a power law between and constant outside.
    """
    slope = math.log(2e-3 / 1e-5) / math.log(2304 / 64)
    return float(min(2e-3, max(1e-5, 2e-3 * (hidden_size / 64) ** -slope)))


def _write(
    target: Path,
    model: Model,
    views: Mapping[str, View],
    nested: Nested,
    *,
    spec: Spec,
    dtypes: Mapping[str, torch.dtype],
    files: Mapping[str, bytes],
    overwrite: bool,
) -> None:
    def items() -> Iterator[Any]:
        yield from ((path, nested_to_numpy(tensor)) for path, tensor in nested)
        yield from plain_items(model, views, dtypes)

    config = json.loads(model.config.to_json_string(use_diff=False))
    config["dtype"] = str(next(iter(dtypes.values()))).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    write_checkpoint(
        target,
        items(),
        spec=spec,
        config=config,
        ignore=unquantised_linears(model, views),
        files=files,
        overwrite=overwrite,
    )


def _widths(objective: str, weights: Sequence[float] | None, baseline_bits: int | None) -> tuple[Width, ...]:
    if baseline_bits is None:
        return parse_objective(objective, weights)
    check_bits(baseline_bits)
    own = parse_objective(objective, weights)
    if [width.bits for width in own] == [baseline_bits]:
        return own
    return (Width(bits=baseline_bits, truth=True, teachers=(), weight=1.0),)


def _check_choices(method: str, affine: str, scale_dtype: str, text: Sequence[Path | str], **numbers: float) -> None:
    if method not in METHODS:
        raise InputError(f"method={method!r} is not known; use one of {', '.join(METHODS)}")
    if affine not in AFFINES:
        raise InputError(f"affine={affine!r} is not known; use one of {', '.join(AFFINES)}")
    if scale_dtype not in SCALE_DTYPES:
        raise InputError(f"scale_dtype={scale_dtype!r} is not known; use one of {', '.join(SCALE_DTYPES)}")
    if method == "qat" and not text:
        raise InputError("method 'qat' needs text to train on; give --text FILE, or --method rtn")
    for name, value in numbers.items():
        if not value > 0:
            raise InputError(f"{name}={value}; give a number above 0")


def _check_work(work: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and not work.is_dir():
        raise InputError(f"--resume found no interrupted run in {work}; leave --resume out to start one")
    if work.is_dir() and not resume:
        if not overwrite:
            raise InputError(f"{work} holds an interrupted run; --resume to continue it, or --overwrite to start again")
        shutil.rmtree(work)


def _check_weights(model: Model, views: Mapping[str, View], group_size: int | None) -> None:
    parameters = dict(model.named_parameters())
    for path, view in views.items():
        check_group_size(view.shape[1], group_size, name=path)
        check_finite(view.of(parameters[view.parameter].detach()), name=path)
