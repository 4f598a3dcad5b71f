"""What each recipe takes for a large model: memory, traffic and time on 8 GPUs of 80 GB, from counted operations.

    python bench/scale.py

One training step, one GPTQ solve and one rounding of a tiny model are run on the CPU and counted: bytes of tensors kept
per weight, bytes that elementwise operations read and write per weight, and operations to launch. The tables scale
these counts by the shapes of Llama models, and divide by the speeds in SPEEDS, which are the maker's figures times a
stated share. Two constants of memory are measured (docs/scale.md). No GPU is used: these are estimates of what bounds a
run, not measurements of one. docs/scale.md holds the tables. The last line is JSON.
"""

import dataclasses
import functools
import gc
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from matquant.core.nest import CENTRE, COMPANDED
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.sharded import split_rows
from matquant.methods import qat
from matquant.methods.gptq import nested_gptq
from matquant.methods.parts import compensation, forward, training
from matquant.methods.parts.fake import Grid, nest
from matquant.methods.parts.share import SOLVING_BYTES, most_weights
from matquant.methods.parts.split_state import Training
from matquant.methods.quantize import AFFINE_WIDTHS
from matquant.options.objective import parse_objective
from matquant.options.qat import Schedule
from matquant.options.recipes import RECIPES
from origin import origin

