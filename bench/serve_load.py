"""Load on ``matquant serve``: tokens per second and latencies beside llama-server, overload, and a long run.

    python bench/serve_load.py CHECKPOINT --text FILE [--llama-server FILE --gguf Q8_0=FILE --gguf Q4_0=FILE]
        [--requests 1,4,8,16,24 --prompt 128 --tokens 64 --rounds 3 --threads 1 --keep]
    python bench/serve_load.py CHECKPOINT --text FILE --overload 60
    python bench/serve_load.py CHECKPOINT --text FILE --soak 2000

Each request streams a completion of a prompt of --prompt tokens (token ids from --text, none twice) and has exactly
--tokens new tokens, greedy. Servers, widths and numbers of requests take turns in every round, so that a change of load
meets all of them; a server that has no request costs nothing. Figures are medians over the rounds; ratios are medians
of those of each round. tok_s: new tokens per second from the first request to the last token, prompts included.
tok_cpu_s: new tokens per CPU second of the server, which other work on the machine disturbs less. first: milliseconds
to the first text (TTFT). gap: between pieces of text (ITL).

--overload offers twice the requests that the server can answer, for so many seconds, some at int4 and the others at the
width that load leads to. Nothing may be lost or changed: each admitted answer has all its tokens, those at int4 have
the text that they have alone, counters add up, and int8 serves again 5 s later. --soak: resident memory over a run.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from load_client import Answer, BrokenOffError, ask, body, cpu_s, read, resident_bytes, together
from matquant.core.planes import isa
from matquant.engine.engine import Engine
from origin import ROOT, append_record, origin

RECORDS = ROOT / "bench" / "serve_load.jsonl"
START_S = 300.0
BACK_S = 5.0  # after an overload, int8 serves again
TRIES = 4  # of a measurement whose stream is broken off
WAITING = 8  # requests that may wait, in an overload


@dataclass(frozen=True)
class Target:
    """A server and how to ask it. label: such as "matquant int8"."""

    label: str
    port: int
    process: int
    fields: dict[str, Any]


@contextlib.contextmanager
def matquant(options: argparse.Namespace, *more: str) -> Iterator[tuple[int, int]]:
    """Start ``matquant serve``; return its port and process."""
    command = [sys.executable, "-m", "matquant", "serve", str(options.checkpoint), "--name", "model", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--threads", str(options.threads), "--no-check-hashes", *more], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        found = None
        for line in process.stderr:
            if found := re.search(r":(\d+)/v1", line):
                break
        assert found is not None, "matquant serve did not start"
        yield int(found[1]), process.pid
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@contextlib.contextmanager
def llama(options: argparse.Namespace, gguf: str, port: int, sequences: int) -> Iterator[tuple[int, int]]:
    """Start llama-server with continuous batching, a place for each request, and weights that cannot be paged out."""
    context = sequences * (options.prompt + options.tokens + 16)
    command = [options.llama_server, "-m", gguf, "--port", port, "-t", options.threads, "-tb", options.threads]
    command += ["-c", context, "-np", sequences, "--cache-ram", 0, "--no-mmap", "--no-webui", "--log-disable"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.perf_counter() + START_S
        while read(port, "/health")[0] != 200:
            assert process.poll() is None, f"{options.llama_server} did not start"
            assert time.perf_counter() < end, f"{options.llama_server} is not ready after {START_S:.0f} s"
            time.sleep(0.2)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


class Prompts:
    """Pieces of a text as token ids, each once."""

    def __init__(self, options: argparse.Namespace) -> None:
        engine = Engine(options.checkpoint, threads=1, check_hashes=False)
        text = options.text.read_text(encoding="utf-8")[: 400 * options.prompt * 8]
        self._ids = engine.vocabulary.plain(text)
        self._length, self._random = options.prompt, random.Random(time.time_ns())

    def take(self, count: int) -> list[list[int]]:
        """Return ``count`` prompts that begin at random places."""
        starts = [self._random.randrange(len(self._ids) - self._length) for _ in range(count)]
        return [self._ids[start : start + self._length] for start in starts]


# ------------------------------------------------------------------------------------------------------------ the table


def measure(target: Target, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """Send all prompts at once; return speed and latencies."""
    before = cpu_s(target.process)
    answers = asyncio.run(together(target.port, [body(ids, tokens, **target.fields) for ids in prompts]))
    spent_s = cpu_s(target.process) - before
    check(answers, tokens, target.label)
    took_s = max(answer.times_s[-1] for answer in answers) - min(answer.sent_s for answer in answers)
    return {
        "tok_s": len(answers) * tokens / took_s,
        "tok_cpu_s": len(answers) * tokens / spent_s,
        "first_ms": [1e3 * answer.first_s for answer in answers],
        "gap_ms": [1e3 * gap for answer in answers for gap in answer.gaps_s],
    }


def measure_text(target: Target, prompts: Prompts, drawn: list[list[int]], tokens: int) -> dict[str, Any]:
    """``measure``, with other prompts if a stream is broken off: llama-server does so if bytes are not text, as a model
    of random weights writes them now and then."""
    for _ in range(TRIES - 1):
        try:
            return measure(target, drawn, tokens)
        except BrokenOffError as broken:
            print(f"{target.label}: {broken}; once more with other prompts", file=sys.stderr, flush=True)
            drawn = prompts.take(len(drawn))
    return measure(target, drawn, tokens)


def check(answers: Sequence[Answer], tokens: int, label: str) -> None:
    """Every answer came, whole."""
    for answer in answers:
        assert answer.status == 200, f"{label}: status {answer.status}"
        assert answer.done, f"{label}: a stream ended early"
        assert (answer.tokens, answer.finish) == (tokens, "length"), f"{label}: {answer.tokens} {answer.finish}"


def load(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every server, width and number of requests, interleaved."""
    most, prompts, targets = max(options.requests), Prompts(options), []
    with contextlib.ExitStack() as servers:
        port, process = servers.enter_context(matquant(options, "--max-num-seqs", str(most)))
        for bits in options.widths:
            targets.append(Target(f"matquant int{bits}", port, process, {"model": f"model:int{bits}"}))
        for number, (name, file) in enumerate(options.gguf):
            port, process = servers.enter_context(llama(options, file, options.port + number, most))
            targets.append(Target(f"llama-server {name}", port, process, {}))
        for target in targets:  # the first request pays for what is made once
            measure_text(target, prompts, prompts.take(1), options.tokens)
        samples: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for _ in range(options.rounds):
            for requests in options.requests:
                drawn = prompts.take(requests)
                for target in targets:
                    found = measure_text(target, prompts, drawn, options.tokens)
                    samples.setdefault((target.label, requests), []).append(found)
                    print(
                        f"{requests} requests, {target.label}: {found['tok_s']:.1f} tokens/s",
                        file=sys.stderr,
                        flush=True,
                    )
                targets = [*targets[1:], targets[0]]
    labels = [target.label for target in targets]
    return {
        "cells": {label: {n: cell(samples, label, n, labels) for n in options.requests} for label in sorted(labels)}
    }


