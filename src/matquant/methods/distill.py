"""Distillation in three stages, each of which starts from the checkpoint of the one before.

1. nested GPTQ, tuned block by block (gptq.py, tune.py);
2. every width learns from the float model alone, its logits and hidden states, with a master of its own (qat.py):
   without cross-entropy, which overfits what little text calibration takes;
3. a last phase: the codes up to 4 bits stay as they are, the bits below and the affines are trained, with cross-entropy
   too. No two widths share what is trained, so that none loses by what another gains. With a corpus only those of 2
   bits stay: then int3 and int4 gain more than they lose to each other (docs/methods.md).

It is the best one-shot way measured (docs/methods.md). Costs: gptq's, then ``steps`` of QAT over four widths and two
thirds of them over five. The stages' checkpoints lie in the work directory until all is done, so that a run that was
stopped goes on in the stage it was in.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matquant.format.read import open_checkpoint
from matquant.format.write import check_writable
from matquant.hf_torch.loading import hidden_size
from matquant.methods.parts.job import Report, source_files
from matquant.options import distill
from matquant.options.distill import Options
from matquant.options.qat import default_lr
from matquant.options.request import Request
from matquant.system.errors import InputError
from matquant.system.files import move_into_place
from matquant.system.interrupted import RECORD, claim, work_folder

# Options of every method that all stages share.
SHARED = ("scope", "exclude", "group_size", "zero_point", "grid", "scale_dtype")


def stages(model: Path | str, options: Mapping[str, Any]) -> list[Options]:
    """What ``quantize`` is asked for, stage by stage, for this model; see options/distill.py."""
    return distill.stages(options, default_lr=default_lr(hidden_size(model)))


def run(quantize: Callable[..., Path], model: Path | str, request: Request, *, report: Report) -> Path:
    """Make the checkpoint stage by stage in the work folder by ``quantize``, and move it into place."""
    common, work = request.common, request.work
    shared = {name: getattr(common, name) for name in SHARED}
    mark = _mark(model, request, shared)
    folder = work / _name(mark)  # another run's stages are never taken for this one's
    if common.resume and not folder.is_dir():
        raise InputError(
            f"--resume with other settings or text than those of the interrupted run in {work}; "
            "use the same, or --overwrite to start again"
        )
    asked = stages(model, request.choice.options)
    done, start = folder, None
    with _recorded(folder, {**mark, "files": source_files(model)}, resume=common.resume):
        for number, stage in enumerate(asked, 1):
            done, name = folder / str(number), f"{number}/{len(asked)}"
            if common.resume and done.is_dir():
                _check_stage(done)
            else:
                quantize(
                    model,
                    done,
                    text=common.text,
                    start=start,
                    device=common.device,
                    resume=common.resume and work_folder(done).is_dir(),
                    overwrite=True,
                    report=_staged(report, name),
                    **shared,
                    **stage,
                )
            start = done
    check_writable(request.target, overwrite=common.overwrite)
    move_into_place(done, request.target)
    shutil.rmtree(work, ignore_errors=True)
    return request.target


def _staged(report: Report, name: str) -> Report:
    """Records of a stage, with its name; the settings of the whole were reported before."""
    return lambda record: None if "settings" in record else report({**record, "stage": name})


@contextlib.contextmanager
def _recorded(folder: Path, mark: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """Record the run while its stages are made. One that ends before its first stage has begun leaves all as it was."""
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
            with contextlib.suppress(OSError):  # other stages are in it
                folder.parent.rmdir()
        shutil.rmtree(before, ignore_errors=True)


def _check_stage(done: Path) -> None:
    """InputError if the checkpoint of a finished stage is damaged."""
    try:
        open_checkpoint(done)
    except InputError as error:
        found = str(error).rpartition("; ")[0]
        raise InputError(f"{found}; delete {done}, a finished stage, to make it again") from None


def _mark(model: Path | str, request: Request, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What the run depends on, as JSON has it."""
    data = hashlib.sha256(json.dumps(list(request.documents)).encode()).hexdigest()
    asked = {"method": distill.NAME, "model": str(model), **shared, **request.choice.options, "data_sha256": data}
    result: dict[str, Any] = json.loads(json.dumps(asked, sort_keys=True, default=str))
    return result


def _name(mark: Mapping[str, Any]) -> str:
    """A name that tells this run's stages from those of other runs."""
    return hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:16]
