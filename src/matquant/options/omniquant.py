"""Options of nested OmniQuant (methods/omniquant.py)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matquant.system.errors import InputError, check_positive

CODES = ("round", "gptq")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything a run depends on besides model, data, grid and objective.

    samples: sequences of ``seq_len`` tokens that are used, over and over. steps: per layer. lr: of everything, but
    clip_lr (factors, affines) and transform_lr (s, delta) where given.
    """

    samples: int = 128
    batch_size: int = 4
    seq_len: int = 2048
    steps: int = 1220
    lr: float = 1e-3
    clip_lr: float | None = None
    transform_lr: float | None = None
    weight_decay: float = 0.0
    seed: int = 0
    autocast: bool = False
    transform: bool = True
    learn_clip: bool = True
    codes: str = "round"


def check_options(options: Mapping[str, Any]) -> None:
    """InputError for a number that cannot be trained with; TypeError for an option that does not exist."""
    settings = Settings(**options)
    for name in ("samples", "batch_size", "seq_len", "steps", "lr", "clip_lr", "transform_lr"):
        value = getattr(settings, name)
        if value is not None:
            check_positive(**{name: value})
    for name in ("seed", "weight_decay"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise InputError(f"{name}={getattr(settings, name)}; give a number of at least 0")
    if settings.codes not in CODES:
        raise InputError(f"codes={settings.codes!r} is not known; use one of {', '.join(CODES)}")
