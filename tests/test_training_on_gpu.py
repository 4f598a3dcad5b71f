"""Training keeps a GPU busy: a step never waits for its device, and its cost is counted right. No GPU is needed.

A tensor on "meta" has no data, so reading it on the host, in whatever way, is an error: a step that runs there waits
for nothing.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

import conftest
from cases import each
from conftest import SMALL
from matquant.core.nest import CENTRE, COMPANDED, RULES, UNIFORM, nearest_codes, positions
from matquant.core.tensor import NestedTensor
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.loading import load_float
from matquant.hf_torch.sharded import split_rows
from matquant.methods import qat
from matquant.methods.parts import forward, fused, readings, throughput
from matquant.methods.parts.fake import Grid, Learned
from matquant.methods.parts.split_state import Training
from matquant.methods.parts.training import State, make_optimizer, start
from matquant.options.objective import parse_objective
from matquant.options.qat import Schedule
from matquant.system.errors import InputError

RUN: dict[str, Any] = {"steps": 6, "batch_size": 2, "seq_len": 16, "lr": 1e-3, "seed": 3}
EVERYTHING: dict[str, Any] = {"masters": "each", "hidden": 1.0, "mix": 1.0, "accumulate": 2}
META = torch.device("meta")


class Arrivals(TorchDispatchMode):
    """Collect the operations that bring data from another device, the batches aside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [item for item in (*args, result) if isinstance(item, torch.Tensor)]
        if len({tensor.device for tensor in tensors if tensor.ndim}) > 1:
            self.found.append(f"{func} {[(str(tensor.device), list(tensor.shape)) for tensor in tensors]}")
        return result


def move(learned: Learned) -> Learned:
    """The same tensors on "meta"."""

    def put(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else tensor.detach().to(META)

    affines = {bits: (put(reach), put(centre)) for bits, (reach, centre) in learned.affines.items()}
    return dataclasses.replace(learned, clip=put(learned.clip), affines=affines)


def step_on_meta(directory: Path, grid: Grid, schedule: Schedule) -> tuple[readings.Reading, Arrivals]:
    """Run one step of joint training with distillation on "meta"."""
    model = load_float(directory, dtype=torch.float32)
    views, objective = select_linears(model, "ffn"), parse_objective("8,4,2,fp->8;4;2")
    state = start(model, views, grid, schedule, trained=[8, 4, 2])
    model = model.to(META)
    state.masters = {path: tensor.detach().to(META) for path, tensor in state.masters.items()}
    state.coarse = {
        path: {bits: tensor.detach().to(META) for bits, tensor in masters.items()}
        for path, masters in state.coarse.items()
    }
    state.learned = {path: move(learned) for path, learned in state.learned.items()}
    optimizer = make_optimizer(state, schedule)
    forward.prepare(model, views, schedule)
    windows = np.random.default_rng(0).integers(0, 256, size=(8, schedule.seq_len + 1))
    with Arrivals() as arrivals, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None
        )  # it runs on "meta" too
        teacher = load_float(directory, dtype=torch.float32).to(META)
        arrivals.found.clear()
        training = Training(model=model, teacher=teacher, views=views, counts=split_rows(views, model))
        found = qat.train_step(training, grid, state, optimizer, objective, windows, schedule)
    return found, arrivals


LEARNED = (Grid(rule="prefix", affine="learned", sliced=(2, 4)), {**EVERYTHING, "learn_clip": True})
COMPANDED_GRID = Grid(rule="prefix", affine="learned", kind=COMPANDED, zeros=CENTRE, sliced=(2, 4), group_size=16)
STEPS: dict[str, tuple[str, Grid, dict[str, Any]]] = {"llama, distilled": ("llama", COMPANDED_GRID, EVERYTHING)}
MORE: dict[str, tuple[str, Grid, dict[str, Any]]] = {
    "llama, learned": ("llama", *LEARNED),
    "llama, refitted": ("llama", dataclasses.replace(COMPANDED_GRID, affine="refit"), {}),
    "llama, round": ("llama", Grid(rule="round", affine="none"), {"checkpoint_activations": True}),
    "llama, extra": ("llama", Grid(rule="extra", sliced=(2, 4), symmetric=False), {}),
    "gemma2, companded": ("gemma2", COMPANDED_GRID, EVERYTHING),
    "opt, learned": ("opt", *LEARNED),
}


