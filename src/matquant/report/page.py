"""Report on a checkpoint at every width and plan, as one self-contained HTML page, or as a model card in Markdown.

Everything on the page comes from the checkpoint and from records that other verbs wrote. Nothing is measured here, and
no time or path of this machine is included, so the same inputs give the same bytes. The template escapes everything
that comes from a file; overview.py prepares the first screen, facts.py, maps.py and pictures.py the tables and pictures
below it. The order is that of a newcomer's questions: what is it, which width, what does it cost, how do I run it.
Needs no torch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from matquant.core.spec import Plan
from matquant.format.contents import code_counts
from matquant.format.describe import plain, size
from matquant.format.read import Checkpoint, manifest_sha256, open_checkpoint
from matquant.report.facts import made_facts, model_facts, result_rows, size_rows
from matquant.report.maps import heat_map, sensitivities, width_map
from matquant.report.overview import overview
from matquant.report.pictures import chart, curves, histograms
from matquant.report.values import is_width, numbers, plan_name, read_object
from matquant.system.errors import InputError
from matquant.system.files import write_atomically
from matquant.system.locks import holding

TEMPLATE = Path(__file__).with_name("page.html.jinja")
CARD = Path(__file__).with_name("card.md.jinja")


@holding("out")
def write_report(
    directory: Path,
    out: Path,
    *,
    records: Mapping[str, Mapping[str, Any]],
    plans: Sequence[Path] = (),
    pareto: Path | None = None,
    sensitivity: Path | None = None,
) -> None:
    """Write the page about a checkpoint to ``out``, atomically; the model card if its name ends in .md.

    records: name -> record of matquant eval --json. plans: plan files. pareto: {"curves": {name: [[bits], [nats]]},
    "reference": nats or None}, or the file that matquant plan --pareto wrote. sensitivity: {"sensitivity": {path:
    {width: KL in nats}}}, or the losses that matquant plan stores beside a checkpoint. InputError for damaged or other
    files, and for records and plans of another checkpoint.
    """
    if out.is_dir():
        raise InputError(f"-o {out} is a directory; use the name of an HTML or Markdown file")
    markdown = out.suffix.lower() == ".md"
    if markdown and (pareto is not None or sensitivity is not None):
        raise InputError("--pareto and --sensitivity are not part of a model card; drop them, or use -o NAME.html")
    checkpoint = open_checkpoint(directory)
    sha256 = manifest_sha256(directory)
    for name, record in records.items():
        found = record.get("checkpoint", sha256)
        if found != sha256:
            raise InputError(
                f"{name} was measured on checkpoint {str(found)[:12]}…, but {directory} is {sha256[:12]}…; "
                "evaluate this checkpoint, or give the directory of the other"
            )
    named, labels = _named_plans(checkpoint, by_name(plans, "--plan"), records)
    page = _contents(checkpoint, named, labels, records)
    page |= {
        "title": directory.resolve().name,
        "sha256": sha256,
        "chart": chart(*curves(pareto, records)),
        "heat": heat_map(sensitivities(sensitivity, sha256)) if sensitivity is not None else None,
    }
    write_atomically(out, render(page, markdown=markdown).encode())


def _contents(
    checkpoint: Checkpoint,
    named: Mapping[str, Mapping[str, int]],
    labels: Mapping[str, str],
    records: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the tables and pictures that come from the checkpoint and the evaluations."""
    counts = code_counts(checkpoint)
    measured = {
        int(width) for record in records.values() for width in numbers(record.get("bits_per_weight")) if is_width(width)
    }
    sizes = size_rows(checkpoint, counts, named, measured=measured)
    first = overview(checkpoint, sizes, records, labels)
    return {
        "overview": first,
        "model": model_facts(checkpoint, int(counts.sum())),
        "made": made_facts(checkpoint),
        "sizes": sizes,
        "rule": checkpoint.spec.rule,
        "results": [result_rows(name, record) for name, record in records.items()],
        "plans": [width_map(name, bits, checkpoint) for name, bits in named.items()],
        "histograms": histograms(checkpoint, counts),
        "example": next(path for path in checkpoint.shapes if path not in checkpoint.ends),
        "width_plan": next(iter(named), "plan"),
        "chats": (checkpoint.directory / "chat_template.jinja").is_file(),
    }


def _named_plans(
    checkpoint: Checkpoint, files: Mapping[str, Path], records: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Return row -> widths of the plans in files and records, and record -> the row of its plan."""
    named = {_row_name(name): checkpoint.widths(Plan.read(file)) for name, file in files.items()}
    labels = {}
    for name, record in records.items():
        plan = record.get("plan")
        if not isinstance(plan, dict) or not isinstance(plan.get("bits"), dict):
            continue
        bits = Plan(bits=plan["bits"]).resolve(checkpoint.shapes)
        label = next((label for label, widths in named.items() if widths == bits), None)
        if label is None:
            label = _row_name(plan_name(record))
            label = label if label not in named else f"{label} ({name})"
            named[label] = bits
        labels[name] = label
    return named, labels


def _row_name(plan: str) -> str:
    """Return the name of a plan's row, which differs from those of widths."""
    return f"plan {plan}" if re.fullmatch(r"int\d|float", plan) else plan


def render(page: Mapping[str, Any], *, markdown: bool) -> str:
    """Return the HTML page, or the model card, of the contents."""
    environment = jinja2.Environment(
        autoescape=not markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"size": size, "plain": plain}
    template = CARD if markdown else TEMPLATE
    return environment.from_string(template.read_text(encoding="utf-8")).render(page)


def read_record(file: Path) -> dict[str, Any]:
    """Read a record of matquant eval --json; InputError for other files."""
    record = read_object(file, "--eval", "log_perplexity")
    for key in ("log_perplexity", "bits_per_weight", "kld", "top1", "tasks", "task_average"):
        if not isinstance(record.get(key, {}), dict):
            raise InputError(f"--eval {file} has no object {key!r}; give a file that matquant eval --json wrote")
    return record


def by_name(files: Sequence[Path], flag: str) -> dict[str, Path]:
    """Return file stem -> file; InputError if two files share a stem, because the page shows it."""
    named: dict[str, Path] = {}
    for file in files:
        if file.stem in named:
            raise InputError(f"{flag} {named[file.stem]} and {file} are both called {file.stem}; rename one of them")
        named[file.stem] = file
    return named
