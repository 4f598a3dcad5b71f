"""Report how every format would store every width of a checkpoint: the table of ``matquant export --explain``."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from matquant.core.nest import FLOAT, UNIFORM
from matquant.export import FORMATS, make_job
from matquant.export.containers import EXACT
from matquant.format.read import Checkpoint
from matquant.system.errors import InputError

WIDTHS = (8, 7, 6, 5, 4, 3, 2)
RARE = ("7", "5")  # widths that the table leaves out


def explain(
    checkpoint: Checkpoint, *, plan: Mapping[str, int] | None = None, zero_point: str = EXACT
) -> dict[str, dict[str, Any]]:
    """Return format -> {width or "plan": outcome}.

    An outcome is {"containers": {name: weights}, "bits_per_weight": number, all overhead included} or {"rejected":
    reason}.
    """
    plans = {str(bits): checkpoint.widths(bits) for bits in WIDTHS}
    plans |= {"plan": dict(plan)} if plan is not None else {}
    return {to: _outcomes(checkpoint, to, plans, zero_point) for to in FORMATS}


def _outcomes(
    checkpoint: Checkpoint, to: str, plans: Mapping[str, Mapping[str, int]], zero_point: str
) -> dict[str, dict[str, Any]]:
    families = FORMATS[to].families
    try:
        if families is None or checkpoint.config.get("model_type") in families:
            FORMATS[to].check(checkpoint)
    except InputError as error:
        return {name: {"rejected": str(error)} for name in plans}
    return {name: _outcome(checkpoint, to, wanted, zero_point) for name, wanted in plans.items()}


def _outcome(checkpoint: Checkpoint, to: str, plan: Mapping[str, int], zero_point: str) -> dict[str, Any]:
    try:
        job = make_job(checkpoint, to, plan, zero_point=zero_point)
    except InputError as error:
        return {"rejected": str(error)}
    containers = Counter(job.kinds().values())
    return {"containers": dict(containers.most_common()), "bits_per_weight": job.bits_per_weight()}


def render(outcomes: Mapping[str, Mapping[str, Mapping[str, Any]]], checkpoint: Checkpoint) -> RenderableType:
    """Return a table that fits 80 columns, a row for each format and a column for each width, with notes below it."""
    table = Table(title=f"{checkpoint.directory}: container and bits per weight", title_justify="left")
    table.add_column("--to")
    shown = [name for name in next(iter(outcomes.values())) if name not in RARE]
    for name in shown:
        table.add_column(f"int{name}" if name.isdigit() else name, justify="right")
    for to, found in outcomes.items():
        table.add_row(to.replace("-", "-\n"), *(_cell(found[name]) for name in shown), end_section=True)
    engines = Table.grid(padding=(0, 2))
    for to in outcomes:
        engines.add_row(to, FORMATS[to].engines)
    notes = ["+: some weights are in another type. -: not exact; the reasons are below."]
    grid = checkpoint.spec.grid
    if grid != UNIFORM:
        notes.append(f"Slices of the {grid} grid take wider types; --requantise fits them to their width, at a loss.")
    if grid == FLOAT:
        notes.append("In groups of 32, int4 is MXFP4 without a loss.")
    return Group(table, engines, *notes, *_reasons(outcomes))


def _cell(outcome: Mapping[str, Any]) -> str:
    """Return the container of most weights and the bits per weight, or a dash."""
    if "rejected" in outcome:
        return "-"
    (most, *rest) = outcome["containers"]
    return f"{re.split('-| of ', most)[0]}{'+' if rest else ''}\n{outcome['bits_per_weight']:.2f}"


def _reasons(outcomes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterable[str]:
    for found in outcomes.values():
        shown = (outcome for name, outcome in found.items() if name not in RARE and "rejected" in outcome)
        yield from dict.fromkeys(outcome["rejected"] for outcome in shown)
