"""Demo on the embedded model: one checkpoint by the default recipe, a prompt at every width, a comparison.

All rows of the table see the same text (sampled from the embedded model itself, examples/reference/text). The trained
rows run the same number of steps. Learning rates were tuned in short trials of 40 and 60 steps: three values for the
dedicated int2 model, two for MatQuant 8,4,2.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from matquant.engine.engine import Engine
from matquant.format.contents import code_counts
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.hf.text import read_documents, token_stream
from matquant.hf_torch.device import bf16_is_fast
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.hf_torch.nested_model import load
from matquant.measure.likelihood import evaluate, log_perplexity
from matquant.methods.quantize import quantize
from matquant.options.recipes import DEFAULT
from matquant.report.plots import plot_histograms, plot_widths
from matquant.report.tables import write_json
from matquant.system.errors import InputError

REFERENCE = Path(__file__).resolve().parents[2] / "examples" / "reference"
WIDTHS = (8, 6, 4, 3, 2)
ANSWERED = (8, 4, 3, 2)  # widths at which the prompt is continued
STEPS, STEPS_FP32 = 30, 12  # what fits in four minutes on two cores, with and without bf16 arithmetic
HELD_OUT = 40 * 512  # tokens evaluated on
PROMPT = "One day, a little dog"
RECIPE = f"recipe {DEFAULT}"
MATQUANT = "MatQuant 8,4,2, QAT"
TRAINED: dict[str, Any] = {"method": "qat", "scope": "all", "group_size": 128, "zero_point": "midrange"}
ROWS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    "round to nearest": {"method": "rtn", "symmetric": True, "group_size": 128},
    MATQUANT: {**TRAINED, "objective": "8,4,2", "lr": 1e-3},
    "dedicated int2, QAT": {**TRAINED, "baseline_bits": 2, "lr": 2e-3},
}


def run(out: Path, console: Console) -> None:
    """Quantise, answer, compare and draw; checkpoints and pictures go to ``out``."""
    model, text = REFERENCE / "model", REFERENCE / "text"
    if not model.is_dir():
        raise InputError(
            f"the embedded model is not at {model}, because wheels leave it out; run the demo from a clone"
        )
    stream = token_stream(read_documents([text / "valid.txt"]), load_tokenizer(model))[: HELD_OUT + 1]
    steps = STEPS if bf16_is_fast() else STEPS_FP32
    results: dict[str, dict[str, float]] = {}
    directories = {name: out / re.sub(r"\W+", "-", name).strip("-").lower() for name in ROWS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name, options in ROWS.items():
            task = progress.add_task(name, total=None)
            _quantise(model, directories[name], [text / "train.txt"], options, steps, _reporter(progress, task))
            results[name] = _evaluate(directories[name], stream, only=options.get("baseline_bits"))
            progress.update(task, completed=1, total=1)
            if name == RECIPE:
                for width, sentence in _sentences(directories[name]).items():
                    progress.console.print(f"[bold]int{width}[/]  {sentence}", highlight=False)
    reference = log_perplexity(load_float(model, dtype=torch.float32), stream, context=512)
    console.print(_table(results, directories, reference, steps))
    _draw(out, results, directories, reference)
    write_json(out / "demo.json", {"log_perplexity": results, "reference": reference, "steps": steps})
    console.print(f"wrote {out / 'log_perplexity.png'}, {out / 'histograms.png'}, the checkpoints and demo.json")


def _quantise(
    model: Path, out: Path, text: list[Path], options: dict[str, Any], steps: int, report: Callable[[Any], None]
) -> None:
    """Make one checkpoint; trained rows run ``steps`` steps."""
    more: dict[str, Any] = {"steps": steps, "autocast": bf16_is_fast()} if options.get("method") == "qat" else {}
    if options.get("method") != "rtn":
        more["text"] = text
    quantize(model, out, overwrite=True, report=report, **options, **more)


def _reporter(progress: Progress, task: TaskID) -> Callable[[dict[str, Any]], None]:
    return lambda record: progress.update(task, completed=record.get("step"), total=record.get("steps"))


def _evaluate(directory: Path, stream: np.ndarray, *, only: int | None) -> dict[str, float]:
    """Return log-perplexity by width; a dedicated baseline below 8 bits is evaluated only at its width."""
    widths = WIDTHS if only in (None, 8) else (only,)
    return evaluate(load(directory, dtype=torch.float32, kernels="none"), stream, bits=widths, context=512)


def _table(results: dict[str, dict[str, float]], directories: dict[str, Path], reference: float, steps: int) -> Table:
    title = f"log-perplexity in nats per token (float model {reference:.4f}); QAT rows: {steps} steps"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for width in WIDTHS:
        table.add_column(f"int{width}", justify="right")
    for name, values in results.items():
        table.add_row(name, *(f"{values[str(w)]:.4f}" if str(w) in values else "" for w in WIDTHS))
    checkpoint = open_checkpoint(directories[RECIPE])
    table.add_section()
    sizes = {w: bits_per_weight(checkpoint, checkpoint.widths(w)) for w in WIDTHS}
    weights = sum(rows * columns for rows, columns in checkpoint.shapes.values())
    table.add_row("bits per weight", *(f"{sizes[w]:.3f}" for w in WIDTHS))
    table.add_row("bytes", *(f"{sizes[w] * weights / 8:,.0f}" for w in WIDTHS))
    return table


def _sentences(directory: Path) -> dict[int, str]:
    """Continue the prompt by one greedy sentence at each width, all from one resident checkpoint."""
    engine = Engine(directory)
    sentences = {}
    for width in ANSWERED:
        text = PROMPT + engine.generate(PROMPT, bits=width, max_tokens=40, temperature=0.0)
        sentences[width] = text[: text.find(".", len(PROMPT)) + 1] or text
    return sentences


def _draw(out: Path, results: dict[str, dict[str, float]], directories: dict[str, Path], reference: float) -> None:
    curves = {}
    for name, values in results.items():
        checkpoint = open_checkpoint(directories[name], check_hashes=False)
        sizes = [bits_per_weight(checkpoint, checkpoint.widths(int(width))) for width in values]
        curves[name] = (sizes, list(values.values()))
    plot_widths(out / "log_perplexity.png", curves, reference=reference)
    names = ("round to nearest", RECIPE)
    counts = {name: code_counts(open_checkpoint(directories[name], check_hashes=False)) for name in names}
    plot_histograms(out / "histograms.png", counts)