@pytest.mark.parametrize("name", [*STEPS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_step_never_waits_for_its_device(name: str, family_model: Callable[[str], Path]) -> None:
    family, grid, changes = {**STEPS, **MORE}[name]
    schedule = Schedule(**{**RUN, "warmup": 1, **changes})
    for bits in (2, 4, 8) if grid.kind == COMPANDED else ():  # tables are copied once in a process
        nearest_codes(
            positions(torch.zeros(1, dtype=torch.uint8, device=META), bits, grid=COMPANDED), 8, grid=COMPANDED
        )
    found, arrivals = step_on_meta(family_model(family), grid, schedule)
    assert found.gradient_norm.device == META
    batches = [line for line in arrivals.found if "[2, 17]" in line]
    assert len(batches) == schedule.accumulate
    assert arrivals.found == batches


def test_a_step_that_waits_is_found(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(**RUN, warmup=1)
    monkeypatch.setattr(qat, "stop_unless_finite", lambda optimizer, numbers: float(numbers[0]))
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        step_on_meta(llama, Grid(rule="prefix"), schedule)
    monkeypatch.setattr(qat, "stop_unless_finite", lambda optimizer, numbers: torch.zeros(3).to(META))
    _, arrivals = step_on_meta(llama, Grid(rule="prefix"), schedule)
    assert sum("[3]" in line for line in arrivals.found) == 1


def test_reading_many_steps_at_once_changes_nothing(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records: dict[int, list[dict[str, Any]]] = {1: [], 4: []}
    for every, found in records.items():
        monkeypatch.setattr(qat, "steps_at_once", lambda device, every=every: every)
        conftest.quantize(llama, tmp_path / str(every), text=[text_file], **RUN, report=found.append)
        for record in found:
            assert record.pop("tok_s") > 0
    assert records[1] == records[4]
    assert len(records[1]) == RUN["steps"]
    one, four = ((tmp_path / str(every) / "model.safetensors").read_bytes() for every in records)
    assert one == four


def assert_every_code_is_read(read: Callable[[NestedTensor, int], torch.Tensor], *, rules: Sequence[str]) -> None:
    """``read`` is NestedTensor.read at every width, bit for bit, and not that of the neighbouring width."""
    torch.manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    for rule, grid in [*((rule, UNIFORM) for rule in rules), ("prefix", COMPANDED)]:
        for groups in (1, 4):
            scale, zero = torch.rand(3, groups) + 0.1, 128 + torch.rand(3, groups)
            own = {2: (torch.rand(3, groups), torch.rand(3, groups))}
            tensor = NestedTensor(codes=codes, scale=scale, zero=zero, rule=rule, slices=own, grid=grid)
            for bits in range(1, 9):
                assert torch.equal(read(tensor, bits), tensor.read(bits))
                assert not torch.equal(read(tensor, bits), tensor.read(bits % 8 + 1))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, inside inductor
@pytest.mark.parametrize("made", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_compiled_read_is_the_definition(made: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for a CPU: the same graph, for another processor."""
    monkeypatch.setattr(fused, "helps", lambda codes: True)
    if not made:
        monkeypatch.setattr(fused, "compiled", lambda: fused.chain)
    assert_every_code_is_read(fused.read, rules=RULES)


def test_nothing_is_compiled_on_a_cpu() -> None:
    assert not fused.helps(torch.zeros(1024, 2048, dtype=torch.uint8))


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_until_it_is_read(
    broken: str, every: int, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qat, "steps_at_once", lambda device: every)
    seen: list[torch.Tensor] = []
    step, write, finish = qat.train_step, qat.write_weights, qat._finish_gradients

    def train_step(training: Training, grid: Grid, state: State, *rest: Any) -> Any:
        seen.append(next(iter(state.masters.values())).detach().clone())
        return step(training, grid, state, *rest)

    def write_weights(model: Any, views: Any, weights: Any) -> None:
        late = broken == "loss" and len(seen) > 2
        write(model, views, ((path, w * torch.inf if late and "1.mlp.down" in path else w) for path, w in weights))

    def finish_gradients(training: Training, state: State, *rest: Any) -> None:
        finish(training, state, *rest)
        if broken == "gradient" and len(seen) > 2:
            next(iter(state.masters.values())).grad[0, 0] = torch.nan

    monkeypatch.setattr(qat, "train_step", train_step)
    monkeypatch.setattr(qat, "write_weights", write_weights)
    monkeypatch.setattr(qat, "_finish_gradients", finish_gradients)
    message = {
        "loss": r"^the loss at 8 bits is not finite at step 3, first in model\.layers\.1; use a smaller --lr and",
        "gradient": r"^the gradient is not finite at step 3; use a smaller --lr and --overwrite$",
    }[broken]
    with pytest.raises(InputError, match=message):
        conftest.quantize(llama, tmp_path / "out", text=[text_file], **RUN)
    assert len(seen) == (3 if every == 1 else 6)
    assert not torch.equal(seen[1], seen[2])
    assert all(torch.equal(masters, seen[2]) for masters in seen[2:])


def test_activations_that_do_not_fit_are_recomputed(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = conftest.quantize(llama, tmp_path / "plain", text=[text_file], **RUN)
    monkeypatch.setattr(qat, "why_recompute", lambda needed_bytes, device: f"{needed_bytes > 1e5}, {device}")
    enabled: list[bool] = []
    prepare = qat.prepare

    def watch(model: Any, views: Any, schedule: Schedule) -> None:
        enabled.append(schedule.checkpoint_activations)
        prepare(model, views, schedule)

    monkeypatch.setattr(qat, "prepare", watch)
    records: list[dict[str, Any]] = []
    again = conftest.quantize(llama, tmp_path / "again", text=[text_file], **RUN, report=records.append)
    assert records[0] == {"notice": "True, cpu"}
    assert enabled == [True]
    assert (plain / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_memory_is_compared_with_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert throughput.why_recompute(19e9, gpu) == ""
    assert throughput.why_recompute(33e9, gpu) == (
        "activations are recomputed in the backward pass: with them a step needs about 33.0 GB, "
        "and 20.0 GB are free on NVIDIA A100-SXM4-80GB"
    )
    assert throughput.why_recompute(1e15, torch.device("cpu")) == ""
    assert throughput.peak_flop_s(gpu) == 312e12
    assert throughput.peak_flop_s(torch.device("cpu")) == 0.0


@each(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12), ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12), ("NVIDIA A10", 125e12), ("NVIDIA B200", 2250e12), ("Tesla V100-SXM2-16GB", 0.0),
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_card(card: str, peak: float) -> None:
    assert throughput.peak_of(card) == peak


SHAPES = {
    "llama": LlamaConfig(**{**SMALL, "hidden_size": 64, "intermediate_size": 176, "num_key_value_heads": 4}),
    "grouped": LlamaConfig(**{**SMALL, "hidden_size": 128, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_of_the_products(name: str) -> None:
    """torch counts every product; the model's formula has whole attention, where torch's kernel counts it whole too."""
    model, schedule = AutoModelForCausalLM.from_config(SHAPES[name]), Schedule(**RUN)
    ids = torch.zeros(2, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    first = throughput.step_flops(model, schedule, terms=1, taught=False)
    assert counter.get_total_flops() == pytest.approx(first, rel=0.05)
    assert throughput.step_flops(model, schedule, terms=3, taught=True) == pytest.approx(first * (3 + 1 / 3))


def test_experts_that_no_token_reaches_are_not_counted() -> None:
    moe = {"moe_intermediate_size": 24, "decoder_sparse_step": 1, "mlp_only_layers": [], "head_dim": 8}
    counts = []
    for active in (1, 4):
        config = Qwen3MoeConfig(**SMALL, **moe, num_experts=4, num_experts_per_tok=active)
        model = AutoModelForCausalLM.from_config(config)
        counts.append(throughput.step_flops(model, Schedule(**RUN), terms=1, taught=False))
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert counts[1] - counts[0] == pytest.approx(6 * 32 * experts * 3 / 4)


@contextlib.contextmanager
def kept_bytes(model: Any) -> Iterator[list[int]]:
    """The bytes that autograd keeps in this context, the model's parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}
    total: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_those_that_autograd_keeps(name: str, autocast: bool) -> None:
    model, schedule = AutoModelForCausalLM.from_config(SHAPES[name]), Schedule(**RUN, autocast=autocast)
    forward.prepare(model, select_linears(model, "all"), schedule)
    with forward.passes(model, schedule), kept_bytes(model) as kept:
        model.model(input_ids=torch.zeros(2, 16, dtype=torch.int64), use_cache=False)
    assert math.isclose(throughput.activation_bytes(model, schedule), kept[0], rel_tol=0.15)
