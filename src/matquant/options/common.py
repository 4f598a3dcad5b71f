"""Options that every method takes: layers, grid, widths, and how the run behaves."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matquant.core.nest import GRIDS, RULES, UNIFORM
from matquant.core.spec import SCALE_DTYPES
from matquant.options.declare import BASICS, GRID, OBJECTIVE, RUN, option
from matquant.system.arguments import read_numbers
from matquant.system.errors import InputError

AFFINES = ("none", "refit", "learned")
SCOPES = ("ffn", "attention", "linears", "all")
STORED, MIDRANGE = "stored", "midrange"
AUTO, CHANNEL = "auto", "channel"
GROUP_SIZES = (128, 64, 32, 16)  # ``auto`` tries them in this order: the usual size of other tools first


def read_group_size(text: str) -> int | str | None:
    """Return ``auto``, None for ``channel``, or the number."""
    if text == AUTO:
        return AUTO
    if text == CHANNEL:
        return None
    if not text.isdecimal():
        raise InputError(f"--group-size {text!r} is not a group size; use a number, 'auto' or 'channel'")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every method takes."""

    text: Sequence[Path | str] = option(
        (),
        "UTF-8 text, documents separated by <|endoftext|>; repeat for several files.",
        panel=BASICS,
        metavar="FILE",
        shown="text that comes with matquant",
    )
    scope: str = option(
        "all",
        "What to quantise: all (linear layers, embedding and head), linears, ffn or attention.",
        panel=BASICS,
        choices=SCOPES,
    )
    group_size: int | str | None = option(
        AUTO,
        "Weights that share a scale: a number, channel (one scale per row), or auto (the first of 128, 64, 32 and 16 "
        "that divides every layer).",
        panel=BASICS,
        metavar="auto|channel|N",
        parse=read_group_size,
    )
    resume: bool = option(False, "Continue an interrupted run.", panel=BASICS, flags="--resume")
    overwrite: bool = option(False, "Replace OUT, and any interrupted run.", panel=BASICS, flags="--overwrite")

    objective: str | None = option(
        None,
        "Widths and their targets: 8,4,2 is the paper's joint loss, fp->8;4;2 distils from the float model.",
        panel=OBJECTIVE,
        shown="by method",
    )
    weights: Sequence[float] | None = option(
        None,
        "Loss weight (lambda) of each width, in the order of --objective.",
        panel=OBJECTIVE,
        metavar="NUMBERS",
        parse=lambda text: read_numbers(text, float, "--weights"),
        shown="by objective",
    )
    baseline_bits: int | None = option(
        None, "Train a dedicated model of this width instead, as a baseline.", panel=OBJECTIVE, metavar="BITS"
    )
    start: Path | str | None = option(
        None, "Start qat from this nested checkpoint, such as one made by gptq.", panel=OBJECTIVE, metavar="DIR"
    )

    rule: str = option(
        "prefix",
        "Slicing rule: prefix (top bits), round (paper Eq. 6) or extra (extra precision, Eq. 8).",
        panel=GRID,
        choices=RULES,
    )
    grid: str = option(
        UNIFORM,
        "Spacing of the 256 positions: uniform, companded (finer near 0; better slices, fewer exact exports), or float "
        "(int4 is MXFP4; rtn and gptq).",
        panel=GRID,
        choices=GRIDS,
    )
    portable: bool = option(
        False,
        "Use the uniform grid, whose narrow slices other engines hold exactly.",
        panel=GRID,
        flags="--portable",
    )
    symmetric: bool | None = option(
        None,
        "Fix the 8-bit zero-point at 128, or store one per group.",
        panel=GRID,
        flags="--symmetric/--asymmetric",
        shown="symmetric; rtn chooses by error",
    )
    affine: str | None = option(
        None,
        "Per-width scale and zero-point of int2 to int5: none (reuse int8's), refit (least squares) or learned.",
        panel=GRID,
        choices=AFFINES,
        shown="by method",
    )
    zero_point: str = option(
        STORED,
        "Zero-point of int2 to int5: stored, or fixed at mid-range and not stored.",
        panel=GRID,
        choices=(STORED, MIDRANGE),
    )
    scale_dtype: str = option(
        "bfloat16", "Stored scales: bfloat16, or float32 (exact).", panel=GRID, choices=SCALE_DTYPES
    )
    head_bits: int = option(
        6,
        "Narrowest width at which embedding and head are read, unless a plan names them.",
        panel=GRID,
        least=1,
        most=8,
        metavar="BITS",
    )
    exclude: Sequence[str] = option(
        (),
        "Leave out layers whose module path matches this regular expression; repeat for several.",
        panel=GRID,
        metavar="REGEX",
    )

    device: str | None = option(None, "Device: cpu or cuda.", panel=RUN, shown="cuda if there is one")
    threads: int | None = option(None, "Number of CPU threads.", panel=RUN, shown="all")


def check_patterns(exclude: Sequence[str]) -> None:
    """Raise InputError unless every pattern is a regular expression."""
    for pattern in exclude:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"--exclude {pattern!r} is not a regular expression ({error}); escape it") from None
