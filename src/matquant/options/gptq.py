"""Options of nested GPTQ (methods/gptq.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matquant.system.errors import InputError, check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """samples: windows of seq_len tokens. batch_size: windows per forward pass. damp: share of the mean diagonal of H
    added to it. sweeps: rounds of coordinate descent after the pass. tune: steps by which every block is then tuned
    (tune.py), with rate lr, the share ``pull`` of the gradients that narrower widths hold back, and in bf16 if
    ``autocast``. seed: of the choice of windows, and of their order in tuning."""

    samples: int = 128
    seq_len: int = 2048
    batch_size: int = 4
    damp: float = 0.01
    sweeps: int = 1
    tune: int = 0
    lr: float = 0.003
    pull: float = 0.35
    autocast: bool = False
    seed: int = 0


def check_options(options: Mapping[str, Any]) -> None:
    """InputError for a number that cannot be worked with; TypeError for an option that does not exist."""
    settings = Settings(**options)
    check_positive(
        samples=settings.samples,
        seq_len=settings.seq_len,
        batch_size=settings.batch_size,
        damp=settings.damp,
        lr=settings.lr,
    )
    for name in ("sweeps", "tune"):
        if getattr(settings, name) < 0:
            raise InputError(f"{name}={getattr(settings, name)}; give a number of at least 0")
    for name in ("lr", "pull", "autocast"):
        if name in options and not settings.tune:
            raise InputError(f"{name}={options[name]!r} is of the tuning and tune is 0; give --tune STEPS too")
    if not 0 <= settings.pull <= 1:
        raise InputError(f"pull={settings.pull}; give a number from 0 to 1")


def default_lambda(bits: int) -> float:
    """10 at 8 bits down to 1 at 2: int8 then stays within 0.1 % of the float model (measured: docs/results.md)."""
    return float(10 ** ((bits - 2) / 6))
