"""Options of distillation in three stages (methods/distill.py)."""

from collections.abc import Mapping
from typing import Any

from matquant.options import gptq, qat
from matquant.system.errors import InputError

Options = dict[str, Any]
NAME = "distill"
STEPS, TUNE = 96, 60
LR = 5e-4  # at most: best on the embedded model, no worse than others on stories260K
SLOWER = {4: 10.0, 3: 2.5, 2: 2.5}  # freeze -> by how much the last phase's rate is below that of the distillation
SHARED = ("accumulate", "autocast", "batch_size", "checkpoint_activations", "save_every", "seed", "seq_len")
TUNING = ("autocast", "batch_size", "seed", "seq_len")  # those of them that gptq has
OWN = ("freeze", "lr", "samples", "steps", "tune")


def stages(options: Mapping[str, Any], *, default_lr: float) -> list[Options]:
    """What ``quantize`` is asked for, stage by stage; InputError for options that a stage would refuse.

    options: any of OWN, and of SHARED, which go to every stage that has them. lr: the peak of the distillation, by
    default half of ``default_lr``, qat's for the model's width, at most LR. steps: of the distillation. tune, samples:
    of gptq. freeze: of the last phase: 4, or 2 for a corpus that is not read again and again.
    """
    freeze = options.get("freeze", 4)
    if freeze not in SLOWER:
        raise InputError(
            f"freeze={freeze} is not known to method {NAME!r}; use one of 4 (little text), 3, 2 (a corpus)"
        )
    lr = options["lr"] if "lr" in options else min(LR, default_lr / 2)
    steps = options.get("steps", STEPS)
    given = {name: options[name] for name in SHARED if name in options}
    tuned: Options = {"tune": TUNE, "seq_len": 512}
    tuned |= {name: options[name] for name in (*TUNING, "samples", "tune") if name in options}
    if not tuned["tune"]:
        tuned.pop("autocast", None)
    trained: Options = {"masters": "each", "pull": 0.5, **given}
    distilled = {**trained, "wide_lr": 0.5, "hidden": 1.0, "lr": lr, "steps": steps}
    slower = SLOWER[freeze]  # of the narrowest master; that of 8 bits is a tenth, that of affines the whole
    last = {**trained, "freeze": freeze, "lr": lr / slower, "wide_lr": slower / 10, "affine_lr": slower}
    last |= {"steps": max(1, steps * 2 // 3)}
    gptq.check_options(tuned)
    qat.check_options(distilled)
    return [
        {"method": "gptq", **tuned},
        {"method": "qat", "objective": "fp->8;4;3;2", "weights": (1.0,) * 4, **distilled},
        {"method": "qat", "objective": "8,6,4,3,2,fp->8;6;4;3;2", "weights": (1.0,) * 5, **last},
    ]


def check_options(options: Mapping[str, Any]) -> None:
    """InputError for an option that no stage has, or that a stage would reject."""
    for name in options:
        if name not in (*OWN, *SHARED):
            raise InputError(f"method {NAME!r} has no option {name!r}; it has {', '.join(sorted((*OWN, *SHARED)))}")
    stages(options, default_lr=LR)
