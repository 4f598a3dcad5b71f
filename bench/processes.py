"""What several processes gain: time, memory and traffic of nested GPTQ and of joint training on 1 and 2 of them.

    python bench/processes.py [--hidden N] [--layers N] [--rounds N] [--only gptq,qat] [--cores 0,1]
    python bench/processes.py --only gptq --layers 2 --rounds 2     the gain of GPTQ, in 4 minutes on a quiet machine

A random Llama-like model of hidden size N and intermediate size 3.5 N, linear layers only, groups of 64. Runs are
interleaved (1 process, 2 processes, 1, ...); each process has one thread and its own core, unless --cores is empty.
Counted are the layers of GPTQ, or the training steps after the first one. The processor time of the busiest process is
the time passed on a quiet machine with a core for each, apart from waiting; the time passed is reported too, and where
each process spends it. Memory is the peak of the largest process, over what it has after the imports. The codes of both
are compared. The last line is JSON.
"""

import functools
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import matquant
from forked import run
from matquant.format.read import open_checkpoint
from matquant.methods import gptq
from matquant.methods.parts import blocks, hessians
from origin import origin

VOCABULARY, LENGTH = 4096, 256
PARTS: dict[str, list[tuple[Any, str]]] = {  # where the time goes -> functions; calls of other parts are not in it
    "read the layer": [(blocks, "_fill")],
    "forward passes": [(gptq, "collect_hessians"), (blocks, "_advance")],
    "Hessians": [(hessians._Sums, "_add")],
    "factor": [(gptq, "inverse_factor")],
    "solve": [(gptq, "nested_gptq")],
    "losses for the log": [(gptq, "_squares")],
    "write": [(blocks, "_save"), (blocks, "_load")],
    "exchange and wait": [
        (torch.distributed, name)
        for name in ("all_reduce", "all_gather_single", "broadcast", "all_gather_object", "broadcast_object_list")
    ],
}
REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "reference"
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "samples": 32, "seq_len": LENGTH, "batch_size": 4},
    "qat": {
        "method": "qat", "text": [str(REFERENCE / "text" / "valid.txt")], "objective": "fp->8;4;2", "steps": 3,
        "seq_len": LENGTH, "batch_size": 8, "checkpoint_activations": True,
    },
}  # fmt: skip


def make_model(directory: Path, *, hidden: int, layers: int) -> None:
    """Write a random model, with the tokenizer of the embedded one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / "model" / name, directory / name)


def timed(part: str, function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    """Return ``function``, adding its seconds to ``spent`` without those of other timed functions that it calls."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        before, began = sum(spent.values()), time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] += time.perf_counter() - began - (sum(spent.values()) - before)

    return call


def work(model: Path, out: Path, options: Mapping[str, Any], cores: Sequence[int]) -> dict[str, Any]:
    """Quantise in this process, pinned to one of the cores, and return what it took."""
    if cores:
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"])]})
    before_mb = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    marks, sent, nest_block = list[tuple[float, float]](), [0.0], gptq.nest_block
    spent, counted = dict.fromkeys(PARTS, 0.0), dict[str, float]()
    for part, places in PARTS.items():
        for owner, name in places:
            setattr(owner, name, timed(part, getattr(owner, name), spent))

    def mark() -> None:
        if not marks:
            spent.update(dict.fromkeys(PARTS, 0.0))
        marks.append((time.process_time(), time.perf_counter()))

    def first(*arguments: Any, **more: Any) -> Any:
        if not marks:
            mark()
        return nest_block(*arguments, **more)

    def report(record: Mapping[str, Any]) -> None:
        if "step" in record:
            mark()
            counted.update(spent)
            sent.append(record.get("sent_mb", 0.0))

    gptq.nest_block = first
    matquant.quantize(model, out, scope="linears", group_size=64, report=report, overwrite=True, **options)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    cpu_s, wall_s = (last - begin for begin, last in zip(marks[0], marks[-1], strict=True))
    parts = {**counted, "other": wall_s - sum(counted.values())}
    return {"cpu_s": cpu_s, "wall_s": wall_s, "more_mb": peak_mb - before_mb, "sent_mb": max(sent), "parts": parts}


def measure(count: int, model: Path, out: Path, method: str, cores: Sequence[int]) -> dict[str, Any]:
    """Return the facts of the busiest or largest of ``count`` processes, and the parts of each one."""
    found = run(functools.partial(work, model, out, METHODS[method], cores), count)
    parts = [facts.pop("parts") for facts in found]
    return {**{key: max(facts[key] for facts in found) for key in found[0]}, "parts": parts}


def same_codes(one: Path, other: Path, *, bits: int) -> float:
    """Return the share of codes whose ``bits`` highest bits are equal in two checkpoints."""
    left, right = open_checkpoint(one), open_checkpoint(other)
    pairs = [(left.nested(path).codes, right.nested(path).codes) for path in left.shapes]
    drop = 8 - bits
    return float(sum(int((a >> drop == b >> drop).sum()) for a, b in pairs) / sum(a.size for a, _ in pairs))


def main(
    hidden: Annotated[int, typer.Option()] = 512,
    layers: Annotated[int, typer.Option()] = 3,
    rounds: Annotated[int, typer.Option()] = 3,
    only: Annotated[str, typer.Option()] = "gptq,qat",
    deterministic: Annotated[bool, typer.Option("--deterministic")] = False,
    cores: Annotated[str, typer.Option()] = "0,1",
) -> None:
    pinned = [int(core) for core in cores.split(",") if core]
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model", hidden=hidden, layers=layers)
        if deterministic:
            METHODS["gptq"]["deterministic"] = True
        for method in only.split(","):
            found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
            for _ in range(rounds):
                for count, runs in found.items():
                    runs.append(measure(count, folder / "model", folder / f"{method}{count}", method, pinned))
            outs = folder / f"{method}1", folder / f"{method}2"
            row: dict[str, Any] = {f"same_int{bits}": round(same_codes(*outs, bits=bits), 4) for bits in (8, 4, 2)}
            for key in ("cpu_s", "wall_s"):
                row[f"{key}_ratio"] = statistics.median(
                    one[key] / two[key] for one, two in zip(found[1], found[2], strict=True)
                )
            for count, runs in found.items():
                parts = [{key: round(value, 2) for key, value in each.items()} for each in runs[-1].pop("parts")]
                medians = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[-1]}
                row[str(count)] = {**medians, "parts": parts}
            results[method] = row
    table = Table(
        "method",
        "faster by, processor time",
        "faster by, time passed",
        "peak MB of 1, 2",
        "MB sent per block",
    )
    for method, row in results.items():
        table.add_row(
            method, f"{row['cpu_s_ratio']:.2f}", f"{row['wall_s_ratio']:.2f}",
            f"{row['1']['more_mb']:,.0f}, {row['2']['more_mb']:,.0f}", f"{row['2']['sent_mb']:,.2f}",
        )  # fmt: skip
    Console().print(table)
    for method, row in results.items():
        shares = Table(f"{method}: seconds of the last round", "1 process", "first of 2", "second of 2")
        columns = [*row["1"]["parts"], *row["2"]["parts"]]
        for part in columns[0]:
            shares.add_row(part, *(f"{column[part]:.2f}" for column in columns))
        Console().print(shares)
    load = round(os.getloadavg()[0], 1)
    print(json.dumps({**origin("torch"), "load": load, "hidden": hidden, "layers": layers, **results}))


if __name__ == "__main__":
    typer.run(main)
