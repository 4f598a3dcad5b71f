"""Self-speculation: acceptance of each draft width, and speed with drafts over speed without.

    python bench/speculate.py CHECKPOINT [--bits 8 --modes off,auto,1,3 --temperatures 0,0.8 --tokens 192 --rounds 5
        --after 1 --keep]
    python bench/speculate.py CHECKPOINT --server 1,4 [...]
    python bench/speculate.py CHECKPOINT --modes off,lies --after 64 [...]

Correctness comes first: every mode must give the ids of "off". Modes take turns in every round, so that a change of
load meets all of them. Each round starts knowing nothing about costs and acceptance; when sampling, it has another
seed. Ratios are medians over rounds of speed over that of "off", after the first --after tokens; "cpu" counts the CPU
time of the thread that decodes, which other programs disturb less. The mode "lies" is "auto" with drafts that are wrong
always. Acceptance is the share of tokens for which one draft step at that width, reading the cache of the requested
width, chooses what that width chooses with the same random number.

With --server the server's batching generates, for 1 and for 4 requests at once: continuations of one text from which
the first 0, 1, 2 and 3 tokens are left out, or ("mixed") of the four texts. The modes take turns at every step, in one
thread. A sample is tokens/s from the moment when all requests have --after tokens, and "cpu" counts the CPU time of the
steps. What steps cost is measured in CPU time too, so that drafts are chosen as on a machine without other work;
threads must be 1.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from matquant import _native
from matquant.core.spec import Plan
from matquant.engine.engine import Engine
from matquant.engine.lookup import Lookup
from matquant.engine.sampling import Sampling, choose
from matquant.engine.speculation import AUTO, DRAFT_WIDTHS
from matquant.serve.admission import Limits
from matquant.serve.batching import Batching
from matquant.serve.cost import drafting
from matquant.serve.cost import measure as measure_costs
from matquant.serve.work import Generation
from origin import ROOT, append_record, origin
from serve_batch import MOST_ROWS, Receiver

RECORDS = ROOT / "bench" / "speculate.jsonl"
TOP_P = 0.95
LIES, WRONG = "lies", 1  # a mode, and the token that it drafts, which these texts do not have
PROMPTS = {
    "prose": "The history of the city begins with a small fishing village on the river. In the early years, the people",
    "story": "Once upon a time, in a house at the edge of the forest, there lived an old woman who",
    "code": 'def quicksort(items):\n    """Return the items sorted."""\n    if len(items) < 2:\n        return items\n',
    "json": '[\n  {"name": "Anna", "age": 31, "city": "Berlin"},\n  {"name": "Ben", "age": 27, "city": "Paris"},\n'
    '  {"name": "',
}


def speculation(mode: str) -> str | int:
    """Return the value of ``speculate`` for a mode."""
    return int(mode) if mode.isdecimal() else AUTO if mode == LIES else mode


@contextlib.contextmanager
def drafting_as(mode: str) -> Iterator[None]:
    """Let all drafts be wrong in the mode "lies"."""
    if mode != LIES:
        yield
        return
    with (  # a Mock would take longer than what it replaces
        mock.patch.object(Lookup, "find", lambda self: "lookup8"),  # noqa: PT008
        mock.patch.object(Lookup, "propose", lambda self, count: [WRONG] * count),
        mock.patch("matquant.engine.speculation.pick", lambda *given: WRONG),  # noqa: PT008
    ):
        yield


def measure(
    engine: Engine, prompt: str, mode: str, *, bits: int, tokens: int, after: int, sampling: dict[str, Any]
) -> dict[str, Any]:
    """Generate once; return the ids, tokens/s of the wall clock and of CPU time, and the counts."""
    engine._paces.clear()
    reply = engine.stream(prompt, bits=bits, max_tokens=tokens, speculate=speculation(mode), **sampling)
    pieces = iter(reply)
    while reply.tokens < after:
        next(pieces)
    first, wall, cpu = reply.tokens, time.perf_counter(), time.thread_time()
    for _ in pieces:
        pass
    wall, cpu, made = time.perf_counter() - wall, time.thread_time() - cpu, reply.tokens - first
    counts = {"tokens": reply.tokens, "steps": reply.steps, "drafted": reply.drafted, "accepted": reply.accepted}
    return {"ids": reply.ids, "wall": made / wall, "cpu": made / cpu, **counts}


def acceptance(engine: Engine, prompt: str, *, bits: int, tokens: int, sampling: Sampling) -> dict[str, float]:
    """Return the share of tokens on which a draft step at each width agrees."""
    ids, wide = engine.prompt_ids(prompt), engine.widths(bits)
    session = engine.session(len(ids) + tokens)
    tables = {f"int{width}": engine.widths(width) for width in DRAFT_WIDTHS if width < bits}
    generator, same = np.random.default_rng(sampling.seed), dict.fromkeys(tables, 0)
    token = choose(session.extend(ids, wide), sampling, generator)
    for _ in range(tokens):
        state, drafts = generator.bit_generator.state, {}
        for name, table in tables.items():
            logits = session.extend([token], table)
            session.rewind(len(session.ids) - 1)
            drafts[name] = choose(logits, sampling, generator)
            generator.bit_generator.state = state
        token = choose(session.extend([token], wide), sampling, generator)
        for name, draft in drafts.items():
            same[name] += draft == token
    return {name: count / tokens for name, count in same.items()}


def run(engine: Engine, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every prompt at every temperature; return a row for each."""
    rows, asked = [], {"bits": options.bits, "tokens": options.tokens, "after": options.after}
    for temperature, (name, prompt) in itertools.product(options.temperatures, PROMPTS.items()):
        found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in options.modes}
        for seed in range(options.rounds):
            sampling = {"temperature": temperature, "top_p": TOP_P, "seed": seed}
            for mode in options.modes:
                with drafting_as(mode):
                    sample = measure(engine, prompt, mode, **asked, sampling=sampling)
                found[mode].append(sample)
            assert all(samples[-1]["ids"] == found["off"][-1]["ids"] for samples in found.values()), "ids differ"
        chosen = Sampling(temperature=temperature, top_p=TOP_P)
        same = acceptance(engine, prompt, bits=options.bits, tokens=options.tokens, sampling=chosen)
        modes = {mode: summary(samples, found["off"]) for mode, samples in found.items()}
        rows.append({"prompt": name, "temperature": temperature, "acceptance": same, "modes": modes})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def summary(samples: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median speed, the median and least ratios to "off", and the sums of the counts."""
    ratios = {
        clock: [own[clock] / other[clock] for own, other in zip(samples, plain, strict=True)]
        for clock in ("wall", "cpu")
    }
    return {
        "tok_s": statistics.median(sample["wall"] for sample in samples),
        **{clock: statistics.median(values) for clock, values in ratios.items()},
        "least_cpu": min(ratios["cpu"]),
        **{name: sum(sample[name] for sample in samples) for name in ("tokens", "steps", "drafted", "accepted")},
    }


# -------------------------------------------------------------------------------------------------------------- server


class Turns(Batching):
    """The server's batching without its thread: whoever calls ``turn`` makes the next step."""

    def _loop(self) -> None: ...

    def turn(self) -> None:
        self._turn()


def serve_once(
    batchers: dict[str, Turns], prompts: list[list[int]], *, bits: int, tokens: int, after: int, sampling: Sampling
) -> dict[str, dict[str, Any]]:
    """Generate for all prompts at once, a step in each mode by turns; return for each the ids, tokens/s of the wall
    clock and of CPU time, and the counts."""
    before = {mode: batcher.stats() for mode, batcher in batchers.items()}
    receivers: dict[str, list[Receiver]] = {mode: [Receiver() for _ in prompts] for mode in batchers}
    for mode, batcher in batchers.items():
        for ids, receiver in zip(prompts, receivers[mode], strict=True):
            batcher.submit(Generation(ids=ids, plan=Plan(default=bits), max_tokens=tokens, sampling=sampling), receiver)
    made, wall, cpu = (dict.fromkeys(batchers, 0.0) for _ in range(3))
    while going := [mode for mode, own in receivers.items() if not all(receiver.done.is_set() for receiver in own)]:
        for mode in going:
            held = [len(receiver.tokens) for receiver in receivers[mode]]
            with drafting_as(mode):
                times = time.perf_counter(), time.thread_time()
                batchers[mode].turn()
                spent = time.perf_counter() - times[0], time.thread_time() - times[1]
            if all(
                count >= after or receiver.done.is_set() for count, receiver in zip(held, receivers[mode], strict=True)
            ):
                made[mode] += sum(len(receiver.tokens) for receiver in receivers[mode]) - sum(held)
                wall[mode], cpu[mode] = wall[mode] + spent[0], cpu[mode] + spent[1]
    names = {"tokens": "generation_tokens", "drafted": "draft_tokens", "accepted": "accepted_tokens", "steps": "steps"}
    samples = {}
    for mode, batcher in batchers.items():
        now, texts = batcher.stats(), [receiver.tokens for receiver in receivers[mode]]
        counts = {name: int(now.get(key, 0) - before[mode].get(key, 0)) for name, key in names.items()}
        samples[mode] = {"ids": texts, "wall": made[mode] / wall[mode], "cpu": made[mode] / cpu[mode], **counts}
    return samples


def run_server(engine: Engine, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every prompt at every temperature and number of requests; return a row for each."""
    texts = {name: engine.prompt_ids(prompt) for name, prompt in PROMPTS.items()}
    cases = [(count, name, [ids[k:] for k in range(count)]) for count in options.server for name, ids in texts.items()]
    cases += [(count, "mixed", list(texts.values())) for count in options.server if count == len(texts)]
    costs = measure_costs(engine, drafting((options.bits,), engine), most_rows=MOST_ROWS, clock=time.thread_time)
    batchers = {
        mode: Turns(engine, Limits(policy=False, speculate=speculation(mode)), costs=costs, clock=time.thread_time)
        for mode in options.modes
    }
    rows, asked = [], {"bits": options.bits, "tokens": options.tokens, "after": options.after}
    for temperature, (count, name, prompts) in itertools.product(options.temperatures, cases):
        found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in options.modes}
        for seed in range(options.rounds):
            sampling = Sampling(temperature=temperature, top_p=TOP_P, seed=seed)
            for mode, sample in serve_once(batchers, prompts, **asked, sampling=sampling).items():
                found[mode].append(sample)
            assert all(samples[-1]["ids"] == found["off"][-1]["ids"] for samples in found.values()), "ids differ"
        summaries = {mode: summary(samples, found["off"]) for mode, samples in found.items()}
        rows.append({"prompt": name, "temperature": temperature, "requests": count, "modes": summaries})
        print(json.dumps(rows[-1]), flush=True)
    for batcher in batchers.values():
        batcher.stop(0)
    return rows


def table(rows: list[dict[str, Any]], modes: list[str]) -> Table:
    made = Table(title="speed over off, by CPU time (by the wall clock)", title_justify="left")
    facts = list(rows[0].get("acceptance", {"requests": 0}))
    for name in ("text", "temperature", *facts, *modes):
        made.add_column(name, justify="right")
    for row in rows:
        same = (
            [f"{share:.2f}" for share in row["acceptance"].values()] if "acceptance" in row else [str(row["requests"])]
        )
        ratios = [f"{row['modes'][mode]['cpu']:.2f} ({row['modes'][mode]['wall']:.2f})" for mode in modes]
        made.add_row(row["prompt"], str(row["temperature"]), *same, *ratios)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["off", "auto", "1", "3"])
    parser.add_argument("--temperatures", type=lambda text: [float(part) for part in text.split(",")], default=[0, 0.8])
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--after", type=int, default=1, help="tokens before the measurement begins")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--server", type=lambda text: [int(part) for part in text.split(",")], default=[])
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    engine = Engine(options.checkpoint, threads=options.threads)
    rows = run_server(engine, options) if options.server else run(engine, options)
    Console(width=140).print(table(rows, options.modes))
    about = {
        "checkpoint": options.checkpoint.name,
        "threads": engine.threads,
        "isa": _native.isa(),
        **{name: getattr(options, name) for name in ("bits", "tokens", "after", "rounds")},
    }
    line = json.dumps({**origin(), **about, "texts": rows})
    print(line)
    if options.keep:
        append_record(RECORDS, line)


if __name__ == "__main__":
    main()