GPUS, GPU_GB = 8, 80
SPEEDS = {  # H100 SXM, NVIDIA's data sheet; the share that is reached is our assumption
    "bf16_flop_s": 989e12 * 0.4,
    "fp32_flop_s": 67e12 * 0.6,
    "memory_byte_s": 3.35e12 * 0.7,
    "link_byte_s": 450e9 * 0.7,  # NVLink, one direction
    "launch_s": 5e-6,  # between two small kernels
    "disk_byte_s": 2e9,  # one process reads the model or writes the checkpoint
}
WIDTHS = (8, 6, 5, 4, 3, 2)
FACTOR_MATRICES = 5  # of the Hessian's size, at the peak of inverse_factor: measured (its docstring)
GPU = torch.device("cuda")
FREE = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "squeeze", "t", "transpose", "unbind",
    "unsafe_view", "_unsafe_view", "unsqueeze", "view",
}  # fmt: skip
SUMS = {"gpu_gb", "traffic_gb", "step_s", "minutes"}  # of a row; the rest are seconds
PRODUCTS = {"addmm", "baddbmm", "bmm", "mm"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a recipe or method trains, in how many steps of 8 sequences of 256 tokens."""

    objective: str
    options: Mapping[str, Any]
    steps: int
    rule: str = "prefix"
    group_size: int | None = 64
    scope: str = "linears"
    after: str | None = None  # what runs before


TRAINED = {
    "paper": Trained(
        objective="8,4,2", options={"masters": "one"}, steps=150, rule="round", group_size=None, scope="ffn"
    ),
    "qat": Trained(objective="fp->8;4;2", options={"masters": "one"}, steps=300),
    "best": Trained(objective="fp->8;5;4;3;2", options={"masters": "each", "hidden": 1.0}, steps=40, after="balanced"),
}
CALIBRATED = 128 * 512  # tokens of balanced, which is the first stage of best too


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama model."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int = 128256
    kv: int = 1024

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Return rows and columns of a decoder layer's linear layers."""
        attention = [(self.hidden, self.hidden), (self.kv, self.hidden), (self.kv, self.hidden)]
        return [*attention, (self.hidden, self.hidden), *[(self.inner, self.hidden)] * 2, (self.hidden, self.inner)]

    @property
    def layer(self) -> int:
        return sum(rows * columns for rows, columns in self.linears)

    @property
    def ffn(self) -> int:
        return 3 * self.hidden * self.inner

    @property
    def weights(self) -> int:
        return self.layers * self.layer

    @property
    def solved(self) -> list[tuple[int, int]]:
        """Return rows and columns of what GPTQ solves together: linear layers with the same input."""
        return [
            (self.hidden + 2 * self.kv, self.hidden), (self.hidden, self.hidden), (2 * self.inner, self.hidden),
            (self.hidden, self.inner),
        ]  # fmt: skip

    @property
    def ends(self) -> int:
        return 2 * self.vocabulary * self.hidden


SHAPES = {
    "8B": Shape(hidden=4096, inner=14336, layers=32),
    "70B": Shape(hidden=8192, inner=28672, layers=80),
    "405B": Shape(hidden=16384, inner=53248, layers=126),
}


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count operations, and the bytes that those without a matrix product read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in FREE | PRODUCTS:
            self.operations += 1
            for value in (*torch.utils._pytree.tree_leaves(args), *torch.utils._pytree.tree_leaves(result)):
                if isinstance(value, torch.Tensor):
                    self.bytes += value.numel() * value.element_size()
        return result


def count_training(trained: Trained) -> dict[str, float]:
    """Return what a training step keeps, and reads and writes elementwise, in bytes per trained weight, and how many
    operations it has per linear layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=896, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=64, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    views = select_linears(model, trained.scope)
    weights = sum(rows * columns for rows, columns in (view.shape for view in views.values()))
    rest = sum(parameter.numel() for parameter in model.parameters()) - weights
    widths = parse_objective(trained.objective)
    schedule = Schedule(steps=2, batch_size=1, seq_len=8, lr=1e-4, warmup=1, learn_clip=True, **trained.options)
    grid = Grid(rule=trained.rule, affine="learned", sliced=AFFINE_WIDTHS, group_size=trained.group_size)
    state = training.start(model, views, grid, schedule, trained=[width.bits for width in widths])
    optimizer = training.make_optimizer(state, schedule)
    teacher = LlamaForCausalLM(config).eval() if any(0 in width.teachers for width in widths) else None
    forward.prepare(model, views, schedule)
    windows = np.zeros((2, 9), dtype=np.int64)
    models = Training(model=model, teacher=teacher, views=views, counts=split_rows(views, model))
    step = functools.partial(qat.train_step, models, grid, state, optimizer, widths, windows, schedule)
    step()
    with Counting() as counting:
        step()
    gc.collect()
    kept = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in _tensors(state, optimizer, model, teacher)}
    return {
        "kept": (sum(kept.values()) - 4 * rest * (1 + (teacher is not None))) / weights,
        "elementwise": counting.bytes / weights,
        "operations": counting.operations / len(views),
    }


def _tensors(state: Any, optimizer: Any, *models: Any) -> list[torch.Tensor]:
    """Return every tensor that lives through a step: weights, masters, moments and gradients."""
    found = [tensor for _, tensor in state.named()]
    found += [parameter for model in models if model is not None for parameter in model.parameters()]
    found += [tensor.grad for tensor in found if tensor.grad is not None]
    return found + [value for moments in optimizer.state.values() for value in moments.values()]


def count_gptq() -> dict[str, float]:
    """Return the operations per column of balanced's solve, and the bytes they read and write per weight."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(256, 256), torch.randn(512, 256)
    options = RECIPES["balanced"].options
    lambdas, grid = dict(zip(WIDTHS, options["weights"], strict=True)), Grid(rule="prefix", sliced=AFFINE_WIDTHS)
    grid = dataclasses.replace(grid, group_size=64, kind=COMPANDED, zeros=CENTRE)
    with mock.patch.object(compensation, "_solve", _solve_as_gpus_do), Counting() as counting:
        nested_gptq(weight, inputs.T @ inputs, grid, lambdas, sweeps=options["sweeps"])
    return {"operations": counting.operations / 256, "bytes": counting.bytes / weight.numel()}


def _solve_as_gpus_do(
    reading: Any, values: torch.Tensor, matrix: torch.Tensor, codes: torch.Tensor, now: slice, *, descends: bool
) -> torch.Tensor:
    """Choose codes with operations of torch, where a CPU has native code."""
    part = values[:, :, now], matrix[now, now].contiguous(), codes[:, now]
    return compensation._solve_in_torch(reading, *part, now, descends=descends)


def count_rounding() -> float:
    """Return the bytes that rounding to nearest reads and writes per weight."""
    with Counting() as counting:
        nest(torch.randn(256, 256), Grid(rule="prefix", affine="refit", sliced=AFFINE_WIDTHS, group_size=64))
    return float(counting.bytes / 256**2)


def files_s(shape: Shape, stages: int = 1) -> float:
    """Return the seconds to read a model in bf16 and to write its checkpoint, 8.5 bits per weight, for each stage."""
    return stages * (shape.weights + shape.ends) * (2 + 8.5 / 8) / SPEEDS["disk_byte_s"]


def fast_row(shape: Shape, bytes_per_weight: float) -> dict[str, float]:
    """Return memory and minutes of rounding to nearest, in one process, the model in float32 in memory."""
    everything = shape.weights + shape.ends
    times = {"elementwise": everything * bytes_per_weight / SPEEDS["memory_byte_s"], "files": files_s(shape)}
    return {"gpu_gb": 4 * everything / 1e9, "traffic_gb": 0.0, "minutes": sum(times.values()) / 60, **times}


def training_row(shape: Shape, counts: dict[str, float], trained: Trained) -> dict[str, float]:
    """Return memory per GPU, traffic and seconds of a step, and minutes of all steps."""
    widths = parse_objective(trained.objective)
    terms, teacher = len(widths), any(0 in width.teachers for width in widths)
    tokens, weights, everything = 8 * 256, shape.weights, shape.weights + shape.ends
    learning = shape.layers * shape.ffn if trained.scope == "ffn" else weights
    # layers are gathered in bf16 for each pass, embedding and head in float32; gradients are float32
    passed = terms * (4 * weights + 8 * shape.ends + 4 * learning) + teacher * (2 * weights + 4 * shape.ends)
    moved = passed * (GPUS - 1) / GPUS
    # forward 2, backward 4, recomputed activations 2 FLOP per weight and token
    flop = everything * tokens * (8 * terms + 2 * teacher)
    logits = tokens / GPUS * shape.vocabulary * 4 * 6
    during = 4 + 1  # of a step: the gradient in the model, and the code
    memory = (learning * (counts["kept"] + during) + (everything - learning) * 4 * (1 + teacher)) / GPUS
    times = {
        "compute": flop / GPUS / SPEEDS["bf16_flop_s"],
        "elementwise": learning / GPUS * counts["elementwise"] / SPEEDS["memory_byte_s"],
        "launches": shape.layers * (3 if trained.scope == "ffn" else 7) * counts["operations"] * SPEEDS["launch_s"],
        "traffic": moved / SPEEDS["link_byte_s"],
    }
    step_s = sum(times.values())
    return {
        "gpu_gb": (memory + 3 * shape.layer * 2 + logits) / 1e9,
        "traffic_gb": moved / 1e9,
        "step_s": step_s,
        "minutes": (trained.steps * step_s + files_s(shape)) / 60,
        **times,
    }


def gptq_memory(shape: Shape, *, tokens: int) -> dict[str, float]:
    """Return the bytes of a process in each phase of the widest layers; the largest is the peak.

    Weights are in float32, and so are Hessians, which are summed in float64.
    """
    squares = sum(columns**2 for _, columns in shape.solved)
    widest = max(columns for _, columns in shape.solved) ** 2
    solving = [SOLVING_BYTES * min(most_weights(GPU), rows * columns / GPUS) for rows, columns in shape.solved]
    base = 4 * shape.layer + 2 * tokens / GPUS * shape.hidden * 4
    up = shape.inner * shape.hidden
    return {
        "calibration": base + 8 * squares + 4 * widest,
        "factor": base + 4 * widest * FACTOR_MATRICES,
        "gate and up": base + 4 * (widest + 3 * shape.hidden**2) + 8 * up + solving[2],
        "down": base + 4 * 3 * widest + 4 * up + solving[3],
    }


def gptq_row(shape: Shape, counts: dict[str, float], *, tokens: int) -> dict[str, float]:
    """Return memory per GPU, traffic per layer and minutes of nested GPTQ without tuning."""
    squares = sum(columns**2 for _, columns in shape.solved)
    share = (GPUS - 1) / GPUS
    moved = (2 * 8 * squares + 2 * shape.layer + shape.layer) * share
    columns = sum(size * math.ceil(rows * size / GPUS / most_weights(GPU)) for rows, size in shape.solved)
    times = {
        "forward": 2 * 2 * shape.layer * tokens / GPUS / SPEEDS["fp32_flop_s"],
        "hessians": 2 * squares * tokens / GPUS / SPEEDS["fp32_flop_s"],
        "factors": sum(4 / 3 * size**3 for _, size in shape.solved) / SPEEDS["fp32_flop_s"],
        "launches": columns * counts["operations"] * SPEEDS["launch_s"],
        "solve": shape.layer / GPUS * counts["bytes"] / SPEEDS["memory_byte_s"],
        "traffic": moved / SPEEDS["link_byte_s"],
    }
    parts = math.ceil(shape.vocabulary * shape.hidden / GPUS / most_weights(GPU, head=True))
    times = {name: shape.layers * seconds for name, seconds in times.items()}
    times["head"] = parts * shape.hidden * counts["operations"] * SPEEDS["launch_s"]
    times["files"] = files_s(shape)
    phases = gptq_memory(shape, tokens=tokens)
    return {
        "gpu_gb": max(phases.values()) / 1e9,
        "traffic_gb": moved / 1e9,
        "minutes": sum(times.values()) / 60,
        **times,
    }


def main() -> None:
    torch.set_num_threads(1)
    solving, rounding = count_gptq(), count_rounding()
    record: dict[str, dict[str, float]] = {"gptq": solving, "rounding": {"bytes": rounding}}
    table = Table(
        "recipe", "model", "bytes per weight", "GB per GPU", "GB sent", "s per step", "minutes", "largest part"
    )
    for name, shape in SHAPES.items():
        record[f"fast {name}"] = fast_row(shape, rounding)
        record[f"balanced {name}"] = gptq_row(shape, solving, tokens=CALIBRATED)
    for recipe, trained in TRAINED.items():
        record[recipe] = count_training(trained)
        for name, shape in SHAPES.items():
            record[f"{recipe} {name}"] = row = training_row(shape, record[recipe], trained)
            if trained.after:
                row["minutes"] += record[f"{trained.after} {name}"]["minutes"]
    for recipe in ("fast", "balanced", *TRAINED):
        for name in SHAPES:
            row = record[f"{recipe} {name}"]
            kept = (
                f"{record[recipe]['kept'] + 5:.0f}" if recipe in TRAINED else "4" if recipe == "fast" else "of a layer"
            )
            parts = {key: value for key, value in row.items() if key not in SUMS}
            most = max(parts, key=lambda key: parts[key])
            table.add_row(
                recipe, name, kept, f"{row['gpu_gb']:,.0f}", f"{row['traffic_gb']:,.1f}", f"{row.get('step_s', 0):.1f}",
                f"{row['minutes']:,.1f}", f"{most} {100 * parts[most] / sum(parts.values()):.0f} %",
            )  # fmt: skip
    Console(width=130).print(table)
    rounded = {key: {part: float(f"{value:.3g}") for part, value in row.items()} for key, row in record.items()}
    print(json.dumps({**origin("torch"), "speeds": SPEEDS, **rounded}))


if __name__ == "__main__":
    main()
