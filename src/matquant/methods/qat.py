"""Quantisation-aware training of all widths at once (MatQuant Eq. 7, QAT).

    min over W of  (1/N) sum_i sum_r lambda_r * L( F( slice(quantise(W), r), x_i ), y_i )

One optimiser step runs forward and backward once per width, widest first, so that memory holds one graph and a wide
width's logits can teach a narrower one. The model's parameters hold the sliced weights of the current width *until its
backward pass is done*, so that activation checkpointing recomputes with the same numbers. Gradients pass straight
through (fake.py) to float masters, which AdamW updates. By default only the quantised weights are trained, the paper's
W_F.

Layers trained only at uniform widths co-adapt. ``mix`` adds a loss at a random mixed-precision plan: layers before a
random cut use one width, the rest the next wider one (``draw_mix``). ``hidden`` adds to every loss the distance of each
decoder layer's output to the float model's (``objective.hidden_loss``).

Cost: one forward and backward per width and mix, plus one forward if the float model teaches. The state is saved every
``save_every`` steps as safetensors, atomically. Batches and mixes depend only on seed and step, so a resumed run is
bit-identical to an uninterrupted one.
"""

import dataclasses
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from matquant.core.nest import MASTER_BITS
from matquant.core.tensor import NestedTensor
from matquant.distributed.collect import all_true, clip_gradients, exchange, on_first, own_part, total_values
from matquant.hf.text import batch, cut_windows
from matquant.hf_torch import Model
from matquant.hf_torch.config import check_context
from matquant.hf_torch.sharded import split_again
from matquant.hf_torch.views import View, local, write_weights
from matquant.methods.parts.fake import Grid, finish_backward, keep_in_range, nest
from matquant.methods.parts.forward import autocast, first_not_finite, layer_outputs, prepare
from matquant.methods.parts.job import LOG, Job, fingerprint
from matquant.methods.parts.masters import chain, release_blocked
from matquant.methods.parts.objective import hidden_loss, width_loss
from matquant.methods.parts.split_state import (
    SPLIT,
    Training,
    gather_all,
    keep_rest,
    open_training,
    restore_split,
    save_split,
)
from matquant.methods.parts.training import STATE, State, learning_rate, make_optimizer, restore, save, start, trim_log
from matquant.options.objective import FLOAT, Width
from matquant.options.qat import Schedule, default_lr
from matquant.system import ranks
from matquant.system.errors import InputError
from matquant.system.files import check_space, json_text
from matquant.system.interrupted import claim

STATE_COPIES = 2  # the saved state, and the next one while it is written
Term = tuple[str, Width, dict[str, int]]  # a loss of a step: its name, definition and plan


