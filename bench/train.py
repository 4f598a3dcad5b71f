"""What joint training costs: a step over 8, 4, 2 against an ordinary fine-tuning step of the same model and batch.

    python bench/train.py [--rounds N] [--threads N]

A random Llama of 111 M parameters, 4 x 128 tokens, fp32. Steps are interleaved (fine-tuning, joint, fine-tuning, ...)
and the ratio is the median over rounds; peak memory is that of separate processes. First the joint step's loss at 8
bits is checked against the float model's. The last line is JSON.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from matquant.hf_torch.layers import select_linears
from matquant.methods import qat
from matquant.methods.parts import forward, training
from matquant.methods.parts.fake import Grid
from matquant.options.objective import parse_objective
from matquant.options.qat import Schedule
from origin import arguments

VOCABULARY, BATCH, LENGTH = 8192, 4, 128
VARIANTS: dict[str, dict[str, Any]] = {
    "fine-tuning": {},
    "joint, plain": {"affine": "none"},
    "joint, refit": {"affine": "refit", "sliced": (2, 4)},
    "joint, learned": {"affine": "learned", "sliced": (2, 4), "learn_clip": True},
}


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def fine_tuning(model: LlamaForCausalLM, windows: np.ndarray) -> Callable[[], float]:
    """An ordinary step: all parameters, AdamW, clipped gradients."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(windows)

    def step() -> float:
        optimizer.zero_grad()
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def joint(
    model: LlamaForCausalLM, windows: np.ndarray, *, learn_clip: bool = False, **grid: Any
) -> Callable[[], float]:
    """Our step over 8, 4, 2; returns the loss at 8 bits."""
    views = select_linears(model, "ffn")
    schedule = Schedule(steps=10**6, batch_size=BATCH, seq_len=LENGTH, lr=1e-5, seed=0, warmup=1, learn_clip=learn_clip)
    our_grid = Grid(rule="prefix", **grid)
    state = training.start(model, views, our_grid, schedule, trained=(8, 4, 2))
    optimizer = training.make_optimizer(state, schedule)
    forward.prepare(model, views, schedule)
    objective = parse_objective("8,4,2")

    def step() -> float:
        record = qat.train_step(model, views, our_grid, state, optimizer, objective, windows, schedule, None)
        return float(record["loss"]["8"])

    return step


def make_step(name: str) -> Callable[[], float]:
    windows = np.random.default_rng(0).integers(0, VOCABULARY, size=(BATCH, LENGTH + 1))
    return joint(make_model(), windows, **VARIANTS[name]) if VARIANTS[name] else fine_tuning(make_model(), windows)


def peak_bytes(name: str, threads: int) -> int:
    """Peak resident memory of a process that makes two steps."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peak"
        command = [sys.executable, __file__, "--only", name, "--threads", str(threads), "--peak-file", str(file)]
        subprocess.run(command, check=True, capture_output=True)
        return int(file.read_text())


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    only: Annotated[str, typer.Option(help="Measure the peak memory of this variant.", hidden=True)] = "",
    peak_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a table and one JSON line."""
    torch.set_num_threads(threads)
    if only and peak_file is not None:
        step = make_step(only)
        step()
        step()
        # Not getrusage: its maximum starts at the size of the process that forked this one.
        status = Path("/proc/self/status").read_text()
        peak_file.write_text(str(int(status.split("VmHWM:")[1].split()[0]) * 1024))
        return
    steps = {name: make_step(name) for name in VARIANTS}
    first = {name: step() for name, step in steps.items()}
    for name, loss in first.items():
        assert abs(loss - first["fine-tuning"]) < 1e-2, f"{name} starts at {loss}, the float model at {first}"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    peaks = {name: peak_bytes(name, threads) for name in VARIANTS}
    ratio = {
        name: statistics.median(a / b for a, b in zip(times, seconds["fine-tuning"], strict=True))
        for name, times in seconds.items()
    }
    memory = {name: peak / peaks["fine-tuning"] for name, peak in peaks.items()}
    table = Table("step", "seconds (median)", "time ratio", "peak GB", "memory ratio")
    for name in VARIANTS:
        row = (statistics.median(seconds[name]), ratio[name], peaks[name] / 1e9, memory[name])
        table.add_row(name, *(f"{value:.2f}" for value in row))
    Console().print(table)
    record = {
        "time_ratio": ratio,
        "memory_ratio": memory,
        "seconds": seconds,
        "command": " ".join(["python", "bench/train.py", *arguments()]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads",
        "torch": torch.__version__,
    }
    print(json.dumps(record, sort_keys=True))


if __name__ == "__main__":
    typer.run(main)
