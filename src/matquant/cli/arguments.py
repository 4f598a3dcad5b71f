"""Arguments and options that several verbs have."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from matquant.core.nest import check_bits
from matquant.system.arguments import read_numbers

Option = typer.Option
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint made by matquant quantize.")]
Text = Annotated[
    list[Path] | None,
    Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text, documents separated by <|endoftext|>; repeat for several files.",
    ),
]
Device = Annotated[str | None, Option(help="Device: cpu or cuda.", show_default="cuda if there is one")]
PlanFile = Annotated[
    Path | None, Option("--plan", metavar="FILE", help="A mixed-precision plan: bits per module path.")
]
BaseModel = Annotated[str | None, Option(metavar="ID", help="Hub id of the float model, for the model card.")]
Measured = Annotated[Path | None, Option(metavar="FILE", help="A record of matquant eval --json, for the model card.")]
Threads = Annotated[int | None, Option(help="Number of CPU threads.", show_default="OMP_NUM_THREADS, else all")]
Activations = Annotated[str, Option(help="Arithmetic of activations: int8, or float (exact and slow).")]
Speculate = Annotated[
    str,
    Option(
        metavar="N",
        help="Tokens to draft at a narrower width in each step: N, auto or off.",
    ),
]
CheckHashes = Annotated[
    bool, Option("--check-hashes/--no-check-hashes", help="Check the checkpoint's hashes before reading it.")
]
Mmap = Annotated[
    bool,
    Option("--mmap/--no-mmap", help="Memory-map the files, or read them: safe if they may be truncated."),
]


def widths(text: str) -> list[int]:
    """Parse the widths of ``--bits 8,4,2``."""
    found: list[int] = read_numbers(text, int, "--bits")
    for width in found:
        check_bits(width)
    return found


def read_speculate(value: str) -> str | int:
    """Return the value of --speculate: a number if it is one."""
    return int(value) if value.isdecimal() else value


def notice(text: str) -> None:
    """Print a notice on stderr."""
    print(f"note: {text}", file=sys.stderr)
