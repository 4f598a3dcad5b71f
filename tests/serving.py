"""What tests of the batcher share: a receiver of events, and a constraint that holds the engine thread."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import conftest
import matquant
from matquant.core.spec import Plan
from matquant.engine.sampling import Sampling
from matquant.serve.batching import Batching, start
from matquant.serve.cost import Costs
from matquant.serve.work import Event, Generation

# as a processor might be: narrower widths gain much with few rows and little with many
COSTS = Costs(
    seconds={
        8: ((1, 0.040), (4, 0.044), (8, 0.060), (16, 0.100), (32, 0.180), (128, 0.600)),
        4: ((1, 0.020), (4, 0.024), (8, 0.048), (16, 0.090)),
        2: ((1, 0.010), (4, 0.016), (8, 0.040), (16, 0.080)),
    }
)
PATIENT_S = 60.0
MODEL = Path(__file__).resolve().parents[1] / "examples" / "reference" / "model"


@functools.cache
def reference_engine(folder: Path) -> matquant.Engine:
    """The embedded model's linear layers rounded, on one thread. folder: of the session, shared by its tests."""
    return matquant.Engine(conftest.quantize(MODEL, folder / "served", method="rtn", scope="linears"), threads=1)


@contextlib.contextmanager
def starting(engine: matquant.Engine, **defaults: Any) -> Iterator[Callable[..., Batching]]:
    """start() with options, at fixed costs and without a policy by default; what it started is stopped at the end."""
    started: list[Batching] = []

    def get(**options: Any) -> Batching:
        started.append(start(engine, **{"costs": COSTS, "policy": False, **defaults, **options}))
        return started[-1]

    yield get
    for batcher in started:
        batcher.stop(0)


class Receiver:
    """Events of one generation; ``wait`` until the last one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._done = threading.Event()

    def __call__(self, events: Sequence[Event]) -> None:
        self.events += events
        if events[-1].finish is not None:
            self._done.set()

    def wait(self) -> "Receiver":
        assert self._done.wait(PATIENT_S), "no last event came"
        assert [event.finish is not None for event in self.events] == [False] * (len(self.events) - 1) + [True]
        return self

    @property
    def tokens(self) -> list[int]:
        return [event.token.token for event in self.events if event.token is not None]

    @property
    def bits(self) -> list[str]:
        return [event.bits for event in self.events if event.token is not None]

    @property
    def finish(self) -> str | None:
        return self.events[-1].finish

    @property
    def cached(self) -> int | None:
        return self.events[0].cached_tokens


def generation(ids: Sequence[int], *, bits: int | None = None, **options: Any) -> Generation:
    """A generation; bits: of a uniform plan."""
    options = {"max_tokens": 24, "sampling": Sampling(), **options}
    if bits is not None:
        options["plan"] = Plan(default=bits)
    return Generation(ids=ids, **options)


def run(batcher: Batching, *generations: Generation) -> list[Receiver]:
    """Submit generations at once and wait for all."""
    receivers = [Receiver() for _ in generations]
    for one, receiver in zip(generations, receivers, strict=True):
        batcher.submit(one, receiver)
    return [receiver.wait() for receiver in receivers]


def alone(engine: matquant.Engine, one: Generation) -> list[int]:
    """The tokens that ``Engine.stream`` gives for the same options, without the end."""
    options = {name: getattr(one.sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
    reply = engine.stream(list(one.ids), plan=one.plan, max_tokens=one.max_tokens, **options)
    "".join(reply)
    return reply.ids[len(one.ids) :]


class Gate:
    """A constraint that excludes nothing and holds the engine thread until it is opened."""

    ended = False

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()

    def mask(self, logits: np.ndarray) -> None:
        self.reached.set()
        assert self.open.wait(PATIENT_S)

    def accept(self, token: int) -> None:
        """Take a token."""
