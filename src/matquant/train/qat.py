"""Quantisation-aware training of all widths at once (MatQuant Eq. 7, QAT).

    min over W of  (1/N) sum_i sum_r lambda_r * L( F( slice(quantise(W), r), x_i ), y_i )

One optimiser step runs forward and backward once per width, widest first, so that memory holds one graph and a wide
width's logits can teach a narrower one. The model's parameters hold the sliced weights of the width at hand *through
its backward pass*: activation checkpointing recomputes with the same numbers. Gradients pass straight through (fake.py)
to float masters, which AdamW updates. By default only the quantised weights are trained, the paper's W_F.

Cost: one forward and backward per width, plus one forward if the float model teaches. The state is saved every
``save_every`` steps in safetensors, atomically; batches depend on seed and step only, so a resumed run ends with the
same bits as one that was never stopped.
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from matquant.errors import InputError
from matquant.models import Model, View, write_weights
from matquant.tensor import Affine, NestedTensor
from matquant.text import batch
from matquant.train.fake import Grid, fit, nest, read_learned
from matquant.train.objective import FLOAT, Width, width_loss

STATE = "state.safetensors"
LOG = "training.jsonl"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Everything a run depends on besides model, data, grid and objective. seq_len in tokens, lr of the weights.

    warmup: steps of linear warm-up, then cosine to 0. affine_lr: of clipping and affines, as a multiple of lr.
    train_rest: also train what is not quantised (embeddings, norms, attention under scope ffn).
    """

    steps: int
    batch_size: int
    seq_len: int
    lr: float
    seed: int
    warmup: int
    affine_lr: float = 1.0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    autocast: bool = False
    checkpoint_activations: bool = False
    train_rest: bool = False
    learn_clip: bool = False
    save_every: int = 100


