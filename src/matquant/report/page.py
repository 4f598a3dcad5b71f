"""What a checkpoint is, what it costs and how good it is at every width and plan, as one HTML page that needs nothing.

Everything on the page comes from the checkpoint and from records that other verbs wrote; nothing is measured here, no
time and no path of this machine enters, so the same inputs give the same bytes. Everything that comes from a file is
escaped by the template, whose pictures are drawn from the numbers that this module prepares. Needs no torch.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from matquant.core.nest import MASTER_BITS
from matquant.core.spec import Plan
from matquant.format.checkpoint import (
    Checkpoint,
    bits_per_weight,
    manifest_sha256,
    open_checkpoint,
    plain_bytes,
    plan_bytes,
)
from matquant.format.contents import code_counts, slice_counts
from matquant.system.errors import InputError
from matquant.system.files import read_json, write_atomically
from matquant.system.locks import holding

TEMPLATE = Path(__file__).with_name("page.html.jinja")
WIDTHS = (8, 6, 4, 3, 2)
MASTER_CODES = 2**MASTER_BITS
HEATS = 9  # shades of the heat map
SPAN = 3.0  # nats above the best that a picture shows, as matquant eval --plot
CHART = (480, 320)  # a picture's own units; left and lower margins below hold the labels
MARGIN = (58, 12, 12, 44)  # left, top, right, bottom

Curves = dict[str, list[tuple[float, float]]]  # name -> (bits per weight, nats)


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
    """Write the page about a checkpoint to ``out``, atomically.

    records: name -> what matquant eval --json wrote. plans: plan files. pareto: {"curves": {name: [[bits], [nats]]},
    "reference": nats or None}, or what matquant plan --pareto wrote. sensitivity: {"sensitivity": {path: {width: KL in
    nats}}}, or the losses that matquant plan keeps beside a checkpoint. InputError for damage, files that are not such,
    and records and plans of another checkpoint.
    """
    if out.is_dir():
        raise InputError(f"-o {out} is a directory; give the name of an HTML file")
    checkpoint = open_checkpoint(directory)
    sha256 = manifest_sha256(directory)
    for name, record in records.items():
        found = record.get("checkpoint", sha256)
        if found != sha256:
            raise InputError(
                f"{name} was measured on the checkpoint {str(found)[:12]}…, {directory} is {sha256[:12]}…; "
                "evaluate this one, or give that one's directory"
            )
    named = {name: Plan.read(file).resolve(checkpoint.shapes) for name, file in by_name(plans, "--plan").items()}
    for name, record in records.items():
        plan = record.get("plan")
        if isinstance(plan, dict) and isinstance(plan.get("bits"), dict) and plan["bits"] not in named.values():
            label = _plan_name(record)
            named[label if label not in named else f"{label} ({name})"] = Plan(bits=plan["bits"]).resolve(
                checkpoint.shapes
            )
    counts = code_counts(checkpoint)
    page = {
        "title": directory.resolve().name,
        "sha256": sha256,
        "model": _model_facts(checkpoint, int(counts.sum())),
        "made": _made_facts(checkpoint),
        "sizes": _sizes(checkpoint, counts, named),
        "rule": checkpoint.spec.rule,
        "results": [_results(name, record) for name, record in records.items()],
        "chart": _chart(*_curves(pareto, records)),
        "plans": [_width_map(name, bits, checkpoint) for name, bits in named.items()],
        "heat": _heat_map(_sensitivities(sensitivity, sha256)) if sensitivity is not None else None,
        "histograms": _histograms(checkpoint, counts),
        "example": next(iter(checkpoint.shapes)),
        "width_plan": next(iter(named), "plan"),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["size"] = _size
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page)
    write_atomically(out, text.encode())


def read_record(file: Path) -> dict[str, Any]:
    """A record of matquant eval --json; InputError if ``file`` is none."""
    record = _read(file, "--eval", "log_perplexity")
    for key in ("log_perplexity", "bits_per_weight", "tasks", "task_average"):
        if not isinstance(record.get(key, {}), dict):
            raise InputError(f"--eval {file} has no object {key!r}; give what matquant eval --json wrote")
    return record


def by_name(files: Sequence[Path], flag: str) -> dict[str, Path]:
    """Name without ending -> file; InputError if two share one, for it stands on the page."""
    named: dict[str, Path] = {}
    for file in files:
        if file.stem in named:
            raise InputError(f"{flag} {named[file.stem]} and {file} are both called {file.stem}; rename one of them")
        named[file.stem] = file
    return named


def _read(file: Path, flag: str, key: str = "") -> dict[str, Any]:
    """A JSON object; it has an object ``key`` if that is asked for."""
    what = f'a JSON file with "{key}"' if key else "a JSON file"
    values = read_json(file, flag, give=what)
    if not isinstance(values, dict) or (key and not isinstance(values.get(key), dict)):
        found = f'an object with "{key}"' if key else "an object"
        raise InputError(f"{flag} {file} is not {found}; give {what}")
    return values


# ------------------------------------------------------------------------------------------------------------- tables


def _model_facts(checkpoint: Checkpoint, weights: int) -> list[tuple[str, str]]:
    config = checkpoint.config
    names = {
        "model_type": "family",
        "num_hidden_layers": "decoder layers",
        "hidden_size": "hidden size",
        "vocab_size": "vocabulary",
        "max_position_embeddings": "context in tokens",
    }
    facts = [
        (words, f"{config[key]:,}" if type(config[key]) is int else str(config[key]))
        for key, words in names.items()
        if key in config
    ]
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        facts.insert(0, ("architecture", str(architectures[0])))
    return [
        *facts,
        ("quantised", f"{weights:,} weights in {len(checkpoint.shapes)} linears"),
        ("not quantised", _size(plain_bytes(checkpoint))),
    ]


def _made_facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    spec = checkpoint.spec
    baseline = f", dedicated to int{spec.baseline_bits}" if spec.baseline_bits else ""
    return [
        ("method", f"{spec.method}{baseline}"),
        ("objective", spec.objective or "none"),
        ("weights of the widths", ", ".join(f"{weight:g}" for weight in spec.weights) or "none"),
        ("trained widths", ", ".join(f"int{width}" for width in spec.widths) or "none"),
        ("slicing rule", spec.rule),
        ("grid", "symmetric" if spec.symmetric else "asymmetric"),
        ("weights that share a scale", "an output channel" if spec.group_size is None else f"{spec.group_size}"),
        ("scales stored as", spec.scale_dtype),
        ("widths with scales of their own", ", ".join(f"int{width}" for width in spec.slices) or "none"),
        ("linears quantised", spec.scope),
        ("optimiser steps", f"{spec.steps:,}"),
        ("seed", f"{spec.seed}"),
        ("sha256 of the training tokens", spec.data_sha256 or "none: made without data"),
    ]


def _sizes(checkpoint: Checkpoint, counts: np.ndarray, plans: Mapping[str, Mapping[str, int]]) -> list[dict[str, Any]]:
    """A row per width and plan: honest bytes and bits per weight, and the share of codes beyond the top of it."""
    uniform = {f"int{bits}": dict.fromkeys(checkpoint.shapes, bits) for bits in _shown_widths(checkpoint)}
    rest = plain_bytes(checkpoint)
    rows = []
    for name, widths in (*uniform.items(), *plans.items()):
        size = plan_bytes(checkpoint, widths)
        overflow = None
        if name in uniform:
            bits = int(name.removeprefix("int"))
            overflow = float(slice_counts(counts, bits, rule="extra")[2**bits :].sum() / counts.sum())
        rows.append(
            {
                "name": name,
                "bytes": size,
                "model_bytes": size + rest,
                "bits_per_weight": bits_per_weight(checkpoint, widths),
                "overflow": overflow,
            }
        )
    return rows


def _shown_widths(checkpoint: Checkpoint) -> list[int]:
    return sorted({*WIDTHS, *checkpoint.spec.widths}, reverse=True)


def _results(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluation: a row per width, with what it measured; "" where it measured nothing."""
    losses, sizes = _numbers(record.get("log_perplexity")), _numbers(record.get("bits_per_weight"))
    average = _numbers(record.get("task_average"))
    found = {width: _scores(results) for width, results in record.get("tasks", {}).items()}
    tasks = list(dict.fromkeys(task for scores in found.values() for task in scores))
    questions = {count for scores in found.values() for _, count in scores.values() if type(count) is int}

    def row(label: str, width: str, loss: float | None) -> tuple[str, str, str, str, list[str]]:
        scores = [found.get(width, {}).get(task, (None, None))[0] for task in tasks]
        cells = [_percent(value) for value in (*scores, average.get(width))] if tasks else []
        perplexity = "" if loss is None else _fixed(math.exp(min(loss, 700)), 3)
        return label, _fixed(sizes.get(width), 3), _fixed(loss, 4), perplexity, cells

    reference = record.get("reference")
    floating = [row("float", "float", reference)] if _is_number(reference) else []
    labels = {width: f"int{width}" if width.isdigit() else _plan_name(record) for width in {*losses, *found}}
    return {
        "name": name,
        "tokens": record.get("tokens") or 0,
        "context": record.get("context"),
        "has_loss": bool(losses),
        "tasks": tasks,
        "questions": ", ".join(f"{count:,}" for count in sorted(questions)),
        "rows": [
            *floating,
            *(row(labels[width], width, losses.get(width)) for width in sorted(labels, key=_width_order)),
        ],
    }


