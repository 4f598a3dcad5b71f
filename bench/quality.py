"""How good each method is on a real model: one JSON line per cell, resumable, and the tables of docs/results.md.

    python bench/quality.py run [--only NAME]...     train and evaluate what is not yet in bench/quality.jsonl
    python bench/quality.py report                   write docs/results.md from bench/quality.jsonl

Every cell sees the same text in the same order for the same number of steps. A method's learning rate is chosen on
SELECT tokens (by its own objective), its figures are those of the disjoint TEST tokens. Stories260K, FFN only.
"""

import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import matquant
from matquant.checkpoint import bits_per_weight, open_checkpoint
from matquant.eval.likelihood import evaluate, log_perplexity
from matquant.models import load_float, load_tokenizer
from matquant.text import read_documents, token_stream

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench" / "quality.jsonl"
RESULTS = ROOT / "docs" / "results.md"
TRAIN_RECORD = ROOT / "bench" / "train.json"  # python bench/train.py | tail -1 > bench/train.json
DATA = Path(os.environ.get("MATQUANT_DATA", ROOT.parent / "shared" / "data"))
MODEL = DATA / "models" / "stories260K"
WIDTHS = (8, 6, 4, 3, 2)
STEPS, BATCH, LENGTH = 300, 8, 256
CONTEXT = 512
TEST = 117 * CONTEXT  # tokens, the first of tinystories-valid after its cut first document
SELECT = 60 * CONTEXT  # tokens, the ones after them
RATES = (1e-3, 2e-3, 4e-3)

PLAIN: dict[str, Any] = {"affine": "none", "objective": "8,4,2", "learn_clip": False}
LEARNED: dict[str, Any] = {"affine": "learned", "objective": "8,4,2", "learn_clip": True}
EVEN = {"weights": (1.0, 1.0, 1.0)}
BEST = {**LEARNED, **EVEN}
FLOAT = "8,4,2,fp->8;4;2"

# name -> (what it is, options, learning rates)
CELLS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "rtn": ("round to nearest, sliced (prefix)", {"method": "rtn", **PLAIN}, ()),
    "rtn-refit": ("round to nearest, affines refitted", {"method": "rtn"}, ()),
    "int8": ("dedicated int8, sliced (prefix)", {"baseline_bits": 8, **PLAIN}, RATES),
    "int2": ("dedicated int2 (Eq. 1)", {"baseline_bits": 2, **PLAIN}, RATES),
    "int2-learned": ("dedicated int2, learned clip and affine", {"baseline_bits": 2, **LEARNED}, RATES),
    "int2-float": ("... fp->2", {"baseline_bits": 2, **LEARNED, "objective": "fp->2"}, RATES),
    "round": ("MatQuant 8,4,2, Eq. 6", {"rule": "round", **PLAIN}, RATES),
    "prefix": ("MatQuant 8,4,2, prefix", PLAIN, RATES),
    "extra": ("MatQuant 8,4,2, Eq. 8 (E.P.)", {"rule": "extra", **PLAIN}, (2e-3,)),
    "single": ("S.P. MatQuant 2, prefix", {**PLAIN, "objective": "2"}, (2e-3,)),
    "refit": ("prefix + affines refitted each step", {**PLAIN, "affine": "refit"}, (2e-3,)),
    "learned": ("prefix + learned affines", {**PLAIN, "affine": "learned"}, (2e-3,)),
    "clip": ("prefix + learned affines and clipping", LEARNED, RATES),
    "even": ("... lambda 1,1,1", BEST, (2e-3,)),
    "codistil": ("... 8,4,2,8->4;2", {**LEARNED, "objective": "8,4,2,8->4;2"}, (2e-3,)),
    "float": (f"... {FLOAT}, lambda 1,1,1", {**BEST, "objective": FLOAT}, (2e-3,)),
    "best": ("... fp->8;4;2, lambda 1,1,1", {**BEST, "objective": "fp->8;4;2"}, RATES),
    "rest": ("... and everything else trained too", {**BEST, "objective": "fp->8;4;2", "train_rest": True}, (2e-3,)),
    "round-best": ("the same under Eq. 6", {**BEST, "objective": "fp->8;4;2", "rule": "round"}, (2e-3,)),
}

Streams = tuple[np.ndarray, np.ndarray]  # TEST and SELECT tokens

app = typer.Typer(add_completion=False)


