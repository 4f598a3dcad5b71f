"""Joint training: its gradients against plain autograd, its state against SIGKILL, its result against its purpose."""

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import conftest
import matquant
from cases import each
from conftest import Interrupt
from matquant.core.grid import fit_slice
from matquant.format.read import open_checkpoint
from matquant.hf_torch.layers import select_linears
from matquant.hf_torch.loading import load_float
from matquant.hf_torch.sharded import split_rows
from matquant.methods import qat
from matquant.methods import quantize as quantising
from matquant.methods.parts import forward, training
from matquant.methods.parts.fake import Grid, Learned, backward, finish_backward, nest
from matquant.methods.parts.readings import read
from matquant.methods.parts.split_state import Training
from matquant.methods.parts.terms import draw_mix
from matquant.options.objective import parse_objective
from matquant.system.errors import InputError

RUN: dict[str, Any] = {"steps": 6, "batch_size": 2, "seq_len": 16, "lr": 1e-3, "seed": 3}


def schedule(**changes: Any) -> qat.Schedule:
    return qat.Schedule(**{**RUN, "warmup": 1, **changes})


@functools.lru_cache(maxsize=2)
def _loaded(directory: Path) -> torch.nn.Module:
    return load_float(directory, dtype=torch.float32)


def float_model(directory: Path) -> Any:
    """A model of a directory that is not written again, read once: a copy, to be changed."""
    return copy.deepcopy(_loaded(directory))


