"""``matquant report``."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from matquant.cli.arguments import Device, Directory, Option, Text
from matquant.measure.request import check_evaluation
from matquant.report import facts, page
from matquant.system import progress
from matquant.system.lazy import lazy

if TYPE_CHECKING:
    from matquant.measure import run
else:
    run = lazy("matquant.measure.run")


def report(
    directory: Directory,
    out: Annotated[
        Path, Option("--out", "-o", metavar="FILE", help="HTML page to write; a model card if the name ends in .md.")
    ],
    evals: Annotated[
        list[Path] | None, Option("--eval", metavar="FILE", help="A record written by matquant eval --json.")
    ] = None,
    plans: Annotated[list[Path] | None, Option("--plan", metavar="FILE", help="A mixed-precision plan.")] = None,
    pareto: Annotated[Path | None, Option(metavar="FILE", help="Curves written by matquant plan --pareto.")] = None,
    sensitivity: Annotated[Path | None, Option(metavar="FILE", help="KL divergence per module path and width.")] = None,
    text: Text = None,
    max_tokens: Annotated[int | None, Option(help="Evaluate at most this many tokens of the text.")] = None,
    device: Device = None,
) -> None:
    """Write one HTML page: which width to choose, and what each costs."""
    records = {name: page.read_record(file) for name, file in page.by_name(evals or [], "--eval").items()}
    if text:
        check_evaluation(directory, text=text, max_tokens=max_tokens)  # before torch is imported
        measure = functools.partial(run.evaluate_checkpoint, directory, text=text, max_tokens=max_tokens, device=device)
        with progress.counted("report") as count:
            records["held-out text"] = measure(bits=facts.WIDTHS, report=count)
            for plan in plans or []:
                records[plan.stem] = measure(bits=(), plan_file=plan, report=count)
    page.write_report(directory, out, records=records, plans=plans or [], pareto=pareto, sensitivity=sensitivity)
    print(f"wrote {out}")
