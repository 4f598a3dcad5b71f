"""Tokens per second of the batcher at 1, 4, 8 and 16 sequences and every width, and the gaps that a prompt makes.

    python bench/serve_batch.py CHECKPOINT [--widths 8,4,2 --rows 1,4,8,16 --tokens 32 --rounds 3 --threads 1]

Correctness comes first: 16 sequences of mixed widths must get the tokens that each gets alone. Then widths and numbers
of rows take turns in every round, so that a change of load meets all of them. A sample is the tokens per second from
the moment when all sequences have their first token. Figures are medians; ratios are medians of those of each round:
to int8 at the same number of rows, and to a single row at the same width. "choosing" is the share of the time that
choosing tokens takes (numpy), besides native code. Gaps are the milliseconds between the tokens of one sequence while a
prompt of --prompt tokens is read in chunks. A record goes to bench/serve_batch.jsonl with --keep.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from matquant import _native
from matquant.core.spec import Plan
from matquant.engine.engine import Engine
from matquant.engine.sampling import Sampling
from matquant.serve.batching import Batching, start
from matquant.serve.cost import Costs, measure
from matquant.serve.work import Event, Generation
from origin import ROOT, append_record, origin

RECORDS = ROOT / "bench" / "serve_batch.jsonl"
PROMPT_TOKENS = 16
MOST_ROWS = 128


class Receiver:
    """Tokens of a generation and when they came."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.done = threading.Event()

    def __call__(self, events: Sequence[Event]) -> None:
        now = time.perf_counter()
        for event in events:
            if event.token is not None:
                self.tokens.append(event.token.token)
                self.times_s.append(now)
        if events[-1].finish is not None:
            self.done.set()


def prompts(engine: Engine, count: int, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Random prompts, none of which begins like another."""
    drawn = np.random.default_rng(time.time_ns()).integers(3, engine.model.architecture.vocab, (count, tokens))
    return [[int(token) for token in row] for row in drawn]


def submit(batcher: Batching, ids: Sequence[int], bits: int, tokens: int, sampling: Sampling) -> Receiver:
    receiver = Receiver()
    batcher.submit(Generation(ids=ids, plan=Plan(default=bits), max_tokens=tokens, sampling=sampling), receiver)
    return receiver


def check(engine: Engine, costs: Costs, widths: Sequence[int]) -> None:
    """16 sequences of mixed widths, together and each alone, must be the same."""
    batcher = start(engine, costs=costs, policy=False)
    wanted = [(ids, widths[place % len(widths)], 4 + place % 5) for place, ids in enumerate(prompts(engine, 16))]
    together = [submit(batcher, *one, Sampling()) for one in wanted]
    for receiver in together:
        receiver.done.wait()
    for (ids, bits, tokens), receiver in zip(wanted, together, strict=True):
        session, table = engine.session(len(ids) + tokens), engine.widths(bits)
        logits, found = session.extend(ids, table), []
        for _ in range(tokens):
            found.append(int(logits.argmax()))
            logits = session.extend(found[-1:], table)
        assert receiver.tokens == found, f"int{bits} differs from the same sequence alone"
    batcher.stop(0)


def throughput(batcher: Batching, bits: int, rows: int, tokens: int, sampling: Sampling) -> tuple[float, float]:
    """Return tokens/s once all sequences decode, and the share of the time that choosing tokens takes."""
    before = batcher.stats()
    receivers = [submit(batcher, ids, bits, tokens, sampling) for ids in prompts(batcher.engine, rows)]
    for receiver in receivers:
        receiver.done.wait()
    after = batcher.stats()
    began = max(receiver.times_s[0] for receiver in receivers)
    times = [at for receiver in receivers for at in receiver.times_s if at > began]
    choosing, native = (after[name] - before.get(name, 0.0) for name in ("choosing_s", "native_s"))
    return len(times) / (max(times) - began), choosing / (choosing + native)


def gaps_ms(engine: Engine, costs: Costs, bits: int, *, chunk: int, prompt: int) -> tuple[float, float]:
    """Return the median and the largest gap of a decoding sequence while a prompt is read, in milliseconds."""
    batcher = start(engine, costs=costs, policy=False, chunk=chunk)
    first = submit(batcher, prompts(engine, 1)[0], bits, 10 + prompt // chunk, Sampling())
    while len(first.tokens) < 3:
        time.sleep(0.001)
    second = submit(batcher, prompts(engine, 1, prompt)[0], bits, 1, Sampling())
    second.done.wait()
    first.done.wait()
    batcher.stop(0)
    gaps = [1e3 * (b - a) for a, b in pairwise(first.times_s) if a < second.times_s[0]][2:]
    return statistics.median(gaps), max(gaps)


def table(record: dict[str, Any]) -> Table:
    made = Table(title="tokens/s (times int8 at the same rows, times a single row, choosing)", title_justify="left")
    made.add_column("width")
    for rows in record["rows"]:
        made.add_column(f"{rows} rows", justify="right")
    for bits, row in record["widths"].items():
        made.add_row(
            f"int{bits}",
            *(
                f"{c['tok_s']:.1f} ({c['over_first']:.2f}, {c['over_single']:.2f}, {c['choosing']:.0%})"
                for c in row.values()
            ),
        )
    return made


def run(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything; return the record."""
    widths, rows = options.widths, options.rows
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    began = time.perf_counter()
    costs = measure(engine, widths, most_rows=MOST_ROWS)
    measured_s = time.perf_counter() - began
    check(engine, costs, widths)
    batcher = start(engine, costs=costs, policy=False)
    samples: dict[tuple[int, int], list[tuple[float, float]]] = {(b, r): [] for b in widths for r in rows}
    for _ in range(options.rounds):
        for cell in samples:
            samples[cell].append(throughput(batcher, *cell, options.tokens, sampling))
    batcher.stop(0)

    def ratio(cell: tuple[int, int], base: tuple[int, int]) -> float:
        return statistics.median(a / b for (a, _), (b, _) in zip(samples[cell], samples[base], strict=True))

    return {
        "rows": rows,
        "widths": {
            bits: {
                count: {
                    "tok_s": statistics.median(speed for speed, _ in samples[bits, count]),
                    "over_first": ratio((bits, count), (widths[0], count)),
                    "over_single": ratio((bits, count), (bits, rows[0])),
                    "choosing": statistics.median(share for _, share in samples[bits, count]),
                }
                for count in rows
            }
            for bits in widths
        },
        "gaps_ms": {
            chunk: gaps_ms(engine, costs, widths[0], chunk=chunk, prompt=options.prompt) for chunk in (32, 128)
        },
        "costs_ms": {b: {r: 1e3 * s for r, s in points} for b, points in costs.seconds.items()},
        "costs_measured_s": measured_s,
        "threads": engine.threads,
        "isa": _native.isa(),
    }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--widths", type=numbers, default=[8, 4, 2])
    parser.add_argument("--rows", type=numbers, default=[1, 4, 8, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    record = run(Engine(options.checkpoint, threads=options.threads), options)
    Console(width=140).print(table(record))
    print(", ".join(f"chunk {c}: gaps {m:.0f} ms, at most {w:.0f}" for c, (m, w) in record["gaps_ms"].items()))
    line = json.dumps({**origin(), "checkpoint": options.checkpoint.name, **record})
    print(line)
    if options.keep:
        append_record(RECORDS, line)


if __name__ == "__main__":
    main()