def cell(samples: Any, label: str, requests: int, labels: Sequence[str]) -> dict[str, Any]:
    """Return the medians of a cell, and its ratios to the other servers in the same rounds."""
    rounds = samples[label, requests]
    found = {key: statistics.median(one[key] for one in rounds) for key in ("tok_s", "tok_cpu_s")}
    for key in ("first_ms", "gap_ms"):
        pooled = sorted(value for one in rounds for value in one[key])
        found[key] = {share: pooled[int(share / 100 * (len(pooled) - 1))] for share in (50, 95)}
    for key in ("tok_s", "tok_cpu_s"):
        found[f"{key}_over"] = {
            other: statistics.median(a[key] / b[key] for a, b in zip(rounds, samples[other, requests], strict=True))
            for other in labels
            if other.split()[0] != label.split()[0]
        }
    return found


def table(record: dict[str, Any]) -> Table:
    made = Table(title="tokens/s (per CPU second); first text p50/p95; gap p50/p95, ms", title_justify="left")
    for name in ("server", "requests", "tokens/s", "first", "gap"):
        made.add_column(name, justify="left" if name == "server" else "right")
    for label, row in record["cells"].items():
        for requests, one in row.items():
            latencies = [f"{one[key][50]:.0f} / {one[key][95]:.0f}" for key in ("first_ms", "gap_ms")]
            made.add_row(label, str(requests), f"{one['tok_s']:.1f} ({one['tok_cpu_s']:.1f})", *latencies)
    return made


# ------------------------------------------------------------------------------------------------- overload, long run


def counters(port: int) -> dict[str, float]:
    """The counters that an overload changes."""
    text = read(port, "/metrics")[1]
    names = {
        "rejected": "vllm:admission_rejections_total", "down": 'matquant:width_changes_total.*direction="down"',
        "up": 'matquant:width_changes_total.*direction="up"', "answers": "vllm:request_success_total",
        "tokens": "vllm:generation_tokens_total",
    }  # fmt: skip
    return {
        key: sum(float(value) for value in re.findall(rf"^{name}.* ([\d.e+]+)$", text, flags=re.MULTILINE))
        for key, name in names.items()
    }


