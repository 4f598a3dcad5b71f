"""Options that several methods have: one help text each, a default for each method."""

from typing import Any

from matquant.options.declare import CALIBRATION, GPTQ, QAT, TRAINING, option


def samples(default: int) -> Any:
    return option(default, "Number of calibration sequences.", panel=CALIBRATION, positive=True)


def seq_len(default: int, **more: Any) -> Any:
    return option(
        default, "Sequence length in tokens, at most the model's context.", panel=CALIBRATION, positive=True, **more
    )


def batch_size(default: int, **more: Any) -> Any:
    return option(
        default,
        "Sequences per forward pass (1 in GPTQ without --tune); reduce this first if you run out of memory.",
        panel=CALIBRATION,
        positive=True,
        **more,
    )


def seed() -> Any:
    return option(0, "Random seed: which sequences are used, and in which order.", panel=CALIBRATION, least=0)


def deterministic() -> Any:
    return option(
        False,
        "Add in a fixed order, so that any number of processes gives the same codes; slower.",
        panel=CALIBRATION,
        flags="--deterministic",
    )


def steps(default: int, **more: Any) -> Any:
    return option(
        default, "Training steps; for omniquant, steps per decoder layer.", panel=TRAINING, positive=True, **more
    )


def lr(default: float | None, **more: Any) -> Any:
    return option(default, "Peak learning rate.", panel=TRAINING, positive=True, **more)


def autocast() -> Any:
    return option(
        False, "Compute forward and backward passes in bf16.", panel=TRAINING, flags="--bf16/--fp32", shown="fp32"
    )


def accumulate() -> Any:
    return option(1, "Forward passes per optimiser step.", panel=TRAINING, positive=True)


def checkpoint_activations() -> Any:
    return option(
        False,
        "Recompute activations in the backward pass: less memory, more time.",
        panel=TRAINING,
        flags="--checkpoint-activations",
    )


def save_every() -> Any:
    return option(100, "Steps between saved states, from which --resume continues.", panel=TRAINING, positive=True)


def weight_decay() -> Any:
    return option(0.0, "Weight decay of AdamW.", panel=TRAINING, least=0)


def learn_clip(default: bool | None, **more: Any) -> Any:
    return option(
        default,
        "Learn the clipping ratio of the 8-bit grid (paper Eq. 3).",
        panel=TRAINING,
        flags="--learn-clip/--no-learn-clip",
        **more,
    )


def sweeps(default: int) -> Any:
    return option(default, "Rounds of coordinate descent over all codes after the pass.", panel=GPTQ, least=0)


def tune(default: int) -> Any:
    return option(
        default,
        "Gradient steps that tune the codes of each decoder layer afterwards; 0 for none.",
        panel=GPTQ,
        metavar="STEPS",
        least=0,
    )


def pull(default: float) -> Any:
    return option(
        default,
        "Share of a blocked gradient that moves the next narrower master instead.",
        panel=QAT,
        least=0,
        most=1,
    )


def freeze(default: int) -> Any:
    return option(
        default,
        "Keep the starting codes of widths up to this one; 0 trains every width.",
        panel=QAT,
        metavar="BITS",
        least=0,
    )
