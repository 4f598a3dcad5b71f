"""What a pass of nested GPTQ costs against a dedicated pass of one width.

    python bench/gptq.py cost [--rounds N] [--tokens N]            all widths at once, on random layers
    python bench/gptq.py whole [--rounds N]                        the same for a whole model, from file to file

The figures go to bench/gptq.json, from where experiments/results.py takes them. What a pass is worth against the
published method is in experiments/matgptq.py.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import matquant
from matquant.core.nest import MASTER_BITS
from matquant.methods.gptq import nested_gptq
from matquant.methods.parts.fake import Grid
from origin import ROOT, origin

DATA = Path(os.environ.get("MATQUANT_DATA", ROOT.parent / "shared" / "data"))
RECORDS = ROOT / "bench" / "gptq.json"
EMBEDDED = ROOT / "examples" / "reference" / "model"
TRAINING_TEXT = ROOT / "examples" / "reference" / "text" / "train.txt"
# name -> width -> lambda
SETS: dict[str, dict[int, float]] = {
    "842": {8: 1.0, 4: 1.0, 2: 1.0},
    "842-paper": {8: 0.1, 4: 0.1, 2: 1.0},
    "843": {8: 1.0, 4: 1.0, 3: 1.0},
    "84": {8: 1.0, 4: 1.0},
    "86432": {8: 1.0, 6: 1.0, 4: 1.0, 3: 1.0, 2: 1.0},
}
SHAPES = ((2048, 2048), (2048, 8192))  # out x in

app = typer.Typer(add_completion=False)


@app.command()
def cost(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens of the Hessian.")] = 16_384,
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN, e.g. 2048x8192.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Seconds of one pass on random layers: every width set against a dedicated width, with and without the Hessian."""
    torch.set_num_threads(threads)
    wanted = [(int(rows), int(columns)) for rows, columns in (text.split("x") for text in shape or ())] or list(SHAPES)
    results: dict[str, dict[str, Any]] = {}
    for rows, columns in wanted:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        spread = torch.randn(columns, generator=generator).exp()  # channels of unlike size
        hessian = torch.zeros(columns, columns)
        for start in range(0, tokens, 1024):
            x_TK = torch.randn(min(1024, tokens - start), columns, generator=generator) * spread
            hessian.addmm_(x_TK.T, x_TK)
        accumulation_s = _accumulation_seconds(columns, tokens, spread)
        passes: dict[str, tuple[Grid, Mapping[int, float]]] = {
            "dedicated int4": (Grid(rule="prefix", bits=4), {4: 1.0}),
            **{
                f"nested {name}": (Grid(rule="prefix", sliced=tuple(b for b in weights if b < MASTER_BITS)), weights)
                for name, weights in SETS.items()
                if name != "842-paper"
            },
        }
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(rounds):
            for name, (grid, weights) in passes.items():
                began = time.perf_counter()
                nested_gptq(weight, hessian, grid, weights)
                seconds[name].append(time.perf_counter() - began)
        results[f"{rows}x{columns}"] = {"accumulation_s": accumulation_s, "pass_s": seconds}
        base = seconds["dedicated int4"]
        table = Table(
            *("pass", "seconds (median)", "ratio", "with the Hessian", "ratio with it"),
            title=f"{rows} x {columns}, Hessian of {tokens:,} tokens in {accumulation_s:.1f} s",
        )
        for name, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
            whole = [time_s + accumulation_s for time_s in times]
            both = statistics.median(a / (b + accumulation_s) for a, b in zip(whole, base, strict=True))
            table.add_row(
                name,
                *(f"{statistics.median(times):.2f}", f"{ratio:.2f}", f"{statistics.median(whole):.2f}", f"{both:.2f}"),
            )
        Console(width=120).print(table)
    keep("cost", {"results": results, "tokens": tokens, **provenance(threads)})


@app.command()
def whole(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median of their ratios counts.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Seconds of ``matquant quantize --method gptq`` on the embedded model: five widths at once, and int4 alone."""
    torch.set_num_threads(threads)
    passes: dict[str, dict[str, Any]] = {"dedicated int4": {"baseline_bits": 4}, "nested 86432": {}}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name, options in passes.items():
                began = time.perf_counter()
                matquant.quantize(
                    EMBEDDED,
                    Path(folder) / "out",
                    method="gptq",
                    scope="ffn",
                    group_size=None,
                    seq_len=512,
                    text=[TRAINING_TEXT],
                    overwrite=True,
                    **options,
                )
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(*reversed(seconds.values()), strict=True))
    keep("whole", {"seconds": seconds, "ratio": ratio, **provenance(threads)})


def _accumulation_seconds(columns: int, tokens: int, spread: torch.Tensor) -> float:
    """Seconds that X^T X of ``tokens`` tokens takes, from four batches of 1024 after a first one."""
    x_TK = torch.randn(1024, columns) * spread
    hessian = torch.zeros(columns, columns)
    hessian.addmm_(x_TK.T, x_TK)
    began = time.perf_counter()
    for _ in range(4):
        hessian.addmm_(x_TK.T, x_TK)
    return (time.perf_counter() - began) / 4 * tokens / 1024


def keep(what: str, record: Mapping[str, Any]) -> None:
    """Put a record in the place of the last one of its kind."""
    kept = json.loads(RECORDS.read_text()) if RECORDS.is_file() else {}
    RECORDS.write_text(json.dumps({**kept, what: record}, indent=1, sort_keys=True) + "\n")
    print(f"wrote {RECORDS.relative_to(ROOT)}: {what}")


def provenance(threads: int) -> dict[str, Any]:
    """What a record needs to be made again; its times depend on the threads."""
    made = origin("torch", "transformers", "numpy")
    return {**made, "machine": f"{made['machine']}, {threads} threads"}


if __name__ == "__main__":
    app()