def make_schedule(job: Job) -> Schedule:
    """Return the schedule of a job, with its defaults filled in."""
    schedule = Schedule(**job.options)
    hidden_size = job.model.config.get_text_config().hidden_size
    return dataclasses.replace(
        schedule,
        lr=schedule.lr or default_lr(hidden_size),
        warmup=min(150, max(1, schedule.steps // 10)) if schedule.warmup is None else schedule.warmup,
        learn_clip=job.grid.affine == "learned" if schedule.learn_clip is None else schedule.learn_clip,
    )


def run(job: Job) -> Iterator[tuple[str, NestedTensor]]:
    """Train and return the nested tensors; unquantised parameters are trained in place if the schedule says so.

    A state in ``job.work`` is continued, after checking that it belongs to the same run.
    """
    model, views, grid, work, schedule = job.model, job.views, job.grid, job.work, make_schedule(job)
    mark = fingerprint(job, dataclasses.asdict(schedule))
    check_context(model, schedule.seq_len)
    if schedule.masters == "each" and grid.rule != "prefix":
        raise InputError(
            f"masters='each' needs nested bins, not rule {grid.rule!r}; use rule 'prefix' or masters 'one'"
        )
    _check_freeze(schedule, [width.bits for width in job.objective])
    _check_mix(schedule, [width.bits for width in job.objective], list(views))
    windows = cut_windows(job.stream, schedule.seq_len)
    # Before restoring a state, which changes the model's other parameters if they are trained too.
    taught = schedule.hidden > 0 or any(FLOAT in width.teachers for width in job.objective)
    training = open_training(job, schedule, taught=taught)
    model, teacher, views = training.model, training.teacher, training.views
    first = {path: nested for path, nested in job.first.items() if path in views}  # not embedding and head
    state = start(model, views, grid, schedule, trained=[width.bits for width in job.objective], first=first)
    optimizer = make_optimizer(state, schedule)
    state_bytes = sum(exchange(sum(3 * tensor.nbytes for _, tensor in state.named())))
    on_first(lambda: check_space(work, STATE_COPIES * state_bytes))
    # Only now: a rejected start must not delete an interrupted run.
    on_first(lambda: claim(work, mark, resume=job.resume))
    if not restore_split(training, state, optimizer, work, mark) and ranks.count() == 1 and (work / STATE).is_file():
        restore(state, optimizer, work, mark)
    on_first(lambda: trim_log(work / LOG, state.step))
    prepare(model, views, schedule)
    with _open_log(work) as log:
        while state.step < schedule.steps:
            record = train_step(model, views, grid, state, optimizer, job.objective, windows, schedule, teacher)
            log.write(json_text(record, sort_keys=False) + "\n")
            job.report(record)
            if state.step % schedule.save_every == 0 or state.step == schedule.steps:
                log.flush()
                _save(training, state, optimizer, work, mark)
    model.zero_grad(set_to_none=True)
    keep_rest(job, training, state)
    return gather_all(finish(state, grid), training, grid, job.views)


def _open_log(work: Path) -> TextIO:
    """Open the log of the training to append to it; only the first process writes it."""
    if not ranks.leads():
        return Path(os.devnull).open("a")
    work.mkdir(parents=True, exist_ok=True)
    return (work / LOG).open("a")


def _save(
    training: Training, state: State, optimizer: torch.optim.Optimizer, work: Path, mark: Mapping[str, Any]
) -> None:
    """Save the state: one file, or of several processes a folder; the other form is deleted."""
    if ranks.count() > 1:
        save_split(training, state, optimizer, work, mark)
    else:
        save(state, optimizer, work, mark)
        shutil.rmtree(work / SPLIT, ignore_errors=True)


def _check_freeze(schedule: Schedule, trained: Sequence[int]) -> None:
    if not schedule.freeze:
        return
    if schedule.freeze not in trained:
        raise InputError(f"freeze={schedule.freeze} is not one of the trained widths, {trained}; use one of them")
    if not schedule.learn_clip:
        raise InputError(
            f"freeze={schedule.freeze} needs a fixed grid, but without learned clips the grid follows "
            "the weights; use affine 'learned' and leave learn_clip out"
        )


def _check_mix(schedule: Schedule, trained: Sequence[int], paths: Sequence[str]) -> None:
    if schedule.mix and min(len(trained), len(paths)) < 2:
        raise InputError(
            f"mix={schedule.mix:g} needs two widths and two layers, found widths {trained} and {len(paths)} layers; "
            "drop mix"
        )


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
    """Run one optimiser step over all widths; return its log record and advance ``state.step``."""
    began = time.perf_counter()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(state.step, schedule) * group["factor"]
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = None
    nested = _nest(state, grid, objective)
    teachers = {bits for width in objective for bits in width.teachers}
    losses: dict[str, float] = {}
    for part in range(schedule.accumulate):
        index = state.step * schedule.accumulate + part
        rows = batch(windows, index, size=schedule.batch_size, seed=schedule.seed)
        tokens = torch.from_numpy(rows[own_part(len(rows))]).to(model.device)
        terms = _terms(tuple(nested), objective, schedule, index=index)
        found = _backward_batch(model, views, state, nested, terms, tokens, schedule, teacher, teachers)
        for name, loss in found.items():
            losses[name] = losses.get(name, 0.0) + loss / schedule.accumulate
    _finish_gradients(model, views, state, nested, schedule.pull)
    _drop_frozen(state, schedule.freeze)
    norm = clip_gradients([t for _, t in state.named() if t.grad is not None], schedule.clip_norm)
    optimizer.step()
    for path, tensor in nested.items():
        keep_in_range(state.learned[path], state.masters[path], tensor)
    state.step += 1
    seconds = time.perf_counter() - began
    count = schedule.accumulate * schedule.batch_size * schedule.seq_len
    return {
        "step": state.step,
        "steps": schedule.steps,
        "loss": total_values(losses),
        "lr": optimizer.param_groups[0]["lr"],
        "gradient_norm": float(norm),
        "tok_s": round(count / seconds, 1),
    }


def draw_mix(paths: Sequence[str], widths: Sequence[int], *, index: int, seed: int) -> dict[str, int]:
    """Return the plan of a mixed loss: two neighbouring ``widths`` (descending), the wider one from a random layer on.

    The plan depends only on the seed and the index of the batch. paths: at least two, in the order of the model.
    """
    draw = np.random.default_rng([seed, index, 1])  # independent of the batches' random stream
    wider = int(draw.integers(len(widths) - 1))
    narrow = set(paths[: int(draw.integers(1, len(paths)))])
    return {path: widths[wider + (path in narrow)] for path in paths}


def finish(state: State, grid: Grid) -> Iterator[tuple[str, NestedTensor]]:
    """Yield the nested tensors of the trained masters, one at a time."""
    for path, weight in state.masters.items():
        yield path, nest(weight.detach(), grid, learned=state.learned[path], coarse=state.coarse[path], name=path)


def _terms(paths: Sequence[str], objective: Sequence[Width], schedule: Schedule, *, index: int) -> list[Term]:
    """Return the losses of a batch: their names, definitions and plans {path: bits}."""
    terms = [(str(width.bits), width, dict.fromkeys(paths, width.bits)) for width in objective]
    if schedule.mix:
        plan = draw_mix(paths, [width.bits for width in objective], index=index, seed=schedule.seed)
        terms.append(("mixed", dataclasses.replace(objective[-1], weight=schedule.mix), plan))
    return terms


def _nest(state: State, grid: Grid, objective: tuple[Width, ...]) -> dict[str, NestedTensor]:
    """Encode all weights once for this step; every width reads the same codes."""
    needed = dataclasses.replace(grid, sliced=tuple(w.bits for w in objective if w.bits in grid.sliced))
    return {
        path: nest(weight.detach(), needed, learned=state.learned[path], coarse=state.coarse[path], name=path)
        for path, weight in state.masters.items()
    }


def _backward_batch(
    model: Model,
    views: Mapping[str, View],
    state: State,
    nested: Mapping[str, NestedTensor],
    terms: Sequence[Term],
    tokens: torch.Tensor,
    schedule: Schedule,
    teacher: Model | None,
    teachers: Collection[int],
) -> dict[str, float]:
    """Add the gradients of one batch for every term, in order; return the losses by the terms' names.

    tokens: int64 [B, T + 1], this process's sequences of the batch. teachers: widths whose logits are kept, without a
    graph, as targets of later terms. Raises InputError naming the width, the step and the layer for a loss that is not
    finite.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits: dict[int, torch.Tensor] = {}
    aims: list[torch.Tensor] = []
    losses: dict[str, float] = {}
    chained = any(state.coarse.values()) or next(state.named_learned(), None) is not None
    with autocast(model, schedule):
        if teacher is not None:
            with torch.no_grad(), layer_outputs(teacher, kept=schedule.hidden > 0) as aims:
                logits[FLOAT] = teacher(input_ids=inputs, use_cache=False).logits
        for name, width, plan in terms:
            split_again(model)
            write_weights(model, views, ((path, tensor.read(plan[path])) for path, tensor in nested.items()))
            with layer_outputs(model, kept=schedule.hidden > 0) as hidden:
                output = model(input_ids=inputs, use_cache=False).logits
            loss = width_loss(output, targets, [logits[bits] for bits in width.teachers], truth=width.truth)
            loss = loss * (len(tokens) / schedule.batch_size)  # this process's part of the batch
            if schedule.hidden:
                loss = loss + schedule.hidden * hidden_loss(hidden, aims)
            if not bool(all_true(torch.isfinite(loss))):
                raise InputError(
                    f"the loss at {name} bits is not finite at step {state.step + 1}, first in "
                    f"{first_not_finite(model, inputs)}; use a smaller --lr and --overwrite"
                )
            torch.autograd.backward(loss * width.weight / schedule.accumulate)
            losses[name] = loss.item()
            if width.bits in teachers:
                logits[width.bits] = output.detach()
            if chained:
                _chain_gradients(model, views, state, nested, plan)
    return losses


def _chain_gradients(
    model: Model,
    views: Mapping[str, View],
    state: State,
    nested: Mapping[str, NestedTensor],
    plan: Mapping[str, int],
) -> None:
    """Chain the gradients at one plan into masters, clips, scales and zero-points, weight by weight."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, view in views.items():
            parameter, bits = parameters[view.parameter], plan[path]
            weight = state.coarse[path].get(bits, state.masters[path])
            chain(
                view.of(local(parameter.grad)).float(),
                view.of(local(parameter)),
                nested[path],
                bits,
                master=weight,
                learned=state.learned[path],
            )
    for name in {view.parameter for view in views.values()}:
        parameters[name].grad = None


def _finish_gradients(
    model: Model, views: Mapping[str, View], state: State, nested: Mapping[str, NestedTensor], pull: float
) -> None:
    """Finish the masters' gradients: chained width by width, or, straight through, autograd's sum over all widths."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path, view in views.items():
            weight = state.masters[path]
            if weight.grad is None:
                weight.grad = view.of(local(parameters[view.parameter].grad)).contiguous().float()
                continue
            if state.coarse[path]:
                release_blocked({MASTER_BITS: weight, **state.coarse[path]}, nested[path], pull=pull)
            for master in (weight, *state.coarse[path].values()):
                assert master.grad is not None
                master.grad = finish_backward(master.grad, master, nested[path], state.learned[path])
        for name, tensor in state.rest.items():
            gradient = parameters[name].grad
            tensor.grad = None if gradient is None else local(gradient)


def _drop_frozen(state: State, freeze: int) -> None:
    """Drop the gradients of the masters of widths up to ``freeze`` and of all clips, which keeps those codes."""
    if not freeze:
        return
    for path, weight in state.masters.items():
        for bits, master in {MASTER_BITS: weight, **state.coarse[path]}.items():
            if bits <= freeze:
                master.grad = None
        clip = state.learned[path].clip
        assert clip is not None  # checked by _check_freeze
        clip.grad = None
