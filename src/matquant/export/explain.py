"""Report how every format would store every width of a checkpoint: the table of ``matquant export --explain``."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from matquant.export import FORMATS, make_job
from matquant.export.containers import EXACT
from matquant.format.read import Checkpoint
from matquant.system.errors import InputError

WIDTHS = (8, 7, 6, 5, 4, 3, 2)


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


def render(outcomes: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str) -> RenderableType:
    """Return a table, one row per width and one column per format, and the reasons of the rejections below it."""
    table = Table(title=title)
    table.add_column("")
    for to in outcomes:
        table.add_column(f"{to}\n{FORMATS[to].engines}")
    for name in next(iter(outcomes.values())):
        table.add_row(f"int{name}" if name.isdigit() else name, *(_cell(found[name]) for found in outcomes.values()))
    return Group(table, *_reasons(outcomes))


def _cell(outcome: Mapping[str, Any]) -> str:
    if "rejected" in outcome:
        return "rejected"
    return f"{', '.join(outcome['containers'])}\n{outcome['bits_per_weight']:.3f}"


def _reasons(outcomes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterable[str]:
    for found in outcomes.values():
        yield from dict.fromkeys(outcome["rejected"] for outcome in found.values() if "rejected" in outcome)
