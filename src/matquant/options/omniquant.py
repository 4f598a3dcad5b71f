"""Options of nested OmniQuant (methods/omniquant.py)."""

from dataclasses import dataclass

from matquant.options import shared
from matquant.options.declare import OMNIQUANT, option

CODES = ("round", "gptq")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Clipping and equivalent transformations, learned layer by layer; ``steps`` counts the steps per decoder layer."""

    samples: int = shared.samples(128)
    batch_size: int = shared.batch_size(4)
    seq_len: int = shared.seq_len(2048)
    steps: int = shared.steps(1220)
    lr: float = shared.lr(1e-3)
    clip_lr: float | None = option(
        None,
        "Learning rate of clipping ratios and of per-width scales.",
        panel=OMNIQUANT,
        positive=True,
        shown="as --lr",
    )
    transform_lr: float | None = option(
        None, "Learning rate of the transformations.", panel=OMNIQUANT, positive=True, shown="as --lr"
    )
    transform: bool = option(
        True,
        "Learn equivalent transformations (paper Eq. 4).",
        panel=OMNIQUANT,
        flags="--transform/--no-transform",
        shown="transform",
    )
    codes: str = option(
        "round",
        "How to choose codes on the learned grid: round, or gptq (our addition, better at every width).",
        panel=OMNIQUANT,
        choices=CODES,
    )
    learn_clip: bool = shared.learn_clip(True, shown="learn-clip")
    weight_decay: float = shared.weight_decay()
    autocast: bool = shared.autocast()
    seed: int = shared.seed()
    deterministic: bool = shared.deterministic()
