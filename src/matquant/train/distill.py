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

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matquant.errors import InputError
from matquant.files import move_into_place
from matquant.models import hidden_size
from matquant.options import distill
from matquant.options.distill import Options
from matquant.options.qat import default_lr
from matquant.text import read_documents
from matquant.train.job import Report


def stages(model: Path | str, options: Mapping[str, Any]) -> list[Options]:
    """What ``quantize`` is asked for, stage by stage, for this model; see matquant.options.distill."""
    return distill.stages(options, default_lr=default_lr(hidden_size(model)))


def run(
    quantize: Callable[..., Path],
    model: Path | str,
    target: Path,
    *,
    text: Sequence[Path | str],
    common: Mapping[str, Any],
    options: Mapping[str, Any],
    work: Path,
    resume: bool,
    report: Report,
) -> Path:
    """Make ``target`` stage by stage in ``work`` by ``quantize``. common: what it is asked for in every stage."""
    settings = {name: value for name, value in {**common, **options}.items() if name != "device"}
    folder = work / _mark(model, text, settings)  # another run's stages are never taken for this one's
    if resume and not folder.is_dir():
        raise InputError(
            f"--resume with other settings or text than those of the interrupted run in {work}; "
            "use the same, or --overwrite to start again"
        )
    asked = stages(model, options)
    done, start = folder, None
    for number, stage in enumerate(asked, 1):
        done, name = folder / str(number), f"{number}/{len(asked)}"
        if not (resume and done.is_dir()):
            quantize(
                model,
                done,
                text=text,
                start=start,
                resume=resume and done.with_name(f".{number}.work").is_dir(),
                overwrite=True,
                report=lambda record, name=name: report({**record, "stage": name}),
                **common,
                **stage,
            )
        start = done
    move_into_place(done, target)
    shutil.rmtree(work, ignore_errors=True)
    return target


def _mark(model: Path | str, text: Sequence[Path | str], settings: Mapping[str, Any]) -> str:
    """A name that tells this run's stages from those of other runs."""
    asked = json.dumps([str(model), settings, read_documents(text)], sort_keys=True, default=str)
    return hashlib.sha256(asked.encode()).hexdigest()[:16]