def _plan_name(record: Mapping[str, Any]) -> str:
    plan = record.get("plan")
    return str(plan.get("name", "plan")) if isinstance(plan, dict) else "plan"


def _scores(results: Any) -> dict[str, tuple[float, Any]]:
    """Task -> (value of the metric that counts, number of questions), of those that have one."""
    found = {}
    for task, result in results.items() if isinstance(results, dict) else ():
        if isinstance(result, dict) and isinstance(result.get("metrics"), dict):
            value = result["metrics"].get(result.get("metric"))
            if _is_number(value):
                found[str(task)] = (float(value), result.get("questions"))
    return found


def _width_map(name: str, bits: Mapping[str, int], checkpoint: Checkpoint) -> dict[str, Any]:
    """Layers x linears of a plan: the width, or the widths from-to where a fused block has several."""
    cells: dict[str, dict[str, list[int]]] = {}
    for path, width in bits.items():
        layer, kind = _place(path)
        cells.setdefault(layer, {}).setdefault(kind, []).append(width)
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))

    def cell(widths: list[int] | None) -> tuple[str, int]:
        if not widths:
            return "", 0
        low, high = min(widths), max(widths)
        return (f"{low}" if low == high else f"{low}–{high}"), round(sum(widths) / len(widths))

    layers = sorted(cells, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0, layer))
    return {
        "name": name,
        "bits_per_weight": bits_per_weight(checkpoint, bits),
        "kinds": kinds,
        "rows": [(layer, [cell(cells[layer].get(kind)) for kind in kinds]) for layer in layers],
    }


