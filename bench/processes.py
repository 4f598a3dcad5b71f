"""What several processes gain: time, memory and traffic of nested GPTQ and of joint training on 1 and 2 of them.

    python bench/processes.py [--hidden N] [--layers N] [--rounds N] [--only gptq,qat]

A random Llama-like model of hidden size N and intermediate size 3.5 N, linear layers only, groups of 64. Runs are
interleaved (1 process, 2 processes, 1, ...); each process has one thread and its own core. Counted are the blocks
or steps after the first one. The processor time of the busiest process is the time passed on a quiet machine with a
core for each, apart from waiting; the time passed is reported too. Memory is the peak of the largest process, over what
it has after the imports. The codes of both are compared. The last line is JSON.
"""

import contextlib
import functools
import json
import os
import resource
import shutil
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
from transformers import LlamaConfig, LlamaForCausalLM

import matquant
from forked import run
from matquant.format.read import open_checkpoint
from origin import origin

VOCABULARY, LENGTH = 4096, 256
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


def work(model: Path, out: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """Quantise in this process, pinned to one core, and return what it took."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, {int(os.environ["LOCAL_RANK"])})
    before_mb = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    marks, sent = [], [0.0]

    def report(record: Mapping[str, Any]) -> None:
        if "step" in record:
            marks.append((time.process_time(), time.perf_counter()))
            sent.append(record.get("sent_mb", 0.0))

    matquant.quantize(model, out, scope="linears", group_size=64, report=report, overwrite=True, **options)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {
        "cpu_s": marks[-1][0] - marks[0][0],
        "wall_s": marks[-1][1] - marks[0][1],
        "more_mb": peak_mb - before_mb,
        "sent_mb": max(sent),
    }


def measure(count: int, model: Path, out: Path, method: str) -> dict[str, float]:
    """Return the facts of the busiest or largest of ``count`` processes."""
    found = run(functools.partial(work, model, out, METHODS[method]), count)
    return {key: max(facts[key] for facts in found) for key in found[0]}


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
) -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model", hidden=hidden, layers=layers)
        if deterministic:
            METHODS["gptq"]["deterministic"] = True
        for method in only.split(","):
            found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
            for _ in range(rounds):
                for count, runs in found.items():
                    runs.append(measure(count, folder / "model", folder / f"{method}{count}", method))
            outs = folder / f"{method}1", folder / f"{method}2"
            row: dict[str, Any] = {f"same_int{bits}": round(same_codes(*outs, bits=bits), 4) for bits in (8, 4, 2)}
            for key in ("cpu_s", "wall_s"):
                row[f"{key}_ratio"] = statistics.median(
                    one[key] / two[key] for one, two in zip(found[1], found[2], strict=True)
                )
            for count, runs in found.items():
                row[str(count)] = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
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
    load = round(os.getloadavg()[0], 1)
    print(json.dumps({**origin("torch"), "load": load, "hidden": hidden, "layers": layers, **results}))


if __name__ == "__main__":
    typer.run(main)
