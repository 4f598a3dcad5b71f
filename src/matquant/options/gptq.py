"""Options of nested GPTQ (methods/gptq.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matquant.options import shared
from matquant.options.declare import GPTQ, option
from matquant.system.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One calibrated pass, rounds of coordinate descent after it, and optional tuning by gradient (parts/tune.py)."""

    samples: int = shared.samples(128)
    seq_len: int = shared.seq_len(2048)
    batch_size: int = shared.batch_size(4)
    damp: float = option(0.01, "Damping of the Hessian, as a share of its mean diagonal.", panel=GPTQ, positive=True)
    sweeps: int = shared.sweeps(1)
    tune: int = shared.tune(0)
    lr: float = shared.lr(0.003)
    pull: float = shared.pull(0.35)
    autocast: bool = shared.autocast()
    seed: int = shared.seed()
    deterministic: bool = shared.deterministic()


def check_options(options: Mapping[str, Any]) -> None:
    """Raise InputError for tuning options without ``tune``."""
    for name in ("lr", "pull", "autocast"):
        if name in options and not options.get("tune", Settings.tune):
            flag = "--bf16" if name == "autocast" else f"--{name}"
            raise InputError(f"{flag} has no effect without --tune; add --tune STEPS")


def default_lambda(bits: int) -> float:
    """Return 10 at 8 bits down to 1 at 2. Recipes weight the wide widths more (measured: docs/methods.md)."""
    return float(10 ** ((bits - 2) / 6))
