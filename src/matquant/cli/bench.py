"""``matquant bench``."""

from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from matquant.cli.arguments import Activations, CheckHashes, Directory, Mmap, Option, Threads, widths
from matquant.system.files import json_text
from matquant.system.lazy import lazy

if TYPE_CHECKING:
    from matquant.engine import bench as benching
    from matquant.engine import engine as engines
else:
    benching, engines = lazy("matquant.engine.bench"), lazy("matquant.engine.engine")


def bench(
    directory: Directory,
    bits: Annotated[str, Option(help="Widths to measure.")] = "8,6,4,3,2",
    tokens: Annotated[int, Option(help="Tokens decoded per sample.")] = 32,
    rounds: Annotated[int, Option(help="Samples per width; widths take turns.")] = 7,
    context: Annotated[int, Option(help="Tokens already in the context when timing starts.")] = 16,
    threads: Threads = None,
    activations: Activations = "int8",
    check_hashes: CheckHashes = True,
    mmap: Mmap = True,
) -> None:
    """Measure tokens per second at every width, and compare with memory bandwidth; the last line is JSON."""
    measured = widths(bits)
    engine = engines.Engine(
        directory,
        max_bits=max(measured),
        threads=threads,
        activations=activations,
        check_hashes=check_hashes,
        mmap=mmap,
    )
    record = benching.bench(engine, bits=measured, tokens=tokens, rounds=rounds, context=context)
    Console().print(benching.table(record, str(directory)))
    print(json_text(record))
