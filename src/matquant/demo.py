"""The main job on the embedded model: one nested checkpoint beside the baselines it is measured against.

Every method sees the same text (sampled from the embedded model itself, examples/reference/text) for the same number
of steps and is read at every width. Learning rates: the dedicated int2 model has the best of 1e-3, 2e-3 and 4e-3 and
MatQuant 8,4,2 the better of 1e-3 and 2e-3 in short trials (40 and 60 steps); the others were not tuned.
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

from matquant.format.checkpoint import bits_per_weight, open_checkpoint
from matquant.format.contents import code_counts
from matquant.hf.text import read_documents, token_stream
from matquant.hf_torch.device import bf16_is_fast
from matquant.hf_torch.loading import load_float, load_tokenizer
from matquant.hf_torch.nested_model import load
from matquant.measure.likelihood import evaluate, log_perplexity
from matquant.methods.quantize import quantize
from matquant.report.tables import plot_histograms, plot_widths, write_json
from matquant.system.errors import InputError

REFERENCE = Path(__file__).resolve().parents[2] / "examples" / "reference"
WIDTHS = (8, 6, 4, 3, 2)
STEPS, STEPS_FP32 = 80, 24  # what fits in five minutes on two cores, with and without bf16 arithmetic
HELD_OUT = 40 * 512  # tokens evaluated on
PROMPT = "One day, a little dog"
MATQUANT = "MatQuant 8,4,2"
METHODS: dict[str, dict[str, Any]] = {
    "RTN sliced": {"method": "rtn", "affine": "none"},
    "int8 sliced": {"baseline_bits": 8, "lr": 5e-4},
    "int2 dedicated": {"baseline_bits": 2, "lr": 2e-3},
    MATQUANT: {"objective": "8,4,2", "lr": 1e-3},
    "MatQuant fp->8;4;2": {"objective": "fp->8;4;2", "lr": 1e-3},
}


def run(out: Path, console: Console) -> None:
    """Quantise, evaluate, generate and draw; checkpoints and pictures go to ``out``."""
    model, text = REFERENCE / "model", REFERENCE / "text"
    if not model.is_dir():
        raise InputError(f"the embedded model is not at {model}; it is left out of wheels: run the demo from a clone")
    stream = token_stream(read_documents([text / "valid.txt"]), load_tokenizer(model))[: HELD_OUT + 1]
    reference = log_perplexity(load_float(model, dtype=torch.float32), stream, context=512)
    fast = bf16_is_fast()
    length = STEPS if fast else STEPS_FP32
    if not fast:
        console.print(f"This processor has no bf16 arithmetic: fp32, and {length} steps instead of {STEPS}.")
    results: dict[str, dict[str, float]] = {}
    directories = {name: out / re.sub(r"\W+", "-", name).lower() for name in METHODS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for name, options in METHODS.items():
            steps = 0 if options.get("method") == "rtn" else length
            task = progress.add_task(name, total=steps or 1)
            quantize(
                model,
                directories[name],
                text=[text / "train.txt"],
                steps=length,
                autocast=fast,
                overwrite=True,
                report=_reporter(progress, task),
                **options,
            )
            results[name] = _evaluate(directories[name], stream, only=options.get("baseline_bits"))
            progress.update(task, completed=steps or 1)
    console.print(_table(results, directories, reference))
    for width, sentence in _sentences(directories[MATQUANT]).items():
        console.print(f"[bold]int{width}[/]  {sentence}", highlight=False)
    _draw(out, results, directories, reference)
    record = {"log_perplexity": results, "reference": reference, "steps": length}
    write_json(out / "demo.json", record)
    console.print(
        f"pictures: {out / 'log_perplexity.png'}, {out / 'histograms.png'}; checkpoints and demo.json beside them"
    )


def _reporter(progress: Progress, task: TaskID) -> Callable[[dict[str, Any]], None]:
    return lambda record: progress.update(task, completed=record.get("step"))


def _evaluate(directory: Path, stream: np.ndarray, *, only: int | None) -> dict[str, float]:
    """Log-perplexity by width; a dedicated baseline of less than 8 bits has only its own."""
    widths = WIDTHS if only in (None, 8) else (only,)
    return evaluate(load(directory, dtype=torch.float32, kernels="none"), stream, bits=widths, context=512)


def _table(results: dict[str, dict[str, float]], directories: dict[str, Path], reference: float) -> Table:
    table = Table(title=f"log-perplexity, nats per token (float model {reference:.4f})", title_justify="left")
    table.add_column("method")
    for width in WIDTHS:
        table.add_column(f"int{width}", justify="right")
    for name, values in results.items():
        table.add_row(name, *(f"{values[str(w)]:.4f}" if str(w) in values else "" for w in WIDTHS))
    checkpoint = open_checkpoint(directories[MATQUANT])
    table.add_section()
    sizes = {w: bits_per_weight(checkpoint, dict.fromkeys(checkpoint.shapes, w)) for w in WIDTHS}
    weights = sum(rows * columns for rows, columns in checkpoint.shapes.values())
    table.add_row("bits per weight", *(f"{sizes[w]:.3f}" for w in WIDTHS))
    table.add_row("bytes", *(f"{sizes[w] * weights / 8:,.0f}" for w in WIDTHS))
    return table


def _sentences(directory: Path) -> dict[int, str]:
    """One greedy sentence at each width, all from one resident checkpoint."""
    tokenizer, model = load_tokenizer(directory), load(directory, dtype=torch.float32, kernels="none")
    start = [tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]
    prompt = torch.tensor([start])
    sentences = {}
    for width in WIDTHS:
        model.set_bits(width)
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=start[0]
        )
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        sentences[width] = text[: text.find(".", len(PROMPT)) + 1] or text
    return sentences


def _draw(out: Path, results: dict[str, dict[str, float]], directories: dict[str, Path], reference: float) -> None:
    curves = {}
    for name, values in results.items():
        checkpoint = open_checkpoint(directories[name], check_hashes=False)
        sizes = [bits_per_weight(checkpoint, dict.fromkeys(checkpoint.shapes, int(width))) for width in values]
        curves[name] = (sizes, list(values.values()))
    plot_widths(out / "log_perplexity.png", curves, reference=reference)
    names = ("int8 sliced", MATQUANT)
    counts = {name: code_counts(open_checkpoint(directories[name], check_hashes=False)) for name in names}
    plot_histograms(out / "histograms.png", counts)
