"""What quantising a large model takes: memory, traffic and time on 8 GPUs of 80 GB, from counted operations.

    python bench/scale.py

One training step and one GPTQ solve of a tiny model are run on the CPU and counted: bytes of tensors kept per weight,
bytes that elementwise operations read and write per weight, and operations per column. The tables scale these counts by
the shapes of Llama models, and divide by the speeds in SPEEDS, which are the maker's figures times a stated share. No
GPU is used: these are estimates of what bounds a run, not measurements of one. docs/scale.md holds the tables. The last
line is JSON.
"""

import gc
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from matquant.hf_torch.layers import select_linears
from matquant.methods import qat
from matquant.methods.gptq import nested_gptq
from matquant.methods.parts import forward, training
from matquant.methods.parts.ends import HEAD_WEIGHTS
from matquant.methods.parts.fake import Grid
from matquant.options.gptq import default_lambda
from matquant.options.objective import parse_objective
from matquant.options.qat import Schedule
from origin import origin

GPUS, GPU_GB = 8, 80
SPEEDS = {  # H100 SXM, NVIDIA's data sheet; the share that is reached is our assumption
    "bf16_flop_s": 989e12 * 0.4,
    "fp32_flop_s": 67e12 * 0.6,
    "memory_byte_s": 3.35e12 * 0.7,
    "link_byte_s": 450e9 * 0.7,  # NVLink, one direction
    "launch_s": 5e-6,  # between two small kernels
}
WIDTHS = (8, 6, 4, 3, 2)
TRAINED: dict[str, tuple[str, dict[str, Any], str]] = {  # recipe -> objective, options, affine
    "qat, one master (8,4,2)": ("fp->8;4;2", {"masters": "one"}, "learned"),
    "best: distillation, a master per width": ("fp->8;4;3;2", {"masters": "each", "hidden": 1.0}, "learned"),
    "paper (8,4,2)": ("8,4,2", {"masters": "one"}, "refit"),
}


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
    def weights(self) -> int:
        return self.layers * self.layer

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
        name = str(function)
        if not any(word in name for word in ("view", "detach", "mm", "expand", "permute", "slice", "select", "unbind")):
            self.operations += 1
            for value in (*torch.utils._pytree.tree_leaves(args), *torch.utils._pytree.tree_leaves(result)):
                if isinstance(value, torch.Tensor):
                    self.bytes += value.numel() * value.element_size()
        return result


def count_training(objective: str, options: dict[str, Any], affine: str) -> dict[str, float]:
    """Return the bytes per quantised weight that a training step keeps, and that it reads and writes elementwise."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=896, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=64, max_position_embeddings=16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    views = select_linears(model, "linears")
    weights = sum(rows * columns for rows, columns in (view.shape for view in views.values()))
    widths = parse_objective(objective)
    schedule = Schedule(steps=2, batch_size=1, seq_len=8, lr=1e-4, warmup=1, learn_clip=affine == "learned", **options)
    grid = Grid(rule="prefix", affine=affine, sliced=(2, 3, 4), group_size=64)
    state = training.start(model, views, grid, schedule, trained=[width.bits for width in widths])
    optimizer = training.make_optimizer(state, schedule)
    teacher = LlamaForCausalLM(config).eval() if any(0 in width.teachers for width in widths) else None
    forward.prepare(model, views, schedule)
    windows = np.zeros((2, 9), dtype=np.int64)
    step = (model, views, grid, state, optimizer, widths, windows, schedule, teacher)
    qat.train_step(*step)
    with Counting() as counting:
        qat.train_step(*step)
    gc.collect()
    kept = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in _tensors(state, optimizer, model, teacher)}
    return {"kept": sum(kept.values()) / weights, "elementwise": counting.bytes / weights}


def _tensors(state: Any, optimizer: Any, *models: Any) -> list[torch.Tensor]:
    """Return every tensor that lives through a step: weights, masters, moments and gradients."""
    found = [tensor for _, tensor in state.named()]
    found += [parameter for model in models if model is not None for parameter in model.parameters()]
    found += [tensor.grad for tensor in found if tensor.grad is not None]
    return found + [value for moments in optimizer.state.values() for value in moments.values()]


def count_gptq() -> dict[str, float]:
    """Return the operations per column of a solve at five widths, and the bytes they read and write per weight."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(256, 256), torch.randn(512, 256)
    lambdas = {bits: default_lambda(bits) for bits in WIDTHS}
    with Counting() as counting:
        nested_gptq(weight, inputs.T @ inputs, Grid(rule="prefix", sliced=(2, 3, 4), group_size=64), lambdas)
    return {"operations": counting.operations / 256, "bytes": counting.bytes / weight.numel()}