@app.command()
def run(
    only: Annotated[list[str] | None, typer.Option(help="Cells to run.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; part of what makes runs repeat bit for bit.")] = 1,
) -> None:
    """Run the cells that have no record yet."""
    torch.set_num_threads(threads)
    streams = _streams()
    done = {(record["cell"], record["lr"]) for record in _records()}
    for name in only or CELLS:
        _, options, rates = CELLS[name]
        for lr in rates or (None,):
            if (name, lr) not in done:
                record = _cell(name, options, lr, streams)
                with RECORDS.open("a") as file:
                    file.write(json.dumps(record, sort_keys=True) + "\n")
                print(json.dumps(record, sort_keys=True), flush=True)


@app.command()
def report() -> None:
    """Write docs/results.md from the records."""
    streams = _streams()
    reference = log_perplexity(load_float(MODEL), streams[0], context=CONTEXT)
    RESULTS.write_text(_document(_records(), reference))
    print(f"wrote {RESULTS.relative_to(ROOT)}")


def _streams() -> Streams:
    documents = read_documents([DATA / "text" / "tinystories-valid.txt"])[1:500]
    stream = token_stream(documents, load_tokenizer(MODEL))
    return stream[: TEST + 1], stream[TEST : TEST + SELECT + 1]


def _cell(
    name: str, options: dict[str, Any], lr: float | None, streams: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = matquant.quantize(
            MODEL,
            Path(folder) / "out",
            text=[DATA / "text" / "tinystories-train.txt"],
            steps=STEPS,
            batch_size=BATCH,
            seq_len=LENGTH,
            lr=lr,
            **options,
        )
        trained = time.perf_counter()
        checkpoint, model = open_checkpoint(out), matquant.load(out)
        widths = (2,) if options.get("baseline_bits") == 2 else WIDTHS
        test = evaluate(model, streams[0], bits=widths, context=CONTEXT)
        chosen = checkpoint.spec.widths if lr is not None else ()
        select = evaluate(model, streams[1], bits=chosen, context=CONTEXT)
        spec = checkpoint.spec
        sizes = {str(b): bits_per_weight(checkpoint, dict.fromkeys(checkpoint.shapes, b)) for b in widths}
    return {
        "cell": name,
        "lr": lr,
        "options": options,
        "log_perplexity": test,
        "select": sum(w * select[str(b)] for b, w in zip(spec.widths, spec.weights, strict=True)) if select else None,
        "bits_per_weight": sizes,
        "steps": spec.steps,
        "seed": spec.seed,
        "seconds": round(trained - began, 1),
        "command": " ".join(["python", "bench/quality.py", *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in ("torch", "transformers", "numpy")},
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.is_file() else []


def _best(records: Iterable[dict[str, Any]], cell: str) -> dict[str, Any] | None:
    """The record of a cell at its best learning rate on the SELECT tokens."""
    mine = [record for record in records if record["cell"] == cell]
    return min(mine, key=lambda record: record["select"] or 0.0, default=None)


def _document(records: list[dict[str, Any]], reference: float) -> str:
    best = {name: record for name in CELLS if (record := _best(records, name)) is not None}
    lines = [
        "# Results",
        "",
        "Written by `python bench/quality.py report` from bench/quality.jsonl, which has the command, commit, date and",
        "versions of every figure.",
        "",
        "## Stories260K, FFN only",
        "",
        f"Perplexity on {TEST:,} held-out tokens of tinystories-valid (context {CONTEXT}); float model "
        f"{math.exp(reference):.3f}. {STEPS} steps of",
        f"{BATCH} x {LENGTH} tokens of tinystories-train, the same for every method; lambda 0.1, 0.1, 1 unless it says",
        "otherwise. The learning rate is the best of those tried on other held-out tokens. Bits per weight count",
        "scales and affines; rows have only 64 or 172 weights here, which makes them dear.",
        "",
        "| method | lr (tried) | int8 | int6 | int4 | int3 | int2 | bits per weight at int2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, record in best.items():
        rate = f"{record['lr']:g} ({len(CELLS[name][2])})" if record["lr"] else "-"
        values = [record["log_perplexity"].get(str(width)) for width in WIDTHS]
        cells = ["" if value is None else f"{math.exp(value):.3f}" for value in values]
        lines.append(f"| {CELLS[name][0]} | {rate} | {' | '.join(cells)} | {record['bits_per_weight']['2']:.3f} |")
    return "\n".join([*lines, "", *_verdicts(best), "", *_steps(best), "", *_training_cost(), "", *HISTOGRAMS, ""])


HISTOGRAMS = (
    "## The shape of the codes",
    "",
    "`make demo` draws the 8-bit codes of the embedded model (the paper's Fig. 1c). On our symmetric grid the",
    "distribution does not move to the right, its mean code stays 128; it gathers at the borders of the int2 bins and,",
    "where clipping is learned, at both ends.",
    "",
    "![8-bit codes of MatQuant and of the int8 baseline](histograms.png)",
)


# (what changed, the cell before, the cell after): only one thing differs between the two
STEPS_TRIED = (
    ("`prefix` in place of Eq. 6", "round", "prefix"),
    ("Eq. 8 (extra precision) in place of Eq. 6, at one learning rate", "round", "extra"),
    ("single precision: int2 alone, sliced from 8 bits", "prefix", "single"),
    ("affines refitted at every step", "prefix", "refit"),
    ("affines learned", "prefix", "learned"),
    ("affines and clipping learned", "prefix", "clip"),
    ("then lambda 1, 1, 1", "clip", "even"),
    ("then co-distillation 8,4,2,8->4;2", "clip", "codistil"),
    ("lambda 1, 1, 1, then the float model as a second target at all widths", "even", "float"),
    ("lambda 1, 1, 1, then the float model as the only target (the default)", "even", "best"),
    ("then everything that is not quantised trained too", "best", "rest"),
    ("Eq. 6 in place of `prefix` with all improvements", "best", "round-best"),
    ("dedicated int2: affine and clipping learned", "int2", "int2-learned"),
    ("dedicated int2: then the float model as the only target", "int2-learned", "int2-float"),
)


def _steps(best: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["## What helped and what did not", "", "Perplexity before and after one change (below 0 % is better):", ""]
    lines += ["| change | int8 | int4 | int3 | int2 |", "|---|---|---|---|---|"]
    for what, before, after in STEPS_TRIED:
        if before in best and after in best:
            cells = []
            for width in ("8", "4", "3", "2"):
                values = [best[cell]["log_perplexity"].get(width) for cell in (before, after)]
                old, new = (None if value is None else math.exp(value) for value in values)
                cells.append("" if old is None or new is None else f"{old:.3f} to {new:.3f} ({new / old - 1:+.1%})")
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return lines


def _training_cost() -> list[str]:
    """The last record of bench/train.py, if there is one."""
    if not TRAIN_RECORD.is_file():
        return []
    record = json.loads(TRAIN_RECORD.read_text())
    lines = [
        "## What a joint step costs",
        "",
        f"`{record['command']}` on {record['machine']}: a step over 8, 4, 2 against",
    ]
    lines += ["an ordinary fine-tuning step of the same model (111 M parameters) and batch, interleaved.", ""]
    lines += ["| step | time | peak memory |", "|---|---|---|"]
    for name, ratio in record["time_ratio"].items():
        lines.append(f"| {name} | {ratio:.2f} x | {record['memory_ratio'][name]:.2f} x |")
    return lines


def _verdicts(best: dict[str, dict[str, Any]]) -> list[str]:
    def value(cell: str, width: int) -> float:
        return float(best[cell]["log_perplexity"][str(width)])

    def verdict(holds: bool) -> str:
        return "holds" if holds else "does not hold"

    lines = ["## What was to be shown", ""]
    if {"prefix", "round", "int2"} <= set(best):
        lines += [
            f"- int2 of MatQuant under `prefix` beats the dedicated int2 baseline: "
            f"{verdict(value('prefix', 2) < value('int2', 2))}.",
            f"- int2 under `prefix` beats Eq. 6: {verdict(value('prefix', 2) < value('round', 2))}.",
            "- No width of `prefix` is worse than the same width of Eq. 6: "
            f"{verdict(all(value('prefix', w) <= value('round', w) for w in WIDTHS))}.",
        ]
    if {"best", "int2-float"} <= set(best):
        lines += [
            "- With every improvement on both sides (learned clip and affine, the float model as the target), "
            f"MatQuant's int2 beats the dedicated int2: {verdict(value('best', 2) < value('int2-float', 2))}.",
        ]
    if {"clip", "int2-learned"} <= set(best):
        lines += [
            "- With learned clipping and affines on both sides and no distillation, the same: "
            f"{verdict(value('clip', 2) < value('int2-learned', 2))}.",
        ]
    return lines


if __name__ == "__main__":
    app()
