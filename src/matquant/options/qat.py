"""Options of quantisation-aware training (methods/qat.py)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matquant.system.errors import InputError, check_positive

MASTERS = ("one", "each")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Everything a run depends on besides model, data, grid and objective.

    seq_len in tokens. lr: the peak, of the weights (None: ``default_lr``). warmup: steps of linear warm-up, then cosine
    to 0 (None: a tenth, at most the paper's 150). affine_lr: of clips and affines, as a multiple of lr. learn_clip
    (None: where affines are learned). train_rest: also train what is not quantised (embeddings, norms, attention
    under scope ffn). masters: "one" float weight for all widths, or "each" its own: the codes of a width are then
    confined to the bins of the next narrower one, whose bits they share (fake.confine), and no width's gradient moves
    another's weights but, times ``pull``, where that confinement holds it back. wide_lr: of the 8-bit masters, as a
    multiple of lr, and geometrically between for the widths between. freeze: widths up to this one keep the codes they
    start with (0: none do), so that only their affines and the bits below are trained, none of which any two of them
    share. mix: weight of one more loss, of a plan drawn at random for each batch (``draw_mix``), with the targets of
    the narrowest width. hidden: weight, within each loss, of the relative squared distance of the decoder layers'
    outputs to the float model's. save_every: steps between saved states.
    """

    steps: int = 300
    batch_size: int = 8
    seq_len: int = 256
    lr: float | None = None
    seed: int = 0
    warmup: int | None = None
    affine_lr: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    autocast: bool = False
    checkpoint_activations: bool = False
    train_rest: bool = False
    learn_clip: bool | None = None
    masters: str = "one"
    pull: float = 1.0
    wide_lr: float = 1.0
    freeze: int = 0
    mix: float = 0.0
    hidden: float = 0.0
    save_every: int = 100


def check_options(options: Mapping[str, Any]) -> None:
    """InputError for a number that cannot be trained with; TypeError for an option that does not exist."""
    schedule = Schedule(**options)
    for name in ("steps", "batch_size", "seq_len", "lr", "accumulate", "clip_norm", "save_every"):
        value = getattr(schedule, name)
        if value is not None:
            check_positive(**{name: value})
    for name in ("pull", "wide_lr"):
        if not 0 <= getattr(schedule, name) <= 1:
            raise InputError(f"{name}={getattr(schedule, name)}; give a number from 0 to 1")
    for name in ("mix", "hidden"):
        if not 0 <= getattr(schedule, name) < math.inf:
            raise InputError(f"{name}={getattr(schedule, name)}; give a number of at least 0")
    if schedule.masters not in MASTERS:
        raise InputError(f"masters={schedule.masters!r} is not known; use one of {', '.join(MASTERS)}")
    for name in ("seed", "freeze"):
        if getattr(schedule, name) < 0:
            raise InputError(f"{name}={getattr(schedule, name)}; give a number of at least 0")
    if schedule.freeze and schedule.masters != "each":
        raise InputError(
            f"freeze={schedule.freeze} needs a master for each width, masters is 'one'; use masters 'each'"
        )


def default_lr(hidden_size: int) -> float:
    """A peak learning rate for a model of this width.

    A power law through 1e-3 at 256 (better than 2e-3 on the embedded model) and 1e-5 at 2304 (the paper's, App. B),
    between 1e-5 and 2e-3 (best of 1e-3, 2e-3, 4e-3 on stories260K, 64 wide).
    """
    slope = math.log(1e-3 / 1e-5) / math.log(2304 / 256)
    return float(min(2e-3, max(1e-5, 1e-3 * (hidden_size / 256) ** -slope)))