async def offer(port: int, bodies: Sequence[dict[str, Any]], rate: float) -> list[Answer]:
    """Send requests at a rate, whatever happens to those before."""
    asked = []
    for fields in bodies:
        asked.append(asyncio.ensure_future(ask(port, fields)))
        await asyncio.sleep(1 / rate)
    return await asyncio.gather(*asked)


def overload(options: argparse.Namespace) -> dict[str, Any]:
    """Offer twice what the server can do; raise AssertionError if an answer is lost or changed."""
    prompts, tokens, places = Prompts(options), options.tokens, str(max(options.requests))
    limits = ("--max-num-seqs", places, "--max-queued", str(WAITING), "--latency-ms", str(options.latency_ms))
    with matquant(options, *limits) as (port, _):
        probe = Target("matquant int8", port, 0, {"model": "model:int8"})
        for _ in range(2):  # the first requests pay for what is made once
            began = time.perf_counter()
            answers = asyncio.run(together(port, [body(i, tokens, **probe.fields) for i in prompts.take(int(places))]))
            check(answers, tokens, probe.label)
        rate = 2 * len(answers) / (time.perf_counter() - began)
        known = prompts.take(4)
        fixed = [body(ids, tokens, model="model:int4") for ids in known]
        alone = [asyncio.run(ask(port, fields)).text for fields in fixed]
        count = max(1, int(rate * options.overload))
        bodies = [fixed[n // 4 % 4] if n % 4 == 0 else body(prompts.take(1)[0], tokens) for n in range(count)]
        before = counters(port)
        answers = asyncio.run(offer(port, bodies, rate))
        after = counters(port)
        admitted = [answer for answer in answers if answer.status == 200]
        rejected = sum(answer.status == 429 for answer in answers)
        assert len(admitted) + rejected == count, "an answer was lost"
        check(admitted, tokens, "overload")
        for number, answer in enumerate(answers):
            assert answer.status != 200 or sum(part["tokens"] for part in answer.report["served"]) == tokens
            assert answer.status != 200 or number % 4 or answer.text == alone[number // 4 % 4], "a text was changed"
        change = {key: after[key] - before[key] for key in after}
        assert change["rejected"] == rejected, f"{change['rejected']} of {rejected} rejections were counted"
        assert change["tokens"] == tokens * len(admitted), "tokens do not add up"
        time.sleep(BACK_S)
        last = asyncio.run(ask(port, body(prompts.take(1)[0], tokens)))
        assert last.report["served"] == [{"bits": 8, "tokens": tokens}], f"{last.report} {BACK_S} s later"
        served: dict[str, int] = {}
        for answer in admitted:
            for part in answer.report["served"]:
                served[f"int{part['bits']}"] = served.get(f"int{part['bits']}", 0) + part["tokens"]
    return {
        "offered": count, "rate": rate, "admitted": len(admitted), "rejected": rejected, "lost": 0, "changed": 0,
        "width_changes": {key: change[key] for key in ("down", "up")}, "served_tokens": served,
    }  # fmt: skip


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Answer many requests, a few at a time; return resident memory at tenths of the way, in MiB."""
    prompts, at_once = Prompts(options), max(options.requests)
    found: list[float] = []
    with matquant(options, "--max-num-seqs", str(at_once), "--kv-bytes", options.kv_bytes) as (port, process):
        for start in range(0, options.soak, at_once):
            bodies = [body(ids, options.tokens) for ids in prompts.take(min(at_once, options.soak - start))]
            check(asyncio.run(together(port, bodies)), options.tokens, "soak")
            if len(found) <= start * 10 // options.soak:
                found.append(resident_bytes(process) / 2**20)
        found.append(resident_bytes(process) / 2**20)
    return {"requests": options.soak, "resident_mib": [round(value, 1) for value in found]}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def named(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    return name, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--gguf", type=named, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--widths", type=numbers, default=[8, 4])
    parser.add_argument("--requests", type=numbers, default=[1, 4, 8, 16, 24])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--port", type=int, default=18100, help="of the first llama-server")
    parser.add_argument("--kv-bytes", default="200MB")
    parser.add_argument("--overload", type=float, metavar="SECONDS")
    parser.add_argument("--latency-ms", type=float, default=100, help="target of the overloaded server")
    parser.add_argument("--soak", type=int, metavar="REQUESTS")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    kind = "overload" if options.overload else "soak" if options.soak else "load"
    record = {"overload": overload, "soak": soak, "load": load}[kind](options)
    if kind == "load":
        Console(width=120).print(table(record))
    line = json.dumps({**origin(), "kind": kind, "checkpoint": options.checkpoint.name, "isa": isa(), **record})
    print(line)
    if options.keep:
        append_record(RECORDS, line)


if __name__ == "__main__":
    main()