def masters_gradients(
    directory: Path, objective: str, *, grid: Grid, **changes: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Gradients of the masters after one step of our training, and its log record."""
    model = float_model(directory)
    views = select_linears(model, "ffn")
    plan = schedule(lr=0.0, clip_norm=1e9, **changes)
    state = training.start(model, views, grid, plan, trained=[width.bits for width in parse_objective(objective)])
    optimizer = training.make_optimizer(state, plan)
    teacher = float_model(directory) if "fp" in objective or plan.hidden else None
    forward.prepare(model, views, plan)
    windows = np.random.default_rng(0).integers(0, 256, size=(4, 17))
    models = Training(model=model, teacher=teacher, views=views, counts=split_rows(views, model))
    reading = qat.train_step(models, grid, state, optimizer, parse_objective(objective), windows, plan)
    (record,) = read([reading], steps=plan.steps, tokens=1)
    return {name: tensor.grad.clone() for name, tensor in state.named() if tensor.grad is not None}, record


def oracle_gradients(
    directory: Path,
    objective: str,
    grid: Grid,
    size: int,
    *,
    mix: float = 0.0,
    plan: Mapping[str, int] | None = None,
    hidden: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Eq. 7 by one autograd graph over all widths: w + (sliced(w) - w).detach() inside functional_call.

    mix: weight of one more loss, that of ``plan`` with the targets of the narrowest width. hidden: weight of the
    decoder layers' relative squared distance to the float model's.
    """
    model = float_model(directory)
    windows = np.random.default_rng(0).integers(0, 256, size=(4, 17))
    tokens = torch.from_numpy(windows[np.random.default_rng([3, 0]).permutation(4)[:size]])
    names = [f"{path}.weight" for path in select_linears(model, "ffn")]
    leaves = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    logits: dict[int, torch.Tensor] = {}
    last: list[torch.Tensor] = []  # what comes before the final norm, which is none of output_hidden_states
    model.model.norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
    output = model(tokens[:, :-1], output_hidden_states=True)
    logits[0], aims = output.logits.detach(), [tensor.detach() for tensor in (*output.hidden_states[1:-1], last.pop())]
    total = torch.zeros(())
    widths = parse_objective(objective)
    plans = [dict.fromkeys(leaves, width.bits) for width in widths]
    if plan is not None:
        widths += (dataclasses.replace(widths[-1], weight=mix),)
        plans.append({f"{path}.weight": bits for path, bits in plan.items()})
    for width, bits in zip(widths, plans, strict=True):
        sliced = {
            name: leaf + (nest(leaf.detach(), grid).read(bits[name]) - leaf).detach() for name, leaf in leaves.items()
        }
        output = torch.func.functional_call(model, sliced, (tokens[:, :-1],), {"output_hidden_states": True})
        logits[width.bits] = output.logits
        terms = []
        if width.truth:
            terms.append(functional.cross_entropy(logits[width.bits].flatten(0, 1), tokens[:, 1:].flatten()))
        for teacher in width.teachers:
            target = logits[teacher].detach().flatten(0, 1).softmax(-1)
            difference = target.log() - logits[width.bits].flatten(0, 1).log_softmax(-1)
            terms.append((target * difference).sum(-1).mean())
        states = (*output.hidden_states[1:-1], last.pop())
        distance = sum((h - aim).norm() ** 2 / aim.norm() ** 2 for h, aim in zip(states, aims, strict=True))
        total = total + width.weight * (sum(terms) / len(terms) + hidden * distance / len(states))
    total.backward()
    return {
        f"{name.removesuffix('.weight')}/weight": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
    }


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        gap = (found[name] - gradient).abs().max() / gradient.abs().max()
        if gap > 1e-4:
            raise AssertionError(f"gradient of {name} differs by {gap:.1e} of its size")


OBJECTIVES = ("8,4,2", "8,4,8->2", "8,4,2,8->4;2", "8,4,2,fp->2", "2")
SUMS = [
    pytest.param(objective, rule, marks=[] if rule == "prefix" or objective == "8,4,2" else pytest.mark.slow)
    for objective in OBJECTIVES
    for rule in ("prefix", "round", "extra")
]


@pytest.mark.parametrize(("objective", "rule"), SUMS)
def test_gradients_are_those_of_the_summed_objective(objective: str, rule: str, llama: Path) -> None:
    grid = Grid(rule=rule, sliced=(2, 4))
    found, _ = masters_gradients(llama, objective, grid=grid)
    expected = oracle_gradients(llama, objective, grid, 2)
    assert_same_gradients(found, expected)
    other = oracle_gradients(llama, objective.replace("2", "3"), Grid(rule=rule, sliced=(3, 4)), 2)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_gradients(found, other)


@pytest.mark.parametrize("masters", ["one", "each"])
@pytest.mark.parametrize("objective", ["8,4,2", "8,4,8->2", "8,4,2,fp->8;4;2"])
def test_a_mix_adds_the_loss_of_its_plan(objective: str, masters: str, llama: Path) -> None:
    grid = Grid(rule="prefix", affine="refit" if masters == "one" else "none", sliced=(2, 4))
    found, record = masters_gradients(llama, objective, grid=grid, mix=0.5, masters=masters, learn_clip=False)
    for name in [name for name in found if name.count("/") > 1]:  # a width's own master: all start equal
        path, _, _ = name.split("/")
        found[f"{path}/weight"] += found.pop(name)
    paths = list(select_linears(load_float(llama), "ffn"))
    plan = draw_mix(paths, (8, 4, 2), index=0, seed=3)
    assert_same_gradients(found, oracle_gradients(llama, objective, grid, 2, mix=0.5, plan=plan))
    assert set(record["loss"]) == {"8", "4", "2", "mixed"}
    other = {path: 8 if bits == 2 else 2 for path, bits in plan.items()}
    for wrong in (
        oracle_gradients(llama, objective, grid, 2),
        oracle_gradients(llama, objective, grid, 2, mix=0.5, plan=other),
    ):
        with pytest.raises(AssertionError, match="differs"):
            assert_same_gradients(found, wrong)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
@pytest.mark.parametrize("objective", ["8,4,2", "8,4,2,fp->2", "2"])
def test_hidden_states_add_their_distance_to_every_loss(
    objective: str, checkpoint_activations: bool, llama: Path
) -> None:
    grid = Grid(rule="prefix", sliced=(2, 4))
    changes: dict[str, Any] = {"checkpoint_activations": checkpoint_activations}
    if objective != "2":
        paths = list(select_linears(load_float(llama), "ffn"))
        changes["mix"] = 0.5
        plan = draw_mix(paths, (8, 4, 2), index=0, seed=3)
    else:
        plan = None
    found, _ = masters_gradients(llama, objective, grid=grid, hidden=3.0, **changes)
    assert_same_gradients(found, oracle_gradients(llama, objective, grid, 2, mix=0.5, plan=plan, hidden=3.0))
    with pytest.raises(AssertionError, match="differs"):
        assert_same_gradients(found, oracle_gradients(llama, objective, grid, 2, mix=0.5, plan=plan))


def test_a_mix_is_two_neighbouring_widths_the_wider_after_the_narrower() -> None:
    paths = [f"linear {number}" for number in range(4)]
    drawn = [draw_mix(paths, (8, 4, 2), index=index, seed=0) for index in range(200)]
    assert drawn == [draw_mix(paths, (8, 4, 2), index=index, seed=0) for index in range(200)]
    assert drawn != [draw_mix(paths, (8, 4, 2), index=index, seed=1) for index in range(200)]
    found = {"".join(str(plan[path]) for path in paths) for plan in drawn}
    assert found == {"2444", "2244", "2224", "4888", "4488", "4448"}


def test_without_a_mix_there_is_none(llama: Path, text_file: Path, tmp_path: Path) -> None:
    records: dict[float | None, list[Any]] = {None: [], 0.0: [], 1.0: []}
    for mix, found in records.items():
        options = {**RUN, "steps": 2, **({} if mix is None else {"mix": mix})}
        conftest.quantize(llama, tmp_path / str(mix), text=[text_file], **options, report=found.append)
    shards = [(tmp_path / str(mix) / "model.safetensors").read_bytes() for mix in records]
    assert shards[0] == shards[1]
    assert shards[0] != shards[2]
    assert [set(found[0]["loss"]) for found in records.values()] == [{"8", "4", "2"}] * 2 + [{"8", "4", "2", "mixed"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": -1.0}, r"^mix=-1\.0; give a number of at least 0$"),
        ({"hidden": math.inf}, r"^hidden=inf; give a number of at least 0$"),
        (
            {"mix": 1.0, "objective": "2"},
            r"^mix=1 needs two widths and two layers, found widths \[2\] and 6 layers; drop mix$",
        ),
    ],
)
def test_a_mix_of_nothing_and_a_weight_that_is_none_are_refused(
    options: dict[str, Any], message: str, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        conftest.quantize(llama, tmp_path / "out", text=[text_file], **RUN, **options)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_emulated_bf16_is_told(
    fast: bool, autocast: bool, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantising, "bf16_is_fast", lambda: fast)
    records: list[dict[str, Any]] = []
    options = {**RUN, "steps": 2, "autocast": autocast, "device": "cpu"}
    conftest.quantize(llama, tmp_path / "out", text=[text_file], **options, report=records.append)
    told = ["emulates bf16" in record.get("notice", "") for record in records]
    assert told == [autocast and not fast] * 2


@pytest.mark.parametrize("changes", [{"checkpoint_activations": True}, {"accumulate": 2, "batch_size": 1}])
def test_memory_savers_do_not_change_gradients(changes: dict[str, Any], llama: Path) -> None:
    grid = Grid(rule="prefix", sliced=(2, 4))
    plain, _ = masters_gradients(llama, "8,4,2", grid=grid)
    saved, _ = masters_gradients(llama, "8,4,2", grid=grid, **changes)
    assert_same_gradients(saved, plain)


def test_nothing_is_dropped_at_random(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    """OPT drops a tenth of what its layers put out, in functions of its own, unless it is told not to."""
    grid, calls = Grid(rule="prefix", sliced=(2, 4)), [0]
    plain = Path(shutil.copytree(family_model("opt"), tmp_path / "plain"))
    config = json.loads((plain / "config.json").read_text())
    assert config["dropout"] > 0
    (plain / "config.json").write_text(json.dumps({**config, "dropout": 0.0, "attention_dropout": 0.0}))
    expected, _ = masters_gradients(plain, "8,4,2", grid=grid)

    def count(module: torch.nn.Module, *_: Any) -> None:
        calls[-1] += isinstance(module, torch.nn.Linear)

    with torch.nn.modules.module.register_module_forward_hook(count):
        for again in (False, True):
            calls.append(0)
            found, _ = masters_gradients(family_model("opt"), "8,4,2", grid=grid, checkpoint_activations=again)
            assert_same_gradients(found, expected)
    assert calls[2] > 1.5 * calls[1], "no layer was computed again"


def test_bf16_reads_the_weights_of_each_width(llama: Path) -> None:
    """Autocast caches cast weights: with its cache on, every width would run on the first one's."""
    grid = Grid(rule="prefix", sliced=(2, 4))
    _, exact = masters_gradients(llama, "8,4,2", grid=grid)
    _, rounded = masters_gradients(llama, "8,4,2", grid=grid, autocast=True)
    gaps = {bits: abs(rounded["loss"][bits] - exact["loss"][bits]) for bits in ("8", "4", "2")}
    between = abs(exact["loss"]["8"] - exact["loss"]["2"])
    assert max(gaps.values()) < between / 4, f"{gaps} against {between} between widths"


def test_fused_experts_get_gradients_per_expert(family_model: Callable[[str], Path]) -> None:
    gradients, _ = masters_gradients(family_model("qwen3_moe"), "8,4,2", grid=Grid(rule="prefix"))
    assert any(".experts.3.down_proj" in name for name in gradients)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def read_by_autograd(
    weight: torch.Tensor, bits: int, clip: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor | None] | None
) -> torch.Tensor:
    """Oracle: the prefix read of a symmetric 8-bit grid with straight-through round and slice, all else autograd's."""
    scale = 2 * clip / 255
    position = (weight / scale + 128).clamp(0, 255)
    step = 2 ** (8 - bits)
    code = position / step + ((position + 0.5).floor().clamp(0, 255).div(step).floor() - position / step).detach()
    if affine is not None:
        return affine[0] * (2 * code / (2**bits - 1) - 1) + (0.0 if affine[1] is None else affine[1])
    return scale * step * (code - (128 - (step - 1) / 2) / step)


@each("own", ["own", "centre", None])
@each("bits", [2, 4, 8])
def test_learned_gradients_are_those_of_autograd(bits: int, own: str | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 32, requires_grad=True)
    clip = (0.6 * weight.detach().abs().amax(1, keepdim=True)).requires_grad_()
    affine = (torch.rand(5, 1) + 0.1, torch.rand(5, 1) if own == "own" else None) if own else None
    trained = [tensor.requires_grad_() for tensor in affine or () if tensor is not None]
    gradient = torch.randn(5, 32)
    read_by_autograd(weight, bits, clip, affine).backward(gradient)
    leaves = [weight, clip, *trained]
    expected = [tensor.grad for tensor in leaves]
    for tensor in leaves:
        tensor.grad = None

    grid = Grid(rule="prefix", affine="learned", storable=False, sliced=(bits,) if own else ())
    learned = Learned(clip=clip, affines={bits: affine} if affine is not None else {})
    nested = nest(weight.detach(), grid, learned=learned)
    if affine is not None:  # unrounded, as in the oracle
        reach, centre = (torch.zeros(5, 1) if tensor is None else tensor.detach() for tensor in affine)
        half = (2**bits - 1) / 2
        nested = dataclasses.replace(nested, slices={bits: (reach / half, half - half * centre / reach)})
    with torch.no_grad():
        share = backward(gradient, nested.read(bits), nested, bits, learned)
        weight.grad = finish_backward(share, weight, nested, learned)
    torch.testing.assert_close(nested.read(bits), read_by_autograd(weight, bits, clip, affine).detach())
    for tensor, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(tensor.grad, wanted, rtol=1e-4, atol=1e-5)


def test_only_trained_widths_learn_and_the_others_are_fitted_at_the_end(llama: Path) -> None:
    model = load_float(llama, dtype=torch.float32)
    views, grid = select_linears(model, "ffn"), Grid(rule="prefix", affine="learned", sliced=(2, 3, 4))
    state = training.start(model, views, grid, schedule(learn_clip=True), trained=(8, 4, 2))
    for weight in state.masters.values():
        weight.mul_(3.0)  # as if trained: what was fitted to the first weights is wrong now
    for learned in state.learned.values():
        assert set(learned.affines) == {2, 4}
    for path, tensor in qat.finish(state, grid):
        scale, zero = fit_slice(
            state.masters[path], tensor.codes, 3, rule="prefix", scale=tensor.scale, zero=tensor.zero
        )
        torch.testing.assert_close(tensor.slices[3], (scale, zero))


def test_plain_training_is_learned_training_with_nothing_learned(llama: Path) -> None:
    """With the grid's own affines the ratio is 1, so chaining by hand must give autograd's sum."""
    plain, _ = masters_gradients(llama, "8,4,2", grid=Grid(rule="prefix", affine="none"))
    clipped, _ = masters_gradients(llama, "8,4,2", grid=Grid(rule="prefix", affine="none"), learn_clip=True)
    for name, gradient in plain.items():
        inside = clipped[name] != 0
        assert inside.float().mean() > 0.9
        torch.testing.assert_close(clipped[name][inside], gradient[inside], rtol=1e-4, atol=1e-7)


def test_training_lowers_the_loss_and_only_touches_what_it_should(llama: Path, text_file: Path, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    out = conftest.quantize(
        llama, tmp_path / "out", text=[text_file], **{**RUN, "steps": 40, "lr": 3e-3}, report=records.append
    )
    assert records[-1]["loss"]["2"] < 0.8 * records[0]["loss"]["2"]
    assert len((out / "training.jsonl").read_text().splitlines()) == 40
    source, trained = load_float(llama), matquant.load(out, kernels="none")
    for name, parameter in source.named_parameters():
        if ".mlp." not in name:
            assert torch.equal(trained.get_parameter(name), parameter), name


def test_train_rest_trains_the_rest(llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = conftest.quantize(llama, tmp_path / "out", text=[text_file], train_rest=True, **RUN)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(
        matquant.load(out, kernels="none").get_parameter(name), load_float(llama).get_parameter(name)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_dedicated_baseline_is_its_own_grid_and_reads_back_exactly(
    bits: int, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    out = conftest.quantize(llama, tmp_path / "out", text=[text_file], baseline_bits=bits, affine="none", **RUN)
    checkpoint = open_checkpoint(out)
    tensor = checkpoint.nested("model.layers.0.mlp.up_proj")
    if bits < 8:
        units = tensor.read(bits) / tensor.affine(bits)[0]
        levels = np.arange(2**bits) - (2**bits - 1) / 2  # centred: -max .. max
        np.testing.assert_allclose(np.unique(units.round(3)), levels)
        np.testing.assert_allclose(tensor.read(8), tensor.read(bits), rtol=1e-6)  # stock int8 is the same model
    else:
        assert len(np.unique(tensor.codes)) > 100


def test_the_same_seed_gives_the_same_bits_and_another_does_not(llama: Path, text_file: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        conftest.quantize(llama, tmp_path / name, text=[text_file], **{**RUN, "seed": seed})
    shard = "model.safetensors"
    assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()
    assert (tmp_path / "a" / shard).read_bytes() != (tmp_path / "c" / shard).read_bytes()


def test_a_loss_that_is_not_finite_names_width_and_layer_and_keeps_the_saved_state(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = qat.write_weights

    def write(model: Any, views: Any, weights: Any) -> None:
        broken = ((path, w * torch.inf if "layers.1.mlp.down" in path else w) for path, w in weights)
        written(model, views, broken if (tmp_path / ".out.work" / "state.safetensors").is_file() else weights)

    monkeypatch.setattr(qat, "write_weights", write)
    with pytest.raises(InputError, match=r"loss at 8 bits is not finite at step 3, first in model\.layers\.1; use a"):
        conftest.quantize(llama, tmp_path / "out", text=[text_file], **{**RUN, "steps": 8, "save_every": 2})
    assert (tmp_path / ".out.work" / "state.safetensors").is_file()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(llama: Path, text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "seq_len": 16, "lr": 1e-3, "steps": 24, "save_every": 5, "threads": 1}
    options |= {"train_rest": True, "mix": 1.0, "hidden": 1.0}
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    flags = [part for part in flags if part != "True"]

    def command(*extra: str) -> list[str]:
        out, small = str(tmp_path / "killed"), ["--method", "qat", "--scope", "ffn", "--group-size", "channel"]
        where = [str(llama), "-o", out, "--text", str(text_file)]
        return [sys.executable, "-m", "matquant", "quantize", *where, *small, *extra]

    conftest.quantize(str(llama), tmp_path / "whole", text=[text_file], **options)
    log = tmp_path / ".killed.work" / "training.jsonl"
    kills = int.from_bytes(os.urandom(1)) % 12 + 4
    process = subprocess.Popen(command(*flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not log.is_file() or log.read_bytes().count(b"\n") < kills):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    subprocess.run(command(*flags, "--resume"), check=True, capture_output=True)
    for file in ("model.safetensors", "matquant_slices.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), (
            f"killed at {kills}"
        )
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "training.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))


@pytest.mark.parametrize("variant", [{"affine": "refit"}, {"masters": "each", "objective": "8,4,3,2"}])
def test_an_interrupted_run_resumes_to_the_same_bits(
    variant: dict[str, Any], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {**RUN, **variant, "save_every": 3, "text": [text_file]}
    whole = conftest.quantize(llama, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        conftest.quantize(llama, tmp_path / "killed", report=Interrupt(print, 4), **options)
    resumed = conftest.quantize(llama, tmp_path / "killed", resume=True, **options)
    for file in ("model.safetensors", "matquant_slices.safetensors"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()
