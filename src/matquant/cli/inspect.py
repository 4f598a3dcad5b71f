"""``matquant inspect``."""

from typing import Annotated

from rich.console import Console

from matquant.cli.arguments import Directory, Option
from matquant.format.contents import render, summarise
from matquant.format.read import open_checkpoint
from matquant.system.files import json_text


def inspect_checkpoint(
    directory: Directory,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show widths, sizes, bits per weight and histograms of a checkpoint."""
    checkpoint = open_checkpoint(directory, partial=True)
    summary = summarise(checkpoint)
    if as_json:
        print(json_text(summary))
    else:
        Console().print(render(checkpoint, summary))
