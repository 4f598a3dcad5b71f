"""What joint training costs: a step over 8, 4, 2 against an ordinary fine-tuning step of the same model and batch.

    python bench/train.py [--device cuda] [--rounds N] [--threads N]

A random Llama: on a CPU 111 M parameters, 4 x 128 tokens, fp32; on a GPU 942 M parameters, 8 x 1024 tokens, bf16
autocast. Steps are interleaved (fine-tuning, joint, fine-tuning, ...) and the ratio is the median over rounds; peak
memory is that of separate processes. First the joint step's loss at 8 bits is checked against the float model's. The
last line is JSON.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.sharded import split_rows
from matquant.methods import qat
from matquant.methods.parts import forward, training
from matquant.methods.parts.fake import Grid
from matquant.methods.parts.split_state import Training
from matquant.options.objective import parse_objective
from matquant.options.qat import Schedule
from origin import arguments

VOCABULARY = 8192


@dataclass(frozen=True, kw_only=True)
class Size:
    """The model and the batch, and how many steps of a variant run before the clock is read."""

    hidden: int
    intermediate: int
    layers: int
    batch: int
    length: int
    steps: int


SIZES = {
    "cpu": Size(hidden=1024, intermediate=2816, layers=8, batch=4, length=128, steps=1),
    "cuda": Size(hidden=2048, intermediate=5632, layers=18, batch=8, length=1024, steps=5),
}
Step = Callable[[], torch.Tensor]  # makes one step; returns a loss, on the device
VARIANTS: dict[str, dict[str, Any]] = {
    "fine-tuning": {},
    "joint, plain": {"affine": "none"},
    "joint, refit": {"affine": "refit", "sliced": (2, 4)},
    "joint, learned": {"affine": "learned", "sliced": (2, 4), "learn_clip": True},
}


def make_model(device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = SIZES[device]
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device)


def fine_tuning(model: LlamaForCausalLM, windows: np.ndarray, schedule: Schedule) -> Step:
    """An ordinary step: all parameters, AdamW, clipped gradients."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(windows).to(model.device)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with forward.passes(model, schedule):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def joint(model: LlamaForCausalLM, windows: np.ndarray, schedule: Schedule, **grid: Any) -> Step:
    """Our step over 8, 4, 2; returns the loss at 8 bits."""
    views = select_linears(model, "ffn")
    our_grid = Grid(rule="prefix", **grid)
    models = Training(model=model, teacher=None, views=views, counts=split_rows(views, model))
    state = training.start(model, views, our_grid, schedule, trained=(8, 4, 2))
    optimizer = training.make_optimizer(state, schedule)
    forward.prepare(model, views, schedule)
    objective = parse_objective("8,4,2")

    def step() -> torch.Tensor:
        reading = qat.train_step(models, our_grid, state, optimizer, objective, windows, schedule)
        return reading.losses["8"][0]

    return step


def make_step(name: str, device: str) -> Step:
    size, model = SIZES[device], make_model(device)
    windows = np.random.default_rng(0).integers(0, VOCABULARY, size=(size.batch, size.length + 1))
    grid = dict(VARIANTS[name])
    schedule = Schedule(
        steps=10**6,
        batch_size=size.batch,
        seq_len=size.length,
        lr=1e-5,
        warmup=1,
        learn_clip=bool(grid.pop("learn_clip", False)),
        autocast=device == "cuda",
    )
    return joint(model, windows, schedule, **grid) if grid else fine_tuning(model, windows, schedule)


def measure(step: Step, device: str) -> float:
    """Seconds of a step, the device's work included."""
    count = SIZES[device].steps
    began = time.perf_counter()
    for _ in range(count):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / count


def peak_bytes(name: str, device: str, threads: int) -> int:
    """Peak memory of a process that makes two steps: resident, or of the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peak"
        command = [sys.executable, __file__, "--only", name, "--device", device, "--threads", str(threads)]
        subprocess.run([*command, "--peak-file", str(file)], check=True, capture_output=True)
        return int(file.read_text())


def write_peak(name: str, device: str, file: Path) -> None:
    """Make two steps and write the peak memory of this process."""
    step = make_step(name, device)
    step()
    step()
    if device == "cuda":
        file.write_text(str(torch.cuda.max_memory_allocated()))
        return
    # Not getrusage: its maximum starts at the size of the process that forked this one.
    status = Path("/proc/self/status").read_text()
    file.write_text(str(int(status.split("VmHWM:")[1].split()[0]) * 1024))


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    only: Annotated[str, typer.Option(help="Measure the peak memory of this variant.", hidden=True)] = "",
    peak_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a table and one JSON line."""
    torch.set_num_threads(threads)
    if only and peak_file is not None:
        write_peak(only, device, peak_file)
        return
    steps = {name: make_step(name, device) for name in VARIANTS}
    first = {name: float(step()) for name, step in steps.items()}
    for name, loss in first.items():
        assert abs(loss - first["fine-tuning"]) < 1e-2, f"{name} starts at {loss}, the float model at {first}"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            seconds[name].append(measure(step, device))
    size = SIZES[device]
    peaks = {name: peak_bytes(name, device, threads) for name in VARIANTS}
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
        "tok_s": {name: size.batch * size.length / statistics.median(times) for name, times in seconds.items()},
        "command": " ".join(["python", "bench/train.py", *arguments()]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads",
        "torch": torch.__version__,
    }
    print(json.dumps(record, sort_keys=True))


if __name__ == "__main__":
    typer.run(main)
