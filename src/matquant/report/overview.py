"""The first screen of the report: what the model is, which width to choose, and what each costs.

One row per width and plan, with what the evaluations measured; core/verdict.py turns losses into words and chooses.
Losses are compared with the float model where an evaluation has a reference, otherwise with int8.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matquant.core.verdict import RECOMMENDED, USABLE, level, limits, smallest, verdict
from matquant.format.contents import file_bytes
from matquant.format.describe import ITEM_BYTES, float_bytes, float_dtype, model_words, size
from matquant.format.read import Checkpoint
from matquant.format.sizes import plain_bytes
from matquant.report.values import fixed, is_number, numbers

TEXT = ("tokens", "context", "reference")  # records that agree in these were measured on the same text
LOSS, AVERAGE = "log_perplexity", "task_average"
METRICS = (LOSS, "kld", "top1", AVERAGE)
FLOAT, MASTER = "float", "int8"
BASES = {FLOAT: "the float model", MASTER: MASTER}  # what losses are compared with, in words
SHORT = {  # column -> what stands before and after its values on a narrow screen
    "size": ("", ""),
    "bits per weight": ("", " bits"),
    "KL divergence": ("KL ", ""),
    "task average": ("tasks ", ""),
    f"of {FLOAT} size": ("", f" of {FLOAT}"),
    f"of {MASTER} size": ("", f" of {MASTER}"),
}
Scores = dict[str, dict[str, float]]  # row -> metric -> value


def overview(
    checkpoint: Checkpoint,
    sizes: Sequence[Mapping[str, Any]],
    records: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """Return the sentences, the columns and the rows of the first screen.

    sizes: rows of facts.size_rows. records: name -> record of matquant eval. labels: record -> the row of its plan.
    """
    found = scores(records, labels)
    base, losses = _losses(found)
    bytes_of = {row["name"]: float(row["model_bytes"]) for row in sizes}
    losses = {name: loss for name, loss in losses.items() if name in bytes_of}
    picked = smallest(losses, bytes_of, below=RECOMMENDED)
    uniform = [row["name"] for row in sizes if row["overflow"] is not None]
    whole, dtype = float_bytes(checkpoint), float_dtype(checkpoint)
    whole_of = (FLOAT, float(whole)) if whole else (uniform[0], bytes_of[uniform[0]])
    listed = sorted(sizes, key=lambda row: -float(row["model_bytes"]))  # plans between the widths
    if whole and dtype:
        listed.insert(0, {"name": FLOAT, "model_bytes": whole, "bits_per_weight": 8 * ITEM_BYTES[dtype]})
    table = [_row(row, found, losses, base=base, whole=whole_of) for row in listed]
    columns = [name for name in table[0]["cells"] if any(row["cells"][name] for row in table)]
    notes = _notes(checkpoint, records, base)
    return {
        "what": model_words(checkpoint),
        "widths": uniform,
        "start": int((picked if picked is not None and picked in uniform else uniform[0]).removeprefix("int")),
        "advice": _advice(losses, bytes_of, found, base=base, whole=whole_of) if losses else _measure_first(uniform[0]),
        "judged": bool(losses),
        "picked": picked,
        "columns": [(name, *SHORT.get(name, (f"{name} ", ""))) for name in columns],
        "rows": table,
        "notes": {name: text for name, text in notes.items() if name in columns},
    }


def scores(records: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Scores:
    """Return what the records measured, row -> metric -> value; the first record that has a value gives it.

    Records of another text than the first one's, or of other tasks, are left out, because they cannot be compared.
    """
    found: Scores = {}
    first: dict[bool, Any] = {}  # whether it is about tasks -> what the first record measured on
    for name, record in records.items():
        for metric in METRICS:
            values = numbers(record.get(metric))
            about_tasks = metric == AVERAGE
            on = _tasks(record) if about_tasks else [record.get(key) for key in TEXT]
            if not values or first.setdefault(about_tasks, on) != on:
                continue
            for width, value in values.items():
                row = f"int{width}" if width.isdigit() else FLOAT if width == FLOAT else labels.get(name)
                if row is not None:
                    found.setdefault(row, {}).setdefault(metric, value)
            if metric == LOSS and is_number(record.get("reference")):
                found.setdefault(FLOAT, {})[LOSS] = record["reference"]
    return found


def _tasks(record: Mapping[str, Any]) -> list[str]:
    return sorted(
        {str(task) for tasks in record.get("tasks", {}).values() if isinstance(tasks, dict) for task in tasks}
    )


def _losses(found: Scores) -> tuple[str, dict[str, float]]:
    """Return what rows are compared with, and the loss of every measured row in nats per token."""
    base = FLOAT if LOSS in found.get(FLOAT, {}) else MASTER
    reference = found.get(base, {}).get(LOSS)
    if reference is None:
        return base, {}
    values = {name: metrics[LOSS] - reference for name, metrics in found.items() if LOSS in metrics}
    return base, {name: loss for name, loss in values.items() if name != FLOAT}


def _row(
    row: Mapping[str, Any], found: Scores, losses: Mapping[str, float], *, base: str, whole: tuple[str, float]
) -> dict[str, Any]:
    """Return a row: its name, verdict and cells by column, "" where nothing was measured."""
    name = row["name"]
    metrics, loss = found.get(name, {}), None if name == base else losses.get(name)
    words = "" if loss is None else verdict(loss, base=BASES[base].removeprefix("the ").removesuffix(" model"))
    whole_name, whole_bytes = whole
    return {
        "name": name,
        "level": None if loss is None else level(loss),
        "verdict": "the original model" if name == FLOAT else words,
        "cells": {
            "size": size(row["model_bytes"]),
            f"of {whole_name} size": f"{100 * row['model_bytes'] / whole_bytes:.0f} %",
            "bits per weight": fixed(row["bits_per_weight"], 2),
            "perplexity": perplexity(metrics.get(LOSS)),
            "loss": fixed(loss, 3),
            "KL divergence": fixed(metrics.get("kld"), 3),
            "same top token": f"{100 * metrics['top1']:.0f} %" if "top1" in metrics else "",
            "task average": f"{100 * metrics[AVERAGE]:.1f} %" if AVERAGE in metrics else "",
        },
    }


def perplexity(loss: float | None) -> str:
    """Format the perplexity of a log-perplexity in nats: two decimals, none from 1,000 on."""
    if loss is None:
        return ""
    value = math.exp(min(loss, 700))
    return fixed(value, 2 if value < 1000 else 0) if value < 10**7 else "over 10 million"


def _advice(
    losses: Mapping[str, float], bytes_of: Mapping[str, float], found: Scores, *, base: str, whole: tuple[str, float]
) -> list[tuple[str, str]]:
    """Return what to choose as pairs (emphasised start, rest of the sentence); some loss is measured."""

    def cost(name: str) -> str:
        return f"{size(bytes_of[name])}{{}}, perplexity {perplexity(found[name][LOSS])}"

    whole_name, whole_bytes = whole
    owner = "" if base == whole_name else f"{BASES[base]}'s "
    rest = f" instead of {owner}{perplexity(found[base][LOSS])}."
    picked, usable = (smallest(losses, bytes_of, below=limit) for limit in (RECOMMENDED, USABLE))
    chosen = picked or min(losses, key=lambda name: losses[name])
    smaller = "" if chosen == whole_name else f" instead of {BASES.get(whole_name, whole_name)}'s {size(whole_bytes)}"
    advice = [(f"Choose {chosen}:", cost(chosen).format(smaller) + ("." if chosen == base else rest))]
    if picked is None:
        advice.append(("All others lose more:", f"nothing measured here stays within {RECOMMENDED:g} nats per token."))
    elif usable is not None and usable != picked:
        advice.append(
            (f"If memory is short, {usable}:", f"{cost(usable).format('')}, {verdict(losses[usable], base='')}.")
        )
    return advice


def _measure_first(widest: str) -> list[tuple[str, str]]:
    """Return what to do where no loss was measured, as _advice does; the templates add the commands."""
    rest = f"Start with {widest}, the most exact. These commands measure all widths on text like yours and write this "
    return [("No width is recommended yet, because perplexity has not been measured.", f"{rest}page again:")]


def _notes(checkpoint: Checkpoint, records: Mapping[str, Mapping[str, Any]], base: str) -> dict[str, str]:
    """Return what every column means."""
    text = next((record for record in records.values() if numbers(record.get(LOSS))), {})
    tokens = f"{text['tokens']:,} tokens of " if type(text.get("tokens")) is int and text["tokens"] else ""
    of_tasks = next((_tasks(record) for record in records.values() if numbers(record.get(AVERAGE))), [])
    disk = size(file_bytes(checkpoint))
    return {
        "size": f"all weights that are read at this width. {_ends(checkpoint)} One copy serves all widths: it takes "
        f"{disk} on disk and the size of int8 in memory; --max-bits 4 keeps only what int4 and below need.",
        "bits per weight": "of the quantised weights, scales and all other overhead included.",
        "perplexity": f"how uncertain the model is about the next token, on {tokens}held-out text; lower is better.",
        "loss": f"log-perplexity above that of {BASES[base]}, in nats per token: {limits()}. Recommended is "
        f"the smallest below {RECOMMENDED:g}.",
        "KL divergence": "of the next-token probabilities from the float model's, in nats per token; lower is better.",
        "same top token": "how often the most likely next token is also the float model's.",
        "task average": f"mean accuracy over {', '.join(of_tasks)}, without examples in the prompt.",
    }


def _ends(checkpoint: Checkpoint) -> str:
    """Return in a sentence at which width embedding and head are read."""
    least = checkpoint.spec.head_bits or 1
    if not checkpoint.ends:
        return f"Embedding and head are not quantised; {size(plain_bytes(checkpoint))} are the same at every width."
    if least == 1:
        return "Embedding and head are quantised too, at the width of the row."
    return f"Embedding and head are quantised too and stay at int{least} in narrower rows, unless a plan names them."
