"""``matquant generate`` and ``matquant chat``."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matquant.cli.arguments import (
    Activations,
    CheckHashes,
    Directory,
    Mmap,
    Option,
    PlanFile,
    Speculate,
    Threads,
    read_speculate,
)
from matquant.system.errors import InputError
from matquant.system.files import MARK
from matquant.system.lazy import lazy
from matquant.system.startup import INTERRUPTED

if TYPE_CHECKING:
    from matquant.engine import terminal
else:
    terminal = lazy("matquant.engine.terminal")

FROM_MODEL = "generation_config.json, else greedy"

Bits = Annotated[int | None, Option(help="Width to decode at.", show_default="--max-bits")]
MaxBits = Annotated[int, Option(help="Keep in memory only the bits that widths up to this one need.")]
MaxTokens = Annotated[int, Option(help="Maximum number of new tokens.")]
Temperature = Annotated[float | None, Option(help="Sampling temperature; 0 is greedy.", show_default=FROM_MODEL)]
TopK = Annotated[
    int | None, Option(help="Sample from the k most probable tokens; 0 for all.", show_default="as temperature")
]
TopP = Annotated[
    float | None,
    Option(
        help="Nucleus sampling: smallest token set with probability p.",
        show_default="as temperature",
    ),
]
MinP = Annotated[
    float | None,
    Option(help="Drop tokens below p times the largest probability.", show_default="as temperature"),
]
Seed = Annotated[int | None, Option(help="Random seed for sampling.", show_default="0")]
Stop = Annotated[list[str] | None, Option(metavar="TEXT", help="Stop before this text; repeat for several.")]


def generate(
    directory: Directory,
    prompt: Annotated[str, Option(metavar="TEXT", help="Text to continue; - reads it from standard input.")] = "",
    bits: Bits = None,
    plan: PlanFile = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    speculate: Speculate = "off",
    max_bits: MaxBits = 8,
    threads: Threads = None,
    activations: Activations = "int8",
    check_hashes: CheckHashes = True,
    mmap: Mmap = True,
) -> None:
    """Continue a text at any width, streaming. Needs no torch."""
    engine = _engine(max_bits, threads, activations, check_hashes, mmap)
    sampling = _sampling(temperature, top_k, top_p, min_p, seed)
    try:
        code = terminal.generate(
            directory=directory,
            prompt=read_input() if prompt == "-" else prompt,
            bits=bits,
            plan=plan,
            max_tokens=max_tokens,
            stop=stop or [],
            speculate=read_speculate(speculate),
            engine=engine,
            **sampling,
        )
    except KeyboardInterrupt:  # at any point
        code = INTERRUPTED
    raise typer.Exit(code)


def chat(
    directory: Directory,
    bits: Bits = None,
    plan: PlanFile = None,
    system: Annotated[str, Option(metavar="TEXT", help="System message.")] = "",
    context: Annotated[
        int | None,
        Option(
            metavar="N",
            help="Maximum conversation length in tokens.",
            show_default="the model's context, 32768 at most",
        ),
    ] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    speculate: Speculate = "off",
    max_bits: MaxBits = 8,
    threads: Threads = None,
    activations: Activations = "int8",
    check_hashes: CheckHashes = True,
    mmap: Mmap = True,
) -> None:
    """Talk to a model; /bits 2 switches the width between replies, /quit ends."""
    engine = _engine(max_bits, threads, activations, check_hashes, mmap)
    sampling = _sampling(temperature, top_k, top_p, min_p, seed)
    try:
        code = terminal.chat(
            directory=directory,
            bits=bits,
            plan=plan,
            system=system,
            context=context,
            max_tokens=max_tokens,
            speculate=read_speculate(speculate),
            engine=engine,
            **sampling,
        )
    except KeyboardInterrupt:
        code = INTERRUPTED
    raise typer.Exit(code)


def _engine(max_bits: int, threads: int | None, activations: str, check_hashes: bool, mmap: bool) -> dict[str, Any]:
    """Return the options that open the engine."""
    return {
        "max_bits": max_bits,
        "threads": threads,
        "activations": activations,
        "check_hashes": check_hashes,
        "mmap": mmap,
    }


def _sampling(
    temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None, seed: int | None
) -> dict[str, Any]:
    """Return the sampling options that were given."""
    return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}


def read_input() -> str:
    """Read standard input as text; InputError if it is not UTF-8."""
    try:
        return sys.stdin.read().removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