def training_row(shape: Shape, counts: dict[str, float], terms: int, teacher: bool, *, tokens: int) -> dict[str, float]:
    """Return memory per GPU, traffic and seconds of a step. terms: losses, each a forward and a backward pass."""
    weights, everything = shape.weights, shape.weights + shape.ends
    moved = everything * (terms * (2 + 2 + 4) + 2 * teacher) * (GPUS - 1) / GPUS
    # forward 2, backward 4, recomputed activations 2 FLOP per weight and token
    flop = everything * tokens * (8 * terms + 2 * teacher)
    logits = tokens / GPUS * shape.vocabulary * 4 * 6
    during = 4 + 1  # of a step: the gradient in the model, and the code
    memory = (
        (weights * (counts["kept"] + during) + shape.ends * 4 * (1 + teacher)) / GPUS + 3 * shape.layer * 2 + logits
    )
    times = {
        "compute": flop / GPUS / SPEEDS["bf16_flop_s"],
        "elementwise": weights / GPUS * counts["elementwise"] / SPEEDS["memory_byte_s"],
        "traffic": moved / SPEEDS["link_byte_s"],
    }
    return {"gpu_gb": memory / 1e9, "traffic_gb": moved / 1e9, "step_s": sum(times.values()), **times}


def gptq_row(shape: Shape, counts: dict[str, float], *, tokens: int) -> dict[str, float]:
    """Return memory per GPU, traffic per layer and minutes of nested GPTQ without tuning."""
    widest = max(columns for _, columns in shape.linears)
    leaders = [shape.hidden, shape.hidden, shape.hidden, widest]  # inputs: q k v, o, gate up, down
    squares = sum(columns**2 for columns in leaders)
    moved = (2 * 4 * squares + 2 * shape.layer) * (GPUS - 1) / GPUS + shape.layer * (GPUS - 1) / GPUS
    columns = sum(columns for _, columns in shape.linears)
    times = {
        "forward": 2 * 2 * shape.layer * tokens / GPUS / SPEEDS["fp32_flop_s"],
        "hessians": 2 * squares * tokens / GPUS / SPEEDS["fp32_flop_s"],
        "factors": sum(4 / 3 * size**3 for size in leaders) / SPEEDS["fp32_flop_s"],
        "launches": columns * counts["operations"] * SPEEDS["launch_s"],
        "solve": shape.layer / GPUS * counts["bytes"] / SPEEDS["memory_byte_s"],
        "traffic": moved / SPEEDS["link_byte_s"],
    }
    stream = tokens / GPUS * shape.hidden * 4
    largest = max(rows * columns for rows, columns in shape.linears)
    # weights, all Hessians, three matrices of their size to factor one, and at five widths three copies of a GPU's rows
    memory = 4 * shape.layer + 4 * (squares + 3 * widest**2) + 5 * 3 * 4 * largest / GPUS + 2 * stream
    parts = -(-shape.vocabulary // (HEAD_WEIGHTS // shape.hidden))
    head = parts / GPUS * shape.hidden * counts["operations"] * SPEEDS["launch_s"]
    minutes = (shape.layers * sum(times.values()) + head) / 60
    return {"gpu_gb": memory / 1e9, "traffic_gb": moved / 1e9, "minutes": minutes, "head": head, **times}


def main() -> None:
    torch.set_num_threads(1)
    solving = count_gptq()
    console, record = Console(width=120), {"gptq": solving}
    table = Table("GPTQ, 128 x 2048 tokens", "GB per GPU", "GB sent per layer", "minutes", "largest part")
    for name, shape in SHAPES.items():
        row = gptq_row(shape, solving, tokens=128 * 2048)
        parts = {key: row[key] for key in ("forward", "hessians", "factors", "launches", "solve", "traffic")}
        most = max(parts, key=lambda key: parts[key])
        share = f"{most} {100 * parts[most] / sum(parts.values()):.0f} %"
        table.add_row(name, f"{row['gpu_gb']:,.0f}", f"{row['traffic_gb']:,.1f}", f"{row['minutes']:,.0f}", share)
        record[f"gptq {name}"] = row
    console.print(table)
    table = Table("training, 8 x 256 tokens a step", "model", "bytes per weight", "GB per GPU", "GB sent", "s per step")
    for recipe, (objective, options, affine) in TRAINED.items():
        counts, terms = count_training(objective, options, affine), len(parse_objective(objective))
        record[recipe] = counts
        for name, shape in SHAPES.items():
            row = training_row(shape, counts, terms, objective.startswith("fp"), tokens=8 * 256)
            table.add_row(
                recipe, name, f"{counts['kept'] + 5:.0f}", f"{row['gpu_gb']:,.0f}", f"{row['traffic_gb']:,.0f}",
                f"{row['step_s']:.1f}",
            )  # fmt: skip
            record[f"{recipe}, {name}"] = row
    console.print(table)
    rounded = {key: {part: float(f"{value:.3g}") for part, value in row.items()} for key, row in record.items()}
    print(json.dumps({**origin("torch"), "speeds": SPEEDS, **rounded}))


if __name__ == "__main__":
    main()
