"""Options of quantisation-aware training (methods/qat.py)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matquant.options import shared
from matquant.options.declare import QAT, TRAINING, option
from matquant.system.errors import InputError

MASTERS = ("one", "each")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Schedule of training.

    With masters "each" every width has a separate float weight, whose codes are confined to the bins of the next
    narrower one (parts/fake.py), so that a width's gradient moves another width's weights only through ``pull``.
    ``freeze`` keeps the codes of narrow widths fixed, so that training changes only what no two widths share: their
    scales and the lower bits.
    """

    steps: int = shared.steps(300)
    batch_size: int = shared.batch_size(8)
    seq_len: int = shared.seq_len(256)
    lr: float | None = shared.lr(None, shown="by width of the model")
    seed: int = shared.seed()
    warmup: int | None = option(
        None, "Steps of linear warm-up before the cosine decay.", panel=TRAINING, least=0, shown="a tenth, at most 150"
    )
    affine_lr: float = option(
        1.0,
        "Learning rate of per-width scales and clipping ratios, as a multiple of --lr.",
        panel=QAT,
        positive=True,
    )
    weight_decay: float = shared.weight_decay()
    clip_norm: float = option(1.0, "Clip the gradient norm to this value.", panel=TRAINING, positive=True)
    accumulate: int = shared.accumulate()
    autocast: bool = shared.autocast()
    checkpoint_activations: bool = shared.checkpoint_activations()
    train_rest: bool = option(
        False,
        "Also train the parameters that are not quantised: embeddings, norms, layers outside --scope.",
        panel=QAT,
        flags="--train-rest",
    )
    learn_clip: bool | None = shared.learn_clip(None, shown="where scales are learned")
    masters: str = option(
        "one", "Float master weights: one for all widths, or one for each.", panel=QAT, choices=MASTERS
    )
    pull: float = shared.pull(1.0)
    wide_lr: float = option(1.0, "Learning rate of the 8-bit masters, as a share of --lr.", panel=QAT, least=0, most=1)
    freeze: int = shared.freeze(0)
    mix: float = option(
        0.0, "Weight of an extra loss at a random mixed-precision plan; 0 for none.", panel=QAT, least=0
    )
    hidden: float = option(
        0.0,
        "Weight of hidden-state distillation from the float model's decoder layers; 0 for none.",
        panel=QAT,
        least=0,
    )
    save_every: int = shared.save_every()


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for options that exclude each other."""
    if options.get("freeze") and options.get("masters", Schedule.masters) != "each":
        raise InputError(
            f"freeze={options['freeze']} needs a master for each width, found masters='one'; use masters='each'"
        )


def default_lr(hidden_size: int) -> float:
    """Return the default peak learning rate for a model of this hidden size.

    A power law through 1e-3 at 256 (better than 2e-3 on the embedded model) and 1e-5 at 2304 (the paper's, App. B),
    between 1e-5 and 2e-3 (best of 1e-3, 2e-3, 4e-3 on stories260K, 64 wide).
    """
    slope = math.log(1e-3 / 1e-5) / math.log(2304 / 256)
    return float(min(2e-3, max(1e-5, 1e-3 * (hidden_size / 256) ** -slope)))
