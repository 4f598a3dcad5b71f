"""Distillation in up to three stages, each starting from the checkpoint of the previous stage.

1. nested GPTQ, tuned block by block (gptq.py, tune.py);
2. distillation of every width, each with a separate master, from the float model's logits and hidden states only
   (qat.py). Cross-entropy would overfit the short calibration text;
3. a last phase, with cross-entropy too: the codes up to 4 bits stay fixed, and only the lower bits, scales and
   zero-points are trained. No two widths share what is trained, so no width improves at another's expense. With a
   corpus only the 2-bit codes stay fixed: then int3 and int4 gain more than they lose to each other (docs/methods.md).

This is the best one-shot method that we measured (docs/methods.md). Cost: gptq's, then ``steps`` of QAT over the
trained widths, and two thirds of them with int6 as well. The stages' checkpoints stay in the work directory until the
end, so that an interrupted run continues in its current stage.
"""

import contextlib
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matquant.distributed.collect import on_first
from matquant.format.read import open_checkpoint
from matquant.format.write import check_writable
from matquant.hf_torch.device import choose_device
from matquant.hf_torch.loading import hidden_size
from matquant.methods.parts.job import Report, source_files
from matquant.methods.parts.split_state import check_batch
from matquant.methods.prepare import trains_in_bf16
from matquant.options import distill
from matquant.options.distill import Options
from matquant.options.qat import Schedule, default_lr
from matquant.options.request import Request
from matquant.system.errors import InputError
from matquant.system.files import move_into_place
from matquant.system.interrupted import RECORD, claim, work_folder

# Options of every method; all stages share them.
SHARED = ("scope", "exclude", "group_size", "zero_point", "grid", "scale_dtype", "head_bits")


def stages(model: Path | str, options: Mapping[str, Any]) -> list[Options]:
    """Return the options of ``quantize`` for each stage on this model; see options/distill.py."""
    return distill.stages(options, default_lr=default_lr(hidden_size(model)))


def run(quantize: Callable[..., Path], model: Path | str, request: Request, *, report: Report) -> Path:
    """Make the checkpoint stage by stage in the work folder with ``quantize``, and move it into place."""
    common, work = request.common, request.work
    shared = {name: getattr(common, name) for name in SHARED}
    mark = _mark(model, request, shared)
    folder = work / _name(mark)  # named by the run, so that stages of other runs are never reused
    if common.resume and not on_first(folder.is_dir):
        raise InputError(
            f"--resume needs the settings and text of the interrupted run in {work}, found others; "
            "use the same, or use --overwrite to start again"
        )
    options = dict(request.choice.options)
    if trains_in_bf16(request, choose_device(common.device)):
        options["autocast"] = True
    asked = stages(model, options)
    step = Schedule.batch_size, Schedule.accumulate
    check_batch(asked[1].get("batch_size", step[0]), accumulate=asked[1].get("accumulate", step[1]))
    done, start = folder, None
    with _recorded(folder, {**mark, "files": source_files(model)}, resume=common.resume):
        for number, stage in enumerate(asked, 1):
            done, name = folder / str(number), f"{number}/{len(asked)}"
            if common.resume and on_first(done.is_dir):
                on_first(functools.partial(_check_stage, done))
            else:
                quantize(
                    model,
                    done,
                    text=common.text,
                    start=start,
                    device=common.device,
                    resume=common.resume and on_first(work_folder(done).is_dir),
                    overwrite=True,
                    report=lambda record, name=name: report({**record, "stage": name}),
                    **shared,
                    **stage,
                )
            start = done
    on_first(functools.partial(_finish, request, done))
    return request.target


def _finish(request: Request, done: Path) -> None:
    """Move the last stage's checkpoint into place, and delete the others."""
    check_writable(request.target, overwrite=request.common.overwrite)
    move_into_place(done, request.target)
    shutil.rmtree(request.work, ignore_errors=True)


@contextlib.contextmanager
def _recorded(folder: Path, mark: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """Record the run while its stages are made; leave everything unchanged if it ends before the first stage.

    Of several processes the first one does so.
    """
    with contextlib.ExitStack() as recorded:
        on_first(lambda: recorded.enter_context(_recording(folder, mark, resume=resume)))
        yield


@contextlib.contextmanager
def _recording(folder: Path, mark: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    before = folder.with_name(f".{folder.name}.before")
    if not resume and folder.is_dir():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    claim(folder, mark, resume=resume)
    try:
        yield
    finally:
        if [file.name for file in folder.iterdir()] == [RECORD]:
            shutil.rmtree(folder)
            if before.is_dir():
                before.rename(folder)
            with contextlib.suppress(OSError):  # it holds other stages
                folder.parent.rmdir()
        shutil.rmtree(before, ignore_errors=True)


def _check_stage(done: Path) -> None:
    """Raise InputError if the checkpoint of a finished stage is damaged."""
    try:
        open_checkpoint(done)
    except InputError as error:
        found = str(error).rpartition("; ")[0]
        raise InputError(f"{found}; delete the finished stage {done} to make it again") from None


def _mark(model: Path | str, request: Request, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything the run depends on, as JSON values."""
    data = hashlib.sha256(json.dumps(list(request.documents)).encode()).hexdigest()
    asked = {"method": distill.NAME, "model": str(model), **shared, **request.choice.options, "data_sha256": data}
    result: dict[str, Any] = json.loads(json.dumps(asked, sort_keys=True, default=str))
    return result


def _name(mark: Mapping[str, Any]) -> str:
    """Return a name that is unique to this run's stages."""
    return hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:16]