@dataclass(kw_only=True)
class State:
    """The tensors being trained, by path, and how far training has come."""

    masters: dict[str, torch.Tensor]
    gammas: dict[str, torch.Tensor] = field(default_factory=dict)
    affines: dict[str, dict[int, Affine]] = field(default_factory=dict)
    rest: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every trained tensor under a unique name."""
        yield from ((f"{path}/weight", tensor) for path, tensor in self.masters.items())
        yield from ((f"{path}/gamma", tensor) for path, tensor in self.gammas.items())
        for path, widths in self.affines.items():
            for bits, (scale, zero) in widths.items():
                yield f"{path}/{bits}/scale", scale
                yield f"{path}/{bits}/zero", zero
        yield from ((f"{name}/rest", tensor) for name, tensor in self.rest.items())


Report = Callable[[dict[str, Any]], None]


def train(
    model: Model,
    views: Mapping[str, View],
    grid: Grid,
    *,
    objective: tuple[Width, ...],
    windows: np.ndarray,
    schedule: Schedule,
    work: Path,
    fingerprint: Mapping[str, Any],
    report: Report,
) -> Iterator[tuple[str, NestedTensor]]:
    """Train and return the nested tensors; the model's other parameters are trained in place if the schedule says so.

    windows: tokens [count, seq_len + 1]. work: folder for the state and the log; a state there is continued, after
    checking that its fingerprint is ours. report: called with each step's log record.
    """
    state = start(model, views, grid, schedule)
    optimizer = make_optimizer(state, schedule)
    if (work / STATE).is_file():
        restore(state, optimizer, work, fingerprint)
    teacher = copy.deepcopy(model) if any(FLOAT in width.teachers for width in objective) else None
    _prepare(model, views, schedule)
    with (work / LOG).open("a") as log:
        while state.step < schedule.steps:
            record = train_step(model, views, grid, state, optimizer, objective, windows, schedule, teacher)
            if not all(math.isfinite(loss) for loss in record["loss"].values()):
                raise InputError(f"the loss is not finite at step {state.step}; use a smaller --lr")
            log.write(json.dumps(record) + "\n")
            report(record)
            if state.step % schedule.save_every == 0 or state.step == schedule.steps:
                log.flush()
                save(state, optimizer, work, fingerprint)
    _zero_slots(model)
    return finish(state, grid)


def start(model: Model, views: Mapping[str, View], grid: Grid, schedule: Schedule) -> State:
    """Float masters of all weights, and what else is learned, before step 0."""
    parameters = dict(model.named_parameters())
    masters = {
        p: v.of(parameters[v.parameter].detach()).float().clone(memory_format=torch.contiguous_format)
        for p, v in views.items()
    }
    state = State(masters=masters)
    for path, weight in masters.items():
        scale, _ = fit(weight, grid, name=path)
        if schedule.learn_clip:
            state.gammas[path] = torch.ones_like(scale)
        if grid.affine == "learned":
            tensor = nest(weight, dataclasses.replace(grid, affine="refit"), name=path)
            state.affines[path] = {
                bits: (s.clone(), z.clone()) for bits, (s, z) in tensor.slices.items() if bits in grid.sliced
            }
    if schedule.train_rest:
        taken = {view.parameter for view in views.values()}
        state.rest = {name: parameter for name, parameter in parameters.items() if name not in taken}
    return state


def make_optimizer(state: State, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW over everything trained; clipping and affines in a group of their own without decay."""
    weights = [*state.masters.values(), *state.rest.values()]
    grid = [*state.gammas.values(), *(t for widths in state.affines.values() for pair in widths.values() for t in pair)]
    for tensor in (*weights, *grid):
        tensor.requires_grad_(True)
    groups = [
        {"params": weights, "factor": 1.0, "weight_decay": schedule.weight_decay},
        {"params": grid, "factor": schedule.affine_lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=schedule.lr, betas=(0.9, 0.95), fused=True
    )


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up to ``lr``, then cosine to 0 (App. B)."""
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.lr * (1 + math.cos(math.pi * done)) / 2


def train_step(
    model: Model,
    views: Mapping[str, View],
    grid: Grid,
    state: State,
    optimizer: torch.optim.Optimizer,
    objective: tuple[Width, ...],
    windows: np.ndarray,
    schedule: Schedule,
    teacher: Model | None,
) -> dict[str, Any]:
    """One optimiser step over all widths; returns its log record and advances ``state.step``."""
    began = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(state.step, schedule) * group["factor"]
    optimizer.zero_grad()
    _zero_slots(model)
    losses = dict.fromkeys((str(width.bits) for width in objective), 0.0)
    nested = _encode(state, grid, objective)
    for part in range(schedule.accumulate):
        rows = batch(windows, state.step * schedule.accumulate + part, size=schedule.batch_size, seed=schedule.seed)
        tokens = torch.from_numpy(rows).to(model.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits: dict[int, torch.Tensor] = {}
        with _autocast(model, schedule):
            if teacher is not None:
                with torch.no_grad():
                    logits[FLOAT] = teacher(input_ids=inputs, use_cache=False).logits
            for width in objective:
                _install(model, views, state, grid, width.bits, nested)
                output = model(input_ids=inputs, use_cache=False).logits
                loss = width_loss(output, targets, [logits[bits] for bits in width.teachers], truth=width.truth)
                torch.autograd.backward(loss * width.weight / schedule.accumulate)
                losses[str(width.bits)] += loss.item() / schedule.accumulate
                if any(width.bits in student.teachers for student in objective):
                    logits[width.bits] = output.detach()
                if _is_learned(state):
                    _backward_learned(model, views, state, grid, width.bits)
    if not _is_learned(state):
        _take_gradients(model, views, state)
    norm = torch.nn.utils.clip_grad_norm_([t for _, t in state.named() if t.grad is not None], schedule.clip_norm)
    optimizer.step()
    with torch.no_grad():
        for gamma in state.gammas.values():
            gamma.clamp_(min=0.05, max=1.0)
    state.step += 1
    seconds = time.perf_counter() - began
    count = schedule.accumulate * schedule.batch_size * schedule.seq_len
    return {
        "step": state.step,
        "loss": losses,
        "lr": optimizer.param_groups[0]["lr"],
        "gradient_norm": float(norm),
        "tok_s": round(count / seconds, 1),
    }


def finish(state: State, grid: Grid) -> Iterator[tuple[str, NestedTensor]]:
    """The nested tensors of the trained masters, one at a time."""
    for path, weight in state.masters.items():
        learned = {bits: (s.detach(), z.detach()) for bits, (s, z) in state.affines.get(path, {}).items()}
        yield path, nest(weight.detach(), grid, gamma=_gamma(state, path), learned=learned, name=path)


# ------------------------------------------------------------------------------------------------------ inside a step


def _is_learned(state: State) -> bool:
    return bool(state.gammas or state.affines)


def _gamma(state: State, path: str) -> Any:
    return state.gammas[path].detach() if path in state.gammas else 1.0


def _encode(state: State, grid: Grid, objective: tuple[Width, ...]) -> dict[str, NestedTensor]:
    """All weights encoded once for this step; every width reads the same codes."""
    if _is_learned(state):
        return {}
    needed = dataclasses.replace(grid, sliced=tuple(w.bits for w in objective if w.bits in grid.sliced))
    return {path: nest(weight.detach(), needed, name=path) for path, weight in state.masters.items()}


def _install(
    model: Model, views: Mapping[str, View], state: State, grid: Grid, bits: int, nested: Mapping[str, NestedTensor]
) -> None:
    """Write the ``bits``-bit weights into the model."""
    with torch.no_grad():
        if nested:
            write_weights(model, views, ((path, tensor.read(bits)) for path, tensor in nested.items()))
        else:
            write_weights(model, views, ((path, _read(state, path, bits, grid)) for path in state.masters))


def _read(state: State, path: str, bits: int, grid: Grid) -> torch.Tensor:
    weight = state.masters[path]
    gamma = state.gammas.get(path, torch.ones((), device=weight.device))
    return read_learned(weight, bits, grid, gamma, state.affines.get(path, {}).get(bits))


def _zero_slots(model: Model) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _backward_learned(model: Model, views: Mapping[str, View], state: State, grid: Grid, bits: int) -> None:
    """Chain the gradient of the sliced weights into masters, clipping and affines, weight by weight."""
    parameters = dict(model.named_parameters())
    for path, view in views.items():
        gradient = view.of(parameters[view.parameter].grad)
        torch.autograd.backward(_read(state, path, bits, grid), gradient)
    for name in {view.parameter for view in views.values()}:
        parameters[name].grad = None


def _take_gradients(model: Model, views: Mapping[str, View], state: State) -> None:
    """Straight through: the summed gradients of the sliced weights are the masters' gradients."""
    parameters = dict(model.named_parameters())
    for path, view in views.items():
        state.masters[path].grad = view.of(parameters[view.parameter].grad).contiguous().float()


def _prepare(model: Model, views: Mapping[str, View], schedule: Schedule) -> None:
    """Training mode without dropout; only what is trained asks for gradients."""
    model.train()
    taken = {view.parameter for view in views.values()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in taken or schedule.train_rest)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if schedule.checkpoint_activations:
        model.activation_checkpointing_enable({"use_reentrant": False})


def _autocast(model: Model, schedule: Schedule) -> contextlib.AbstractContextManager[Any]:
    if not schedule.autocast:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------- saved training


def save(state: State, optimizer: torch.optim.Optimizer, work: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write everything the next step depends on, atomically."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.named()}
    for name, tensor in state.named():
        for key, value in optimizer.state[tensor].items():
            tensors[f"{name}//{key}"] = value
    partial = work / f"{STATE}.partial"
    metadata = {"step": str(state.step), "fingerprint": json.dumps(fingerprint, sort_keys=True)}
    save_file(tensors, partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(work / STATE)


def restore(state: State, optimizer: torch.optim.Optimizer, work: Path, fingerprint: Mapping[str, Any]) -> None:
    """Continue from a saved state; InputError naming the first setting that differs from the run that wrote it."""
    with safe_open(work / STATE, "pt") as file:
        metadata = file.metadata()
        theirs = json.loads(metadata["fingerprint"])
        ours = json.loads(json.dumps(fingerprint))
        for key in sorted(set(ours) | set(theirs)):
            if ours.get(key) != theirs.get(key):
                raise InputError(
                    f"--resume with {key}={ours.get(key)!r}, the interrupted run had {theirs.get(key)!r}; "
                    "use the same settings, or --overwrite to start again"
                )
        state.step = int(metadata["step"])
        names = set(file.keys())
        for name, tensor in state.named():
            with torch.no_grad():
                tensor.copy_(file.get_tensor(name))
            moments = [key for key in names if key.startswith(f"{name}//")]
            optimizer.state[tensor] = {key.rpartition("//")[2]: file.get_tensor(key) for key in moments}
    _trim_log(work / LOG, state.step)


def _trim_log(log: Path, step: int) -> None:
    """Drop the records of steps that will be done again."""
    if log.is_file():
        kept = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in kept if json.loads(line)["step"] <= step]
        log.write_text("".join(kept))
