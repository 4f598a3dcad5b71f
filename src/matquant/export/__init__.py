"""Export a slice of a nested checkpoint to another engine: exactly, or rejected with the reason.

FORMATS is the table: one file per format, which ends in an Exporter (job.py), and one line here. docs/extending.md
shows how to add a format; tests/test_contract_formats.py checks the promise above for every row. Nothing here needs
torch.
"""

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matquant.core.dtypes import CONFIG_NAMES
from matquant.core.nest import FLOAT, MASTER_BITS, UNIFORM
from matquant.core.spec import Plan
from matquant.export import compressed_tensors, dense, gguf, gptq, mlx, nested, planes
from matquant.export.card import RECORD, read_evaluation
from matquant.export.containers import EXACT, MIDRANGE, ZERO_POINTS, Container
from matquant.export.job import Exporter, Job
from matquant.export.requantise import Requantised, view
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.system.errors import InputError
from matquant.system.files import (
    check_replaceable,
    check_space,
    replace_directory_when_done,
    replace_when_done,
)
from matquant.system.locks import check_place, hold

FORMATS: dict[str, Exporter] = {
    "gguf": gguf.EXPORTER,
    "mlx": mlx.EXPORTER,
    "compressed-tensors": compressed_tensors.EXPORTER,
    "gptq": gptq.V1,
    "gptq_v2": gptq.V2,
    "dense": dense.EXPORTER,
    "matquant": nested.EXPORTER,
}
DTYPES = {name: short for short, name in CONFIG_NAMES.items()}
Progress = Callable[[int, int], None]  # bytes written so far, total
SPARE_BYTES = 10**6  # space for the files besides the tensors


