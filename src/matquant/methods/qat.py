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

Nothing in a step waits for the device: batches are copied from pinned memory, and losses and gradient norms stay where
they are until those of several steps are read at once (readings.py), so that a GPU always has work queued.

Cost: one forward and backward per width and mix, plus one forward if the float model teaches. The state is saved every
``save_every`` steps as safetensors, atomically. Batches and mixes depend only on seed and step, so a resumed run is
bit-identical to an uninterrupted one.
"""

import dataclasses
import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch

from matquant.core.nest import MASTER_BITS
from matquant.core.tensor import NestedTensor
from matquant.distributed.collect import clip_gradients, exchange, on_first
from matquant.format.side_files import LOG
from matquant.hf.text import cut_windows
from matquant.hf_torch.config import check_context
from matquant.hf_torch.sharded import split_again
from matquant.hf_torch.views import local, write_weights
from matquant.methods.parts import fused
from matquant.methods.parts.fake import Grid, finish_backward, keep_in_range, nest
from matquant.methods.parts.forward import first_not_finite, layer_outputs, passes, prepare
from matquant.methods.parts.job import Job, fingerprint
from matquant.methods.parts.masters import chain, release_blocked
from matquant.methods.parts.objective import hidden_loss, width_loss
from matquant.methods.parts.readings import NotFiniteError, Reading, read, steps_at_once, stop_unless_finite
from matquant.methods.parts.split_state import Training, gather_all, keep_rest, open_training, restore_state, save_state
from matquant.methods.parts.terms import Term, make_terms, own_tokens
from matquant.methods.parts.throughput import peak_flop_s, step_bytes, step_flops, step_tokens, why_recompute
from matquant.methods.parts.training import State, learning_rate, make_optimizer, open_log, start, trim_log
from matquant.options.objective import FLOAT, Width
from matquant.options.qat import Schedule, default_lr
from matquant.system import ranks
from matquant.system.errors import InputError
from matquant.system.files import check_space, json_text
from matquant.system.interrupted import claim

STATE_COPIES = 2  # the saved state, and the next one while it is written


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
    model, views = training.model, training.views
    first = {path: nested for path, nested in job.first.items() if path in views}  # not embedding and head
    state = start(model, views, grid, schedule, trained=[width.bits for width in job.objective], first=first)
    optimizer = make_optimizer(state, schedule)
    state_bytes = sum(exchange(sum(3 * tensor.nbytes for _, tensor in state.named())))
    on_first(lambda: check_space(work, STATE_COPIES * state_bytes))
    # Only now: a rejected start must not delete an interrupted run.
    on_first(lambda: claim(work, mark, resume=job.resume))
    restore_state(training, state, optimizer, work, mark)
    on_first(lambda: trim_log(work / LOG, state.step))
    flops, peak = _prepare(job, training, state, schedule), ranks.count() * peak_flop_s(job.device)
    every, pending = steps_at_once(job.device), list[Reading]()
    with open_log(work) as log:
        while state.step < schedule.steps:
            pending.append(train_step(training, grid, state, optimizer, job.objective, windows, schedule))
            saved = state.step % schedule.save_every == 0 or state.step == schedule.steps
            if not saved and len(pending) < every:
                continue
            try:
                for record in read(pending, steps=schedule.steps, tokens=step_tokens(schedule), flops=flops, peak=peak):
                    log.write(json_text(record, sort_keys=False) + "\n")
                    job.report(record)
            except NotFiniteError as error:
                raise _explain(error, training, grid, state, job.objective, windows, schedule) from None
            pending.clear()
            if saved:
                log.flush()
                save_state(training, state, optimizer, work, mark)
    model.zero_grad(set_to_none=True)
    keep_rest(job, training, state)
    return gather_all(finish(state, grid), training, grid, job.views)


def _prepare(job: Job, training: Training, state: State, schedule: Schedule) -> float:
    """Prepare the model, and recompute activations where they do not fit; return the FLOPs of a step, 0.0 on a CPU."""
    model, terms = training.model, len(job.objective) + (schedule.mix > 0)
    teachers = {bits for width in job.objective for bits in width.teachers}
    trained = sum(tensor.numel() for _, tensor in state.named())
    own = dataclasses.replace(schedule, batch_size=-(-schedule.batch_size // ranks.count()))
    needed_bytes = step_bytes(model, own, trained=trained, teachers=len(teachers))
    reason = "" if schedule.checkpoint_activations else max(exchange(why_recompute(needed_bytes, job.device)))
    if reason:  # not in the fingerprint: it changes no result, and free memory is that of the moment
        job.report({"notice": reason})
        schedule = dataclasses.replace(schedule, checkpoint_activations=True)
    prepare(model, training.views, schedule)
    taught = training.teacher is not None
    return step_flops(model, schedule, terms=terms, taught=taught) if job.device.type == "cuda" else 0.0


def _explain(
    error: NotFiniteError,
    training: Training,
    grid: Grid,
    state: State,
    objective: tuple[Width, ...],
    windows: np.ndarray,
    schedule: Schedule,
) -> InputError:
    """Return the error of a step that is not finite. The step changed no weight, so its layers can be run again."""
    remedy = "use a smaller --lr and --overwrite"
    if not error.term:
        return InputError(f"the gradient is not finite at step {error.step}; {remedy}")
    model, index = training.model, (error.step - 1) * schedule.accumulate + error.part
    terms = make_terms(tuple(training.counts), objective, schedule, index=index)
    plan = next(plan for name, _, plan in terms if name == error.term)
    nested = _nest(state, grid, objective)
    _write(training, nested, plan)
    with passes(model, schedule):
        layer = first_not_finite(model, own_tokens(windows, schedule, index=index, device=model.device)[:, :-1])
    return InputError(f"the loss at {error.term} bits is not finite at step {error.step}, first in {layer}; {remedy}")


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
    training: Training,
    grid: Grid,
    state: State,
    optimizer: torch.optim.Optimizer,
    objective: tuple[Width, ...],
    windows: np.ndarray,
    schedule: Schedule,
) -> Reading:
    """Run one optimiser step over all widths; return its numbers, unread, and advance ``state.step``."""
    began_s, model = time.perf_counter(), training.model
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(state.step, schedule) * group["factor"]
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = None
    nested = _nest(state, grid, objective)
    teachers = {bits for width in objective for bits in width.teachers}
    losses: dict[str, list[torch.Tensor]] = {}
    for part in range(schedule.accumulate):
        index = state.step * schedule.accumulate + part
        tokens = own_tokens(windows, schedule, index=index, device=model.device)
        terms = make_terms(tuple(training.counts), objective, schedule, index=index)
        found = _backward_batch(training, state, nested, terms, tokens, schedule, teachers)
        for name, loss in found.items():
            losses.setdefault(name, []).append(loss)
    _finish_gradients(training, state, nested, schedule.pull)
    _drop_frozen(state, schedule.freeze)
    norm = clip_gradients([t for _, t in state.named() if t.grad is not None], schedule.clip_norm)
    stop_unless_finite(optimizer, [norm, *itertools.chain.from_iterable(losses.values())])
    optimizer.step()
    for path, tensor in nested.items():
        keep_in_range(state.learned[path], state.masters[path], tensor)
    state.step += 1
    lr = optimizer.param_groups[0]["lr"]
    return Reading(step=state.step, began_s=began_s, lr=lr, losses=losses, gradient_norm=norm)


def finish(state: State, grid: Grid) -> Iterator[tuple[str, NestedTensor]]:
    """Yield the nested tensors of the trained masters, one at a time."""
    for path, weight in state.masters.items():
        yield path, nest(weight.detach(), grid, learned=state.learned[path], coarse=state.coarse[path], name=path)


def _nest(state: State, grid: Grid, objective: tuple[Width, ...]) -> dict[str, NestedTensor]:
    """Encode all weights, which are finite, once for this step; every width reads the same codes."""
    needed = dataclasses.replace(grid, sliced=tuple(w.bits for w in objective if w.bits in grid.sliced))
    return {
        path: nest(
            weight.detach(), needed, learned=state.learned[path], coarse=state.coarse[path], finite=True, name=path
        )
        for path, weight in state.masters.items()
    }


def _backward_batch(
    training: Training,
    state: State,
    nested: Mapping[str, NestedTensor],
    terms: Sequence[Term],
    tokens: torch.Tensor,
    schedule: Schedule,
    teachers: Collection[int],
) -> dict[str, torch.Tensor]:
    """Add the gradients of one batch for every term, in order; return the losses by the terms' names, on the device.

    tokens: int64 [B, T + 1], this process's sequences of the batch. teachers: widths whose logits are kept, without a
    graph, as targets of later terms.
    """
    model, teacher, inputs, targets = training.model, training.teacher, tokens[:, :-1], tokens[:, 1:]
    logits: dict[int, torch.Tensor] = {}
    aims: list[torch.Tensor] = []
    losses: dict[str, torch.Tensor] = {}
    chained = any(state.coarse.values()) or next(state.named_learned(), None) is not None
    with passes(model, schedule):
        if teacher is not None:
            with torch.no_grad(), layer_outputs(teacher, kept=schedule.hidden > 0) as aims:
                logits[FLOAT] = teacher(input_ids=inputs, use_cache=False).logits
        for name, width, plan in terms:
            _write(training, nested, plan)
            with layer_outputs(model, kept=schedule.hidden > 0) as hidden:
                output = model(input_ids=inputs, use_cache=False).logits
            loss = width_loss(output, targets, [logits[bits] for bits in width.teachers], truth=width.truth)
            loss = loss * (len(tokens) / schedule.batch_size)  # this process's part of the batch
            if schedule.hidden:
                loss = loss + schedule.hidden * hidden_loss(hidden, aims)
            torch.autograd.backward(loss * width.weight / schedule.accumulate)
            losses[name] = loss.detach()
            if width.bits in teachers:
                logits[width.bits] = output.detach()
            if chained:
                _chain_gradients(training, state, nested, plan)
    return losses


def _write(training: Training, nested: Mapping[str, NestedTensor], plan: Mapping[str, int]) -> None:
    """Write the weights at one plan into the model's parameters."""
    split_again(training.model)
    weights = ((path, fused.read(tensor, plan[path])) for path, tensor in nested.items())
    write_weights(training.model, training.views, weights)


def _chain_gradients(
    training: Training, state: State, nested: Mapping[str, NestedTensor], plan: Mapping[str, int]
) -> None:
    """Chain the gradients at one plan into masters, clips, scales and zero-points, weight by weight."""
    views, parameters = training.views, dict(training.model.named_parameters())
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


def _finish_gradients(training: Training, state: State, nested: Mapping[str, NestedTensor], pull: float) -> None:
    """Finish the masters' gradients: chained width by width, or, straight through, autograd's sum over all widths."""
    parameters = dict(training.model.named_parameters())
    with torch.no_grad():
        for path, view in training.views.items():
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