def _place(path: str) -> tuple[str, str]:
    """(decoder layer, linear within it) of a path; experts share one name."""
    found = re.search(r"\.(\d+)\.(.+)", f".{path}")
    return (found[1], re.sub(r"\.\d+(?=\.|$)", ".*", found[2])) if found else ("other", path)


def _sensitivities(file: Path, sha256: str) -> Mapping[str, Any]:
    """Path -> {width: KL} from {"sensitivity": ...}, or from the losses that matquant plan keeps beside a checkpoint.

    There a loss is of a whole plan, the digits of its widths in the order of "paths"; a path's sensitivity is that of
    the smallest group with it, within a decoder layer, that had the width while all else was at 8 bits.
    """
    values = _read(file, "--sensitivity")
    if isinstance(values.get("sensitivity"), dict):
        return dict(values["sensitivity"])
    paths, sets = values.get("paths"), values.get("losses")
    if not isinstance(paths, list) or not isinstance(sets, list):
        raise InputError(
            f'--sensitivity {file} has neither "sensitivity" nor "losses"; '
            'give {"sensitivity": {path: {width: KL}}} or what matquant plan keeps beside the checkpoint'
        )
    names = [str(path) for path in paths]
    ours = [known for known in sets if isinstance(known, dict) and known.get("checkpoint_sha256") == sha256]
    measured = ours[-1].get("measured") if ours else None
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    sizes: dict[tuple[str, str], int] = {}
    for digits, losses in measured.items() if isinstance(measured, dict) else ():
        group = [name for name, digit in zip(names, str(digits), strict=False) if digit != str(MASTER_BITS)]
        widths = set(str(digits)) - {str(MASTER_BITS)}
        layers = {_place(name)[0] for name in group}
        if len(widths) == 1 and len(layers) == 1 and isinstance(losses, list) and losses and _is_number(losses[0]):
            width = widths.pop()
            for name in group:
                if len(group) < sizes.get((name, width), len(names) + 1):
                    sizes[name, width] = len(group)
                    found[name][width] = losses[0]
    return found


