"""Measure how fast a checkpoint decodes at each width, compared with the time to read its weights.

A decoded token reads every weight once, so tokens/s times bytes per token cannot exceed the speed at which this machine
streams memory. That limit is measured in the same run: in every round the widths and the stream take turns, so that a
change of the machine's load affects all of them. Medians are over rounds in which the process had its cores to itself
(CPU time at least 97 % of wall time times threads), if there were at least three.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from matquant import _native
from matquant.engine.engine import Engine
from matquant.system.errors import InputError, check_positive

STREAM_BYTES = 256 * 2**20  # far above any cache
CACHED_BYTES = 64 * 10**6  # below this a model's weights may stay in the last-level cache
UNDISTURBED = 0.97
LINEARS = ("qkv", "o", "gate_up", "down", "head", "wait")  # "wait": idle time until the slowest thread is done


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One timed interval: value (tokens/s or bytes/s), and whether the process had its cores to itself."""

    value: float
    per_cpu_s: float  # the same amount per second of processor time, all threads together
    undisturbed: bool


def bench(
    engine: Engine, *, bits: Sequence[int], tokens: int = 32, rounds: int = 7, context: int = 16
) -> dict[str, Any]:
    """Decode ``tokens`` tokens at each width in each round, after ``context`` tokens of prompt.

    Returns {"stream_gb_s", "undisturbed", "threads", "isa", "widths": {width: {"tok_s", "mb_per_token", "gb_s",
    "fraction", "overhead", "parts_us"}}}: fraction is gb_s over stream_gb_s, overhead the share of a step's time
    outside linear layers, parts_us microseconds per token and part of the step.
    """
    check_positive(tokens=tokens, rounds=rounds, context=context)
    if context + tokens > engine.context:
        raise InputError(
            f"--context {context} and --tokens {tokens} exceed the context of {engine.context} tokens; use fewer"
        )
    session = engine.session(context + tokens)
    prompt = [token % engine.model.architecture.vocab for token in range(1, context + 1)]
    widths = {width: engine.widths(width) for width in bits}
    stream = _native.Stream(STREAM_BYTES)

    def decode(width: int) -> None:
        session.rewind(len(prompt))
        for _ in range(tokens):
            session.extend(prompt[:1], widths[width])

    session.extend(prompt, widths[bits[0]])
    samples: dict[int, list[Sample]] = {width: [] for width in bits}
    limits: list[Sample] = []
    for width in bits:
        decode(width)  # touch every plane once
    for _ in range(rounds):
        limits.append(timed(partial(stream.read, engine.threads), stream.bytes, engine.threads))
        for width in bits:
            samples[width].append(timed(partial(decode, width), tokens, engine.threads))
    limit = median(limits)
    record: dict[str, Any] = {
        "stream_gb_s": limit / 1e9,
        "undisturbed": sum(s.undisturbed for values in samples.values() for s in values) / (rounds * len(widths)),
        "threads": engine.threads,
        "isa": _native.isa(),
        "widths": {},
    }
    for width in bits:
        tok_s, read = median(samples[width]), engine.model.bytes_per_token(widths[width])
        session.workspace.profile = True
        decode(width)
        parts = session.workspace.seconds()
        session.workspace.profile = False
        record["widths"][str(width)] = {
            "tok_s": tok_s,
            "mb_per_token": read / 1e6,
            "gb_s": tok_s * read / 1e9,
            "fraction": tok_s * read / limit,
            "overhead": 1 - sum(parts[name] for name in LINEARS) / sum(parts.values()),
            "parts_us": {name: 1e6 * seconds / tokens for name, seconds in parts.items()},
        }
    return record


def table(record: dict[str, Any], title: str) -> Table:
    """Return the record as a table."""
    made = Table(title=title, title_justify="left")
    for name in ("width", "tokens/s", "MB per token", "GB/s", "of the limit", "other"):
        made.add_column(name, justify="right")
    for width, row in record["widths"].items():
        made.add_row(
            f"int{width}",
            f"{row['tok_s']:.1f}",
            f"{row['mb_per_token']:.1f}",
            f"{row['gb_s']:.1f}",
            f"{row['fraction']:.0%}",
            f"{row['overhead']:.1%}",
        )
    notes = [
        f"streaming limit {record['stream_gb_s']:.1f} GB/s, {record['threads']} threads, {record['isa']}, "
        f"{record['undisturbed']:.0%} of the samples undisturbed"
    ]
    if any(row["mb_per_token"] * 1e6 < CACHED_BYTES for row in record["widths"].values()):
        notes.append("the model fits the last-level cache, so it can exceed the limit, which is measured in memory")
    made.caption, made.caption_justify = "\n".join(notes), "left"
    return made


def timed(work: Callable[[], object], amount: float, threads: int) -> Sample:
    """Time one call of ``work``, as amount per second."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return sample_of(amount, wall, cpu, threads)


def sample_of(amount: float, wall_s: float, cpu_s: float, threads: int) -> Sample:
    """Return the sample of work that took ``wall_s`` seconds and ``cpu_s`` of processor time."""
    return Sample(value=amount / wall_s, per_cpu_s=amount / cpu_s, undisturbed=cpu_s >= UNDISTURBED * wall_s * threads)


def median(samples: Sequence[Sample]) -> float:
    """Return the median of the undisturbed samples, or of all if fewer than three are undisturbed."""
    clean = [sample.value for sample in samples if sample.undisturbed]
    return statistics.median(clean if len(clean) >= 3 else [sample.value for sample in samples])
