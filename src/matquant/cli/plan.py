"""``matquant plan``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console

from matquant.cli.arguments import Device, Directory, Option, notice
from matquant.planning.request import check_losses
from matquant.system import progress
from matquant.system.arguments import read_numbers
from matquant.system.errors import InputError
from matquant.system.files import json_text
from matquant.system.lazy import lazy

if TYPE_CHECKING:
    from matquant.planning import pareto as curves
    from matquant.planning import run, sensitivity
else:
    curves, run = lazy("matquant.planning.pareto"), lazy("matquant.planning.run")
    sensitivity = lazy("matquant.planning.sensitivity")

Sample = Annotated[
    list[Path] | None,
    Option(
        "--text",
        metavar="FILE",
        help="Text that losses are measured on; may be repeated.",
        show_default="text that comes with matquant",
    ),
]


def plan(
    directory: Directory,
    out: Annotated[
        Path, Option("--out", "-o", metavar="FILE", help="Plan file to write; with --pareto, the curves as JSON.")
    ],
    strategy: Annotated[str, Option(help="search, pyramid, reverse-pyramid, increasing or decreasing.")] = "search",
    bits_per_weight: Annotated[
        float | None, Option(metavar="B", help="Budget: bits per quantised weight, all overhead included.")
    ] = None,
    size: Annotated[str | None, Option(metavar="S", help="Budget: size of the whole model, such as 1.1GB.")] = None,
    tokens_per_second: Annotated[
        float | None, Option(metavar="T", help="Budget: decoding speed on this machine, which is measured first.")
    ] = None,
    text: Sample = None,
    reference: Annotated[
        str | None,
        Option(metavar="MODEL", help="Measure losses against this float reference.", show_default="the 8-bit model"),
    ] = None,
    widths: Annotated[
        str | None, Option(help="Widths that a plan may use.", show_default="search 2,3,4,5,6,8, others 2,4,8")
    ] = None,
    fused: Annotated[
        bool, Option("--fused", help="Give q, k and v the same width, and gate and up, which vLLM needs of exports.")
    ] = False,
    experts: Annotated[
        bool, Option("--experts", help="Choose a width for each expert, by what it loses and how often it is chosen.")
    ] = False,
    samples: Annotated[int, Option(help="Number of calibration sequences.")] = 8,
    seq_len: Annotated[
        int | None, Option(help="Sequence length in tokens.", show_default="the model's context, 512 at most")
    ] = None,
    seed: Annotated[int, Option(help="Random seed for the choice of sequences.")] = 0,
    device: Device = None,
    evaluations: Annotated[int, Option(metavar="N", help="Maximum number of plans that the search measures.")] = 100,
    pareto: Annotated[bool, Option("--pareto", help="Write the Pareto frontier and a picture instead.")] = False,
    baselines: Annotated[Path | None, Option(metavar="FILE", help="JSON file of points to add to the picture.")] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="Picture to write.", show_default="-o with .png")] = None,
) -> None:
    """Choose a width for each layer to fit a budget; the last line is JSON."""
    budget = {"bits_per_weight": bits_per_weight, "size": size, "tokens_per_second": tokens_per_second}
    one: dict[str, Any] = {"strategy": strategy, "experts": experts, **budget}
    options: dict[str, Any] = {"fused": fused, "evaluations": evaluations, "show": Console().print}
    options |= {"widths": None if widths is None else read_numbers(widths, int, "--widths")}
    one_plan = strategy != "search" or any(value is not None for value in budget.values())
    _check_together(pareto=pareto, one=one_plan, picture=bool(baselines or plot), experts=experts)
    if not text and not experts and strategy != run.SEARCH:
        print(json_text(run.run(directory, out, **one, **options)))
        return
    chosen: dict[str, Any] = {"reference": reference, "samples": samples, "seq_len": seq_len, "seed": seed}
    check_losses(directory, text or (), **chosen)  # before torch is imported
    if not pareto:
        run.check_plan(directory, out, **one, widths=options["widths"], evaluations=evaluations)
    with _losses(directory, text or (), device, chosen) as losses:
        if pareto:
            record = curves.run(directory, out, losses=losses, baselines=baselines, plot=plot, **options)
        else:
            record = run.run(directory, out, losses=losses, **one, **options)
    print(json_text(record))


def _check_together(*, pareto: bool, one: bool, picture: bool, experts: bool) -> None:
    """Raise InputError for options that exclude or need each other. one: a strategy or a budget is given."""
    if pareto and one:
        raise InputError("--pareto covers all strategies and budgets; drop --strategy and the budget")
    if not pareto and picture:
        raise InputError("--baselines and --plot need --pareto")
    if experts and pareto:
        raise InputError("--experts is for one plan; drop one of --experts and --pareto")


@contextmanager
def _losses(directory: Path, text: Sequence[Path], device: str | None, chosen: dict[str, Any]) -> Iterator[Any]:
    """Losses of plans on calibration text, with a line of progress."""
    with (
        progress.counted("plan") as count,
        sensitivity.open_losses(directory, text, device=device, notice=notice, **chosen) as losses,
    ):
        losses.report = lambda done: count("plans measured", done, losses.expected)
        yield losses
