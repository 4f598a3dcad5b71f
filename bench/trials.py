"""Candidates of joint training that are not in the library: each changes functions of qat while a cell is made.

A trial is a context manager; what it yields is called with the model that is evaluated (bench/quality.py, Cell.trial).
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from matquant.hf_torch.views import write_weights
from matquant.methods import qat
from matquant.methods.parts import forward, training
from matquant.methods.parts.masters import encode_masters

Ready = Callable[[Any], None]
Trial = Callable[[], contextlib.AbstractContextManager[Ready]]


@contextlib.contextmanager
def sampled() -> Iterator[Ready]:
    """Each step trains the widest, the narrowest and one width between (the sandwich rule of slimmable networks)."""
    terms_of, finish = qat._terms, qat._finish_gradients

    def terms(paths: Any, objective: Any, schedule: Any, *, index: int) -> Any:
        widest, *between, narrowest = terms_of(paths, objective, schedule, index=index)
        return [widest, between[np.random.default_rng([schedule.seed, index, 2]).integers(len(between))], narrowest]

    def finish_all(model: Any, views: Any, state: Any, nested: Any, pull: float) -> None:
        for master in itertools.chain.from_iterable(coarse.values() for coarse in state.coarse.values()):
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad
        finish(model, views, state, nested, pull)

    with patch.multiple(qat, _terms=terms, _finish_gradients=finish_all):
        yield _nothing


@contextlib.contextmanager
def scheduled() -> Iterator[Ready]:
    """The weight of all but the narrowest width rises from a tenth to the whole over the run."""
    terms_of = qat._terms

    def terms(paths: Any, objective: Any, schedule: Any, *, index: int) -> Any:
        *wide, narrowest = terms_of(paths, objective, schedule, index=index)
        share = 0.1 + 0.9 * index / schedule.steps
        rising = [(n, dataclasses.replace(width, weight=share * width.weight), plan) for n, width, plan in wide]
        return [*rising, narrowest]

    with patch.object(qat, "_terms", terms):
        yield _nothing


@contextlib.contextmanager
def surgery() -> Iterator[Ready]:
    """A held back gradient goes to a narrower master only where that one's own gradient has the same sign."""

    def release(masters: Mapping[int, torch.Tensor], nested: Any, *, pull: float) -> None:
        _, blocked = encode_masters(masters, nested)
        for bits, narrower in itertools.pairwise(sorted(masters, reverse=True)):
            gradient, below = masters[bits].grad, masters[narrower].grad
            assert gradient is not None
            assert below is not None
            held = (gradient * blocked[bits]) < 0
            below.add_(torch.where(held & (gradient * below >= 0), gradient, 0.0), alpha=pull)
            gradient.masked_fill_(held, 0.0)

    with patch.object(qat, "release_blocked", release):
        yield _nothing


@contextlib.contextmanager
def norm_gains() -> Iterator[Ready]:
    """Every width has norm weights of its own, trained with the rest; they are not in the checkpoint."""
    gains: dict[int, dict[str, torch.Tensor]] = {}
    coming: list[int] = []  # widths of the losses of this batch that are still to be taken
    start, make_optimizer, prepare = training.start, training.make_optimizer, forward.prepare
    terms_of, chain = qat._terms, qat._chain_gradients

    def started(model: Any, *arguments: Any, trained: Any, **options: Any) -> Any:
        norms = {name: p.detach() for name, p in model.named_parameters() if "norm" in name}
        gains.update({bits: {n: p.clone().requires_grad_(True) for n, p in norms.items()} for bits in trained})
        return start(model, *arguments, trained=trained, **options)

    def optimizer(state: Any, schedule: Any) -> Any:
        made = make_optimizer(state, schedule)
        own = [p for norms in gains.values() for p in norms.values()]
        made.add_param_group({"params": own, "factor": 1.0, "weight_decay": 0.0})
        return made

    def prepared(model: Any, views: Any, schedule: Any) -> None:
        prepare(model, views, schedule)
        for name in next(iter(gains.values())):
            model.get_parameter(name).requires_grad_(True)

    def terms(*arguments: Any, **options: Any) -> Any:
        found = terms_of(*arguments, **options)
        coming[:] = [width.bits for _, width, _ in found]
        return found

    def written(model: Any, *arguments: Any) -> None:
        write_weights(model, *arguments)
        _set_norms(model, gains[coming.pop(0)])

    def chained(model: Any, views: Any, state: Any, nested: Any, plan: Mapping[str, int]) -> None:
        chain(model, views, state, nested, plan)
        for name, gain in gains[next(iter(plan.values()))].items():
            parameter = model.get_parameter(name)
            gain.grad, parameter.grad = parameter.grad, None

    def ready(served: Any) -> None:
        set_bits = served.set_bits

        def set_all(bits: int) -> None:
            set_bits(bits)
            _set_norms(served, gains[bits if bits in gains else max(gains)])

        served.set_bits = set_all

    with patch.multiple(
        qat,
        start=started,
        make_optimizer=optimizer,
        prepare=prepared,
        _terms=terms,
        write_weights=written,
        _chain_gradients=chained,
    ):
        yield ready


@torch.no_grad()
def _set_norms(model: Any, values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        model.get_parameter(name).copy_(value)


def _nothing(served: Any) -> None:
    """Most trials change training alone."""


@contextlib.contextmanager
def unchanged() -> Iterator[Ready]:
    """The library as it is."""
    yield _nothing
