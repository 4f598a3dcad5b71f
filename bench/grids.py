"""Whole models of companded and of uniform codes, taking turns: tokens/s at every width.

    python bench/grids.py [--shape llama-3.2-1b --threads 1 --rounds 15 --prompt 32]

Both have the same random codes (bench/decode.py) and read the same bytes; only what a code stands for differs. In every
round each width decodes STRETCH tokens and reads a prompt on each grid, the grids in turn first. Rates are per second
of CPU time of one thread and of wall time of more: what else runs on a machine then takes nothing but its share of
caches and memory. The model that is loaded second may get fewer huge pages and be slower for it: measure with each one
--first. Ratios are medians of those of the rounds. Records go to bench/grids.jsonl.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from decode import CACHE, CONTEXT, SHAPES, STRETCH, check, write_random
from linear import WIDTHS
from matquant import _native
from matquant.core.nest import COMPANDED, UNIFORM
from matquant.engine.engine import Engine
from matquant.engine.session import Session
from origin import ROOT, append_record, origin

RECORDS = ROOT / "bench" / "grids.jsonl"
PAIR = (UNIFORM, COMPANDED)

Rates = dict[tuple[str, int, str], list[float]]  # by work, width and grid


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.2-1b",
    threads: Annotated[int, typer.Option()] = 1,
    group: Annotated[int, typer.Option(help="Group size; 0 for per-channel.")] = 128,
    rounds: Annotated[int, typer.Option()] = 15,
    prompt: Annotated[int, typer.Option(min=0, help=f"Tokens of a prompt, 0 for none, or from {CONTEXT}.")] = 32,
    first: Annotated[str, typer.Option(help="Which is loaded first.")] = UNIFORM,
    keep: Annotated[bool, typer.Option(help="Append to bench/grids.jsonl.")] = False,
) -> None:
    """Measure and print."""
    if first not in PAIR:
        raise typer.BadParameter(f"--first {first} is neither {' nor '.join(PAIR)}")
    if 0 < prompt < CONTEXT:
        raise typer.BadParameter(
            f"--prompt {prompt} is shorter than the context of {CONTEXT} tokens; use 0 or a longer one"
        )
    sessions = {}
    for grid in sorted(PAIR, key=lambda grid: grid != first):
        directory = CACHE / "grids" / shape / f"{grid}-{group}"
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            write_random(directory, SHAPES[shape], group or None, grid=grid)
        engine = Engine(directory, threads=threads, check_hashes=False)
        sessions[grid] = engine.session(CONTEXT + max(prompt, STRETCH))
        check(engine, sessions[grid])
        prefill(sessions[grid], WIDTHS[0], CONTEXT)
    rates = measure(sessions, threads=threads, rounds=rounds, prompt=prompt)
    table = Table("work", "width", *(f"{grid}, tokens/s" for grid in PAIR), "ratio")
    rows = []
    for work, bits in dict.fromkeys(key[:2] for key in rates):
        plain, bent = (rates[work, bits, grid] for grid in PAIR)
        ratio = statistics.median(over / under for over, under in zip(bent, plain, strict=True))
        medians = [statistics.median(values) for values in (plain, bent)]
        rows.append({"work": work, "bits": bits, **dict(zip(PAIR, medians, strict=True)), "ratio": ratio})
        table.add_row(work, f"int{bits}", *(f"{value:.2f}" for value in medians), f"{ratio:.3f}")
    Console().print(table)
    sizes = {"shape": shape, "threads": threads, "group": group, "rounds": rounds, "prompt": prompt, "first": first}
    line = json.dumps({**origin(), **sizes, "isa": _native.isa(), "rates": rows}, sort_keys=True)
    if keep:
        append_record(RECORDS, line)
    print(line)


def measure(sessions: dict[str, Session], *, threads: int, rounds: int, prompt: int) -> Rates:
    clock: Callable[[], float] = time.process_time if threads == 1 else time.perf_counter
    rates: Rates = {}
    for turn in range(-1, rounds):  # the first one only touches everything
        for bits in WIDTHS:
            for grid in PAIR if turn % 2 == 0 else reversed(PAIR):
                session = sessions[grid]
                works = {"decode": (partial(decode, session, bits), STRETCH)}
                if prompt:
                    works["prefill"] = (partial(prefill, session, bits, prompt), prompt)
                for work, (run, tokens) in works.items():
                    began = clock()
                    run()
                    if turn >= 0:
                        rates.setdefault((work, bits, grid), []).append(tokens / (clock() - began))
    return rates


def decode(session: Session, bits: int) -> None:
    session.rewind(CONTEXT)
    for _ in range(STRETCH):
        session.extend([1], session.engine.widths(bits))


def prefill(session: Session, bits: int, prompt: int) -> None:
    session.rewind(0)
    session.extend([1] * prompt, session.engine.widths(bits))


if __name__ == "__main__":
    typer.run(main)
