"""``matquant demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from matquant.cli.arguments import Option
from matquant.system.lazy import lazy

if TYPE_CHECKING:
    from matquant import demo as demonstration
else:
    demonstration = lazy("matquant.demo")

OUT = Path("out/demo")


def demo(
    out: Annotated[Path, Option("--out", "-o", metavar="OUT", help="Directory for checkpoints and pictures.")] = OUT,
) -> None:
    """Quantise the embedded model and compare it with its baselines, in a few minutes."""
    demonstration.run(out, Console())