def export(
    directory: Path | str,
    out: Path | str,
    *,
    to: str,
    bits: int | None = None,
    plan: Plan | None = None,
    zero_point: str = EXACT,
    dtype: str | None = None,
    base_model: str | None = None,
    measured: Path | None = None,
    requantise: bool = False,
    split_experts: bool = False,
    overwrite: bool = False,
    report: Progress = lambda done, total: None,
    notice: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the ``bits``-bit slice (or ``plan``) of a nested checkpoint in the format ``to``, a name of FORMATS.

    ``to`` may also be "planes" (planes.py), the checkpoint itself in other files; options of slices are then errors.
    The engine computes with the weights of the slice, after one rounding of scales (and minima) to the format's type.
    Weights whose size does not fit the format's blocks stay dense, with a notice.

    zero_point: MIDRANGE moves zero-points to mid-range first, for formats that store none. dtype: dtype of dense
    weights, None: the model's; for mlx also of scales and biases, None: float32. measured: a record of ``matquant eval
    --json`` for the model card. requantise: fit slices of the companded and float grids again to codes that formats
    hold in as many bits; this changes the weights, and the relative squared error is reported and put into the card.
    split_experts: dense experts become a tensor each where the model's own files keep all in one.
    Returns {"out", "bytes", "seconds", "bits_per_weight", "containers": {name: weights}}.
    If a slice does not fit, InputError is raised and nothing is written.
    """
    if to == planes.NAME:
        options: dict[str, Any] = {"--plan": plan, "--dtype": dtype, "--base-model": base_model, "--measured": measured}
        options |= {"--zero-point": zero_point != EXACT, "--requantise": requantise, "--split-experts": split_experts}
        if given := [flag for flag, value in options.items() if value]:
            raise InputError(f"{given[0]} is for slices, and --to planes writes the whole checkpoint; leave it out")
        return planes.export_planes(directory, out, bits=bits or MASTER_BITS, overwrite=overwrite, report=report)
    began = time.perf_counter()
    target = check_place(out)
    if to in FORMATS:  # before a large checkpoint is read
        _check_target(target, FORMATS[to], overwrite=overwrite)
    checkpoint = open_checkpoint(directory)
    if bits is not None and plan is not None:
        raise InputError("bits and a plan exclude each other; use one of them")
    wanted = checkpoint.widths(plan or Plan(default=bits or MASTER_BITS))
    about: dict[str, Any] = {"base_model": base_model, "measured": read_evaluation(measured, checkpoint), "loss": None}
    if requantise:
        checkpoint = _fitted(checkpoint, to, wanted)
        about["loss"] = float(f"{checkpoint.loss():.6g}")  # sums differ in the last digits with the number of threads
        notice(f"requantised: relative squared error {about['loss']:.2e} against the slices of the checkpoint")
    job = make_job(checkpoint, to, wanted, zero_point=zero_point, dtype=dtype, about=about)
    job = _split(job) if split_experts else job
    total = _write(job, target, overwrite=overwrite, report=report, notice=notice)
    return {
        "out": str(target),
        "bytes": total,
        "seconds": time.perf_counter() - began,
        "bits_per_weight": job.bits_per_weight(),
        "containers": dict(sorted(Counter(job.kinds().values()).items())),
    }


def _fitted(checkpoint: Checkpoint, to: str, plan: Mapping[str, int]) -> Requantised:
    """Return the checkpoint with refitted slices, and the zero-points with which ``to`` takes no extra bits."""
    if checkpoint.spec.grid == UNIFORM:
        raise InputError("--requantise is for the companded and float grids, found grid 'uniform'; drop --requantise")
    exporter = _exporter(to, checkpoint)
    if exporter is FORMATS["matquant"]:
        raise InputError(
            "--requantise fits slices to other formats, and --to matquant keeps the codes; drop --requantise"
        )
    paths = {bits: path for path, bits in plan.items() if path not in checkpoint.ends}  # one of each width
    centred = min(paths) <= 2
    for zero_points in (centred, not centred):
        fitted = view(checkpoint, plan, centred=zero_points)
        found = [(exporter.container(fitted, path, bits, EXACT), bits) for bits, path in paths.items()]
        if all(isinstance(container, Container) and container.bits <= bits for container, bits in found):
            return fitted
    return view(checkpoint, plan, centred=False)


def _split(job: Job) -> Job:
    """Return the job with a tensor for each expert; InputError if that changes nothing."""
    if job.exporter is not FORMATS["dense"] or not job.checkpoint.joined():
        raise InputError(
            "--split-experts is for --to dense, of quantised experts that the model keeps in one tensor; leave it out"
        )
    return dataclasses.replace(job, split_experts=True)


def _tell_wide(job: Job, notice: Callable[[str], None]) -> None:
    """Say that slices on a grid take wider containers than their width, and what to do."""
    wide = [path for path, container in job.held().items() if container.bits > job.plan[path]]
    grid = job.checkpoint.spec.grid
    if wide and grid != UNIFORM:
        bits, name = job.plan[wide[0]], job.held()[wide[0]].name
        instead = "in groups of 32" if (grid, bits) == (FLOAT, 4) else "with --portable"
        notice(
            f"{grid} slices take wider types to be exact, {bits} bits {name}; "
            f"--requantise fits them to {bits}-bit types at a loss, or quantise {instead}"
        )


def _write(job: Job, target: Path, *, overwrite: bool, report: Progress, notice: Callable[[str], None]) -> int:
    """Write the export beside ``target``, move it into place when complete, and return its tensors' bytes."""
    _tell_wide(job, notice)
    exporter, checkpoint, done, total = job.exporter, job.checkpoint, 0, 0
    check = functools.partial(_check_target, target, exporter, overwrite=overwrite)
    check()  # before locking, which makes missing parent directories

    def written(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    with hold(target):
        check()
        for text in (*exporter.check(checkpoint), *exporter.plan_notices(job)):
            notice(text)
        total = sum(part.bytes for part in job.parts())
        check_space(target, total + SPARE_BYTES)
        stay = [path for path, kind in job.chosen.items() if kind is None and path not in checkpoint.ends]
        if stay and exporter.containers(checkpoint, stay[0]):
            name = job.about["format"]
            notice(
                f"{len(stay)} weights such as {stay[0]} do not fit the blocks of {name} and stay dense ({job.dtype})"
            )
        loose = [path for path in checkpoint.ends if job.chosen[path] is None]
        if loose and exporter.containers(checkpoint, loose[0]):
            bits, name = job.plan[loose[0]], job.about["format"]
            notice(f"{' and '.join(loose)} become dense ({job.dtype}): {name} does not hold them at {bits} bits")
        with (
            replace_when_done(target, overwrite=overwrite)
            if exporter.suffix
            else replace_directory_when_done(target, check)
        ) as partial:
            exporter.write(job, partial, written)
    return total


def make_job(
    checkpoint: Checkpoint,
    to: str,
    plan: Mapping[str, int],
    *,
    zero_point: str = EXACT,
    dtype: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Job:
    """Choose a container for every path of ``plan``; InputError with the reasons if no container holds a slice."""
    exporter = _exporter(to, checkpoint)
    if zero_point not in ZERO_POINTS:
        raise InputError(f"zero_point={zero_point!r} is not supported; use {' or '.join(ZERO_POINTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r} is not supported; use {', '.join(DTYPES)}")
    if zero_point == MIDRANGE and not checkpoint.spec.symmetric:
        raise InputError(
            f"zero_point={zero_point!r} needs a symmetric checkpoint: zero-points of this one are far from mid-range; "
            "use exact"
        )
    model = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    kept = DTYPES.get(dtype or "") or exporter.dense or DTYPES.get(str(model), "F32")
    if exporter.typed and dtype is not None:
        exporter = _with_scales(exporter, kept)
    dense_ends = () if exporter.holds_ends(checkpoint, plan) else checkpoint.ends
    chosen = {
        path: None if path in dense_ends else exporter.container(checkpoint, path, bits, zero_point)
        for path, bits in plan.items()
    }
    chosen |= {path: None for path in checkpoint.ends if isinstance(chosen[path], list)}
    refused = {path: found for path, found in chosen.items() if isinstance(found, list)}
    if refused:
        path, misfits = next(iter(refused.items()))
        reasons = (
            ", ".join(dict.fromkeys(misfit.reason for misfit in misfits if not misfit.small)) or misfits[-1].reason
        )
        raise InputError(
            f"--to {to} cannot hold {path} at {plan[path]} bits, rule {checkpoint.spec.rule}, exactly "
            f"({len(refused)} of {len(plan)} weights): {reasons}; {alternatives(checkpoint, to, path, plan[path])}"
        )
    containers: dict[str, Container | None] = {
        path: found for path, found in chosen.items() if not isinstance(found, list)
    }
    job = Job(
        checkpoint=checkpoint,
        exporter=exporter,
        plan=plan,
        chosen=containers,
        zero_point=zero_point,
        dtype=kept,
        asked=DTYPES.get(dtype or ""),
        about={"format": to, **(about or {})},
    )
    exporter.check_plan(job)
    return job


def _with_scales(exporter: Exporter, dtype: str) -> Exporter:
    """Return the same exporter with scales of ``dtype``."""

    def containers(checkpoint: Checkpoint, path: str) -> list[Container]:
        return [dataclasses.replace(found, scale=dtype) for found in exporter.containers(checkpoint, path)]

    return dataclasses.replace(exporter, containers=containers)


def alternatives(checkpoint: Checkpoint, to: str, path: str, bits: int) -> str:
    """Return the alternatives: a format that holds the slice, or this one with other bits or zero-points."""

    def takes(exporter: Exporter, width: int, zero_point: str = EXACT) -> bool:
        return not isinstance(exporter.container(checkpoint, path, width, zero_point), list)

    def holds(exporter: Exporter) -> bool:  # formats that would make it dense for its size do not count
        found = exporter.container(checkpoint, path, bits, EXACT)
        return isinstance(found, Container) or (found is None and not exporter.containers(checkpoint, path))

    exporter, sliced = FORMATS[to], [width for width in range(MASTER_BITS, 1, -1) if width != bits]
    nearest = sorted(sliced, key=lambda width: (abs(width - bits), -width))
    widths = [width for width in nearest if takes(exporter, width)]
    formats = [
        name
        for name, found in FORMATS.items()
        if _reads(found, checkpoint) and _joins(found, checkpoint) and holds(found)
    ]
    centre = checkpoint.spec.symmetric and takes(exporter, bits, MIDRANGE)
    return "use " + ", or ".join(
        [
            *([f"--to {' or '.join(formats)}"] if formats else []),
            *([f"--bits {widths[0]}"] if widths else []),
            *(["--zero-point midrange, which moves the slice's zero-points"] if centre else []),
        ]
    )


def _exporter(to: str, checkpoint: Checkpoint) -> Exporter:
    if to not in FORMATS:
        raise InputError(f"--to {to!r} is not a format; give {', '.join([*FORMATS, planes.NAME])}")
    found, family = FORMATS[to], checkpoint.config.get("model_type")
    if not _reads(found, checkpoint):
        every = [name for name, row in FORMATS.items() if row.families is None and _joins(row, checkpoint)]
        works = ", ".join(found.families or ())
        raise InputError(f"--to {to} does not support {family} models, only {works}; use --to {' or '.join(every)}")
    if not _joins(found, checkpoint):
        works = " or ".join(name for name, exporter in FORMATS.items() if _joins(exporter, checkpoint))
        raise InputError(
            f"--to {to} does not hold the experts of {family} models, which keep them in one tensor; use --to {works}"
        )
    return found


def _joins(exporter: Exporter, checkpoint: Checkpoint) -> bool:
    """Return whether a format holds the checkpoint's experts."""
    experts = checkpoint.spec.experts
    return experts is None or exporter.holds_experts(experts)


def _reads(exporter: Exporter, checkpoint: Checkpoint) -> bool:
    return exporter.families is None or checkpoint.config.get("model_type") in exporter.families


def _check_target(target: Path, exporter: Exporter, *, overwrite: bool) -> None:
    if not exporter.suffix:
        check_replaceable(target, RECORD, "an export of matquant", overwrite=overwrite)
    elif target.is_dir():
        raise InputError(f"{target} is a directory, but this format is a file; use -o NAME{exporter.suffix}")
    elif target.exists() and not overwrite:
        raise InputError(f"{target} exists; use another -o, or --overwrite to replace it")
    elif not target.parent.is_dir():
        raise InputError(f"{target.parent} is not a directory; create it, or use another -o")