def _heat_map(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Paths x widths: KL and its shade, logarithmic between the smallest and the largest; None without numbers."""
    table = {str(path): _numbers(row) for path, row in values.items()}
    widths = sorted({width for row in table.values() for width in row}, key=_width_order)
    positive = [value for row in table.values() for value in row.values() if value > 0]
    if not positive:
        return None
    low, high = math.log(min(positive)), math.log(max(positive))

    def cell(value: float | None) -> tuple[str, int]:
        if value is None:
            return "", -1
        place = (math.log(value) - low) / (high - low) if value > 0 and high > low else 0.0
        return f"{value:.2g}", min(int(place * HEATS), HEATS - 1)

    return {
        "widths": widths,
        "rows": [(path, [cell(row.get(width)) for width in widths]) for path, row in table.items()],
    }


def _width_order(width: str) -> tuple[bool, int, str]:
    return not width.isdigit(), -int(width) if width.isdigit() else 0, width


# ----------------------------------------------------------------------------------------------------------- pictures


def _curves(pareto: Path | None, records: Mapping[str, Mapping[str, Any]]) -> tuple[Curves, float | None]:
    """Name -> [(bits per weight, nats)] from the Pareto file, else from the evaluations; and the float model's nats."""
    curves: Curves = {}
    if pareto is not None:
        values = _read(pareto, "--pareto", "curves")
        baselines = values.get("baselines")
        for name, curve in (*values["curves"].items(), *(baselines.items() if isinstance(baselines, dict) else ())):
            if isinstance(curve, list) and all(isinstance(point, dict) for point in curve):
                curves[str(name)] = _points((p.get("bits_per_weight"), p.get("log_perplexity")) for p in curve)
            elif isinstance(curve, list) and len(curve) == 2 and all(isinstance(side, list) for side in curve):
                curves[str(name)] = _points(zip(*curve, strict=False))
        reference = values.get("reference")
    else:
        for name, record in records.items():
            losses, sizes = _numbers(record.get("log_perplexity")), _numbers(record.get("bits_per_weight"))
            pairs = {width: (sizes[width], loss) for width, loss in losses.items() if width in sizes}
            curves[f"{name}, uniform widths"] = _points(pair for width, pair in pairs.items() if width.isdigit())
            label = _plan_name(record)
            curves[f"{name}, {label}" if label != name else name] = _points(
                pair for width, pair in pairs.items() if not width.isdigit()
            )
        reference = next((record["reference"] for record in records.values() if record.get("reference")), None)
    return {name: points for name, points in curves.items() if points}, reference if _is_number(reference) else None


def _points(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    return sorted((float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y))


def _chart(curves: Curves, reference: float | None) -> dict[str, Any] | None:
    """Coordinates of a line chart in CHART units: axes, ticks, and a polyline with marks for every curve."""
    if not curves:
        return None
    points = [point for curve in curves.values() for point in curve]
    lowest = min([y for _, y in points] + ([reference] if reference is not None else []))
    y_low, y_high = lowest - 0.05, min(max(y for _, y in points), lowest + SPAN) + 0.05
    x_low, x_high = math.floor(min(x for x, _ in points)), math.ceil(max(x for x, _ in points))
    x_high = max(x_high, x_low + 1)
    left, top, right, bottom = MARGIN
    width, height = CHART

    def across(x: float) -> float:
        return round(left + (x - x_low) / (x_high - x_low) * (width - left - right), 1)

    def down(y: float) -> float:
        return round(height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom), 1)

    return {
        "size": CHART,
        "box": (left, top, width - left - right, height - top - bottom),
        "x_ticks": [(across(x), x) for x in range(x_low, x_high + 1)],
        "y_ticks": [(down(y), f"{y:.2f}") for y in _ticks(y_low, y_high)],
        "reference": (down(reference), f"{reference:.3f}") if reference is not None else None,
        "beyond": sum(y > y_high for _, y in points),
        "top": f"{y_high:.2f}",
        "curves": [
            {
                "name": name,
                "line": " ".join(f"{across(x)},{down(y)}" for x, y in curve),
                "marks": [(across(x), down(y), f"{name}: {x:.3f} bits, {y:.4f} nats") for x, y in curve if y <= y_high],
                "points": [(f"{x:.3f}", f"{y:.4f}") for x, y in curve],
            }
            for name, curve in curves.items()
        ],
    }


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between ``low`` and ``high``."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _histograms(checkpoint: Checkpoint, counts: np.ndarray) -> list[dict[str, Any]]:
    """Histogram of the codes at each shown width: bars as (x, y, width, height) in a box of 256 x 100."""
    pictures = []
    for bits in _shown_widths(checkpoint):
        histogram = slice_counts(counts, bits, rule=checkpoint.spec.rule)
        step = MASTER_CODES / len(histogram)
        heights = 100 * histogram / histogram.max()
        mean = float((np.arange(len(histogram)) * histogram).sum() / histogram.sum())
        pictures.append(
            {
                "name": f"int{bits}",
                "levels": len(histogram),
                "mean": f"{mean:.1f}" if bits == MASTER_BITS else f"{mean:.2f}",
                "largest": f"{histogram.max() / histogram.sum():.1%}",
                "bars": [
                    (round(index * step, 2), round(100 - bar, 2), round(step, 2), round(bar, 2))
                    for index, bar in enumerate(heights.tolist())
                    if bar > 0
                ],
            }
        )
    return pictures


# ------------------------------------------------------------------------------------------------------------ numbers


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _numbers(values: Any) -> dict[str, float]:
    """The entries of a JSON object that are numbers; of anything else, none."""
    return {str(key): value for key, value in values.items() if _is_number(value)} if isinstance(values, dict) else {}


def _fixed(value: Any, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if _is_number(value) else ""


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _size(count: float) -> str:
    """Bytes for people: three digits and a decimal unit."""
    unit: Callable[[int], str] = ("bytes", "kB", "MB", "GB", "TB").__getitem__
    power = min(int(math.log10(max(count, 1)) // 3), 4)
    return f"{count:,.0f} {unit(0)}" if power == 0 else f"{count / 1000**power:.3g} {unit(power)}"
