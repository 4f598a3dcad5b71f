"""Options of distillation in three stages (methods/distill.py)."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matquant.options import gptq, qat, shared
from matquant.options.declare import TRAINING, check_values, option
from matquant.options.objective import parse_objective
from matquant.system.arguments import read_numbers
from matquant.system.errors import InputError

Options = dict[str, Any]
NAME = "distill"
LR = 5e-4  # upper limit: best on the embedded model, no worse than others on stories260K
# freeze -> factor by which the last phase's learning rate is below the distillation's
SLOWER = {4: 10.0, 3: 2.5, 2: 2.5}
OWN = (
    "deterministic",
    "freeze",
    "gptq_weights",
    "lr",
    "samples",
    "steps",
    "sweeps",
    "trained_widths",
    "tune",
)  # apply to the whole method; the others go to every stage
TUNING = ("autocast", "batch_size", "deterministic", "seed", "seq_len")  # options shared with gptq


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Tuned GPTQ, distillation of all widths, and a last phase. ``steps`` counts the distillation's steps. ``freeze``
    applies to the last phase: 4, or 2 for a corpus large enough not to be repeated many times; 0: no last phase."""

    steps: int = shared.steps(96)
    batch_size: int = shared.batch_size(8, shown="4, then 8")
    seq_len: int = shared.seq_len(512, shown="512, then 256")
    lr: float | None = shared.lr(None, shown="half of qat's, at most 5e-4")
    seed: int = shared.seed()
    samples: int = shared.samples(128)
    sweeps: int = shared.sweeps(1)
    tune: int = shared.tune(60)
    freeze: int = shared.freeze(4)
    gptq_weights: Sequence[float] | None = option(
        None,
        "Loss weights of the first stage, of widths 8, 6, 5, 4, 3 and 2.",
        panel=TRAINING,
        metavar="NUMBERS",
        parse=lambda text: read_numbers(text, float, "--gptq-weights"),
        shown="gptq's",
    )
    trained_widths: Sequence[int] = option(
        (8, 4, 3, 2),
        "Widths that the distillation trains; the last phase also trains 6. A step takes time for each.",
        panel=TRAINING,
        metavar="WIDTHS",
        parse=lambda text: read_numbers(text, int, "--trained-widths"),
        shown="8,4,3,2",
    )
    deterministic: bool = shared.deterministic()
    accumulate: int = shared.accumulate()
    autocast: bool = shared.autocast()
    checkpoint_activations: bool = shared.checkpoint_activations()
    save_every: int = shared.save_every()


SHARED = tuple(sorted({field.name for field in dataclasses.fields(Settings)} - set(OWN)))


def stages(options: Mapping[str, Any], *, default_lr: float) -> list[Options]:
    """Return the options of each stage; InputError for options that a stage would reject.

    options: the given fields of Settings; those not in OWN go to every stage that has them. default_lr: qat's default
    for the model's width.
    """
    freeze = options.get("freeze", Settings.freeze)
    if freeze and freeze not in SLOWER:
        raise InputError(
            f"freeze={freeze} is not supported by method {NAME!r}; "
            "use 4 (little text), 3, 2 (corpus) or 0 (no last phase)"
        )
    lr = options["lr"] if options.get("lr") is not None else min(LR, default_lr / 2)
    steps = options.get("steps", Settings.steps)
    given = {name: options[name] for name in SHARED if name in options}
    tuned: Options = {"tune": Settings.tune, "seq_len": Settings.seq_len}
    tuned |= {name: options[name] for name in (*TUNING, "samples", "sweeps", "tune") if name in options}
    if not tuned["tune"]:
        tuned.pop("autocast", None)
    weights = {"weights": options["gptq_weights"]} if options.get("gptq_weights") is not None else {}
    trained: Options = {"masters": "each", "pull": 0.5, **given}
    distilled = {**trained, "wide_lr": 0.5, "hidden": 1.0, "lr": lr, "steps": steps}
    check_values(gptq.Settings, tuned, owner="method 'gptq'")
    check_values(qat.Schedule, distilled, owner="method 'qat'")
    widths = options.get("trained_widths", Settings.trained_widths)
    asked: list[Options] = [
        {"method": "gptq", **weights, **tuned},
        {"method": "qat", "objective": _from_float(widths), "weights": (1.0,) * len(widths), **distilled},
    ]
    if freeze:
        slower = SLOWER[freeze]  # for the narrowest master; 8 bits gets a tenth of it, scales all of it
        last = {**trained, "freeze": freeze, "lr": lr / slower, "wide_lr": slower / 10, "affine_lr": slower}
        last |= {"steps": max(1, steps * 2 // 3)}
        more = sorted({6, *widths}, reverse=True)
        both = ",".join([*map(str, more), _from_float(more)])
        asked.append({"method": "qat", "objective": both, "weights": (1.0,) * len(more), **last})
    return asked


def _from_float(widths: Sequence[int]) -> str:
    """Return the objective that distils widths from the float model; InputError for widths that it cannot have."""
    objective = f"fp->{';'.join(map(str, widths))}"
    parse_objective(objective)
    return objective


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for options that a stage would reject."""
    stages(options, default_lr=LR)
