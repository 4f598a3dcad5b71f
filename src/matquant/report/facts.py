"""The tables of the report: the model, how it was made, its sizes, and evaluations."""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from matquant.core.nest import COMPANDED, FLOAT, UNIFORM
from matquant.format.contents import file_bytes, slice_counts
from matquant.format.describe import ends_words, float_bytes, float_dtype, parameters, scope_words, size
from matquant.format.manifest import side_file
from matquant.format.read import Checkpoint
from matquant.format.side_files import LOG
from matquant.format.sizes import bits_per_weight, plain_bytes, plan_bytes
from matquant.report.values import fixed, is_number, numbers, percent, plan_name, width_order

WIDTHS = (8, 6, 4, 3, 2)
GRID_WORDS = {
    UNIFORM: "uniform: evenly spaced positions",
    COMPANDED: "companded: positions closer together near 0",
    FLOAT: "float: floating point, int4 has the values of MXFP4",
}
COMPARED = {"kld": "KL divergence from the reference", "top1": "same top token as the reference"}


def model_facts(checkpoint: Checkpoint, weights: int) -> list[tuple[str, str]]:
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
    whole = float_bytes(checkpoint)
    return [
        *facts,
        ("parameters", f"{parameters(checkpoint):,}"),
        *([("float model", f"{size(whole)} in {float_dtype(checkpoint)}")] if whole else []),
        ("quantised", f"{weights:,} weights in {len(checkpoint.shapes)} matrices"),
        ("not quantised", size(plain_bytes(checkpoint))),
        ("on disk, all widths together", size(file_bytes(checkpoint))),
    ]


def made_facts(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    spec = checkpoint.spec
    baseline = f", dedicated to int{spec.baseline_bits}" if spec.baseline_bits else ""
    return [
        ("method", f"{spec.method}{baseline}"),
        ("objective", spec.objective or "none"),
        ("loss weights (lambda)", ", ".join(f"{weight:g}" for weight in spec.weights) or "none"),
        ("trained widths", ", ".join(f"int{width}" for width in spec.widths) or "none"),
        ("slicing rule", spec.rule),
        ("grid", f"{GRID_WORDS[spec.grid]}; {'symmetric' if spec.symmetric else 'asymmetric'}"),
        ("group size", "one group per row" if spec.group_size is None else f"{spec.group_size}"),
        ("scales stored as", spec.scale_dtype),
        ("widths with per-width scales", ", ".join(f"int{width}" for width in spec.slices) or "none"),
        ("what is quantised", f"{scope_words(checkpoint)} (--scope {spec.scope})"),
        ("embedding and head", ends_words(checkpoint)),
        ("optimiser steps", f"{spec.steps:,}"),
        ("seed", f"{spec.seed}"),
        ("sha256 of the training tokens", spec.data_sha256 or "none: made without data"),
        *_few_tokens(checkpoint),
    ]


def _few_tokens(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Return how many experts saw too few tokens while calibrating, if the log of the run names any."""
    log = side_file(checkpoint.directory, LOG)
    found: dict[str, int] = {}
    for line in [] if log is None else log.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, AttributeError, TypeError, RecursionError):
            found |= json.loads(line).get("few_tokens", {})
    return [("experts calibrated on the whole layer's tokens, having seen too few", f"{len(found):,}")] if found else []


def size_rows(
    checkpoint: Checkpoint, counts: np.ndarray, plans: Mapping[str, Mapping[str, int]], *, measured: Iterable[int] = ()
) -> list[dict[str, Any]]:
    """Return a row per width and plan: bytes, bits per weight (all overhead included), and share of overflow.

    measured: widths to list besides those that are always shown.
    """
    shown = sorted({*shown_widths(checkpoint), *measured}, reverse=True)
    uniform = {f"int{bits}": checkpoint.widths(bits) for bits in shown}
    rest = plain_bytes(checkpoint)
    rows = []
    for name, widths in (*uniform.items(), *plans.items()):
        total = plan_bytes(checkpoint, widths)
        overflow = None
        if name in uniform:
            bits = int(name.removeprefix("int"))
            overflow = float(slice_counts(counts, bits, rule="extra")[2**bits :].sum() / counts.sum())
        rows.append(
            {
                "name": name,
                "bytes": total,
                "model_bytes": total + rest,
                "bits_per_weight": bits_per_weight(checkpoint, widths),
                "overflow": overflow,
            }
        )
    return rows


def shown_widths(checkpoint: Checkpoint) -> list[int]:
    """Return the widths that every table shows, widest first; none needs more bits than are stored."""
    stored = max(map(checkpoint.spec.stored, checkpoint.shapes))
    return [bits for bits in sorted({*WIDTHS, *checkpoint.spec.widths}, reverse=True) if bits <= stored]


def result_rows(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation as a row per width, with "" where nothing was measured."""
    losses, sizes = numbers(record.get("log_perplexity")), numbers(record.get("bits_per_weight"))
    average = numbers(record.get("task_average"))
    found = {width: _scores(results) for width, results in record.get("tasks", {}).items()}
    compared = {metric: numbers(record[metric]) for metric in COMPARED if isinstance(record.get(metric), dict)}
    tasks = list(dict.fromkeys(task for scores in found.values() for task in scores))
    questions = {count for scores in found.values() for _, count in scores.values() if type(count) is int}

    def row(label: str, width: str, loss: float | None) -> tuple[str, str, str, str, list[str]]:
        scores = [found.get(width, {}).get(task, (None, None))[0] for task in tasks]
        cells = [
            fixed(values.get(width), 5) if metric == "kld" else percent(values.get(width))
            for metric, values in compared.items()
        ]
        cells += [percent(value) for value in (*scores, average.get(width))] if tasks else []
        perplexity = "" if loss is None else fixed(math.exp(min(loss, 700)), 3)
        return label, fixed(sizes.get(width), 3), fixed(loss, 4), perplexity, cells

    reference = record.get("reference")
    floating = [row("float", "float", reference)] if is_number(reference) else []
    labels = {width: f"int{width}" if width.isdigit() else plan_name(record) for width in {*losses, *found}}
    return {
        "name": name,
        "tokens": record.get("tokens") or 0,
        "context": record.get("context"),
        "has_loss": bool(losses),
        "compared": [COMPARED[metric] for metric in compared],
        "tasks": tasks,
        "questions": ", ".join(f"{count:,}" for count in sorted(questions)),
        "rows": [
            *floating,
            *(row(labels[width], width, losses.get(width)) for width in sorted(labels, key=width_order)),
        ],
    }


def _scores(results: Any) -> dict[str, tuple[float, Any]]:
    """Return task -> (value of the metric in Task Avg., number of questions), for tasks that have one."""
    found = {}
    for task, result in results.items() if isinstance(results, dict) else ():
        if isinstance(result, dict) and isinstance(result.get("metrics"), dict):
            value = result["metrics"].get(result.get("metric"))
            if is_number(value):
                found[str(task)] = (float(value), result.get("questions"))
    return found
