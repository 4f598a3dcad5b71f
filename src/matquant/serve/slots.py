"""A sequence that waits or runs: its tokens, its cache, and what choosing its next token needs.

Only the engine thread changes a slot, except for ``cancelled``, which any thread may set.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from matquant import _native
from matquant.core.spec import Plan
from matquant.engine.engine import Engine
from matquant.engine.lookup import Lookup
from matquant.engine.pace import Pace
from matquant.engine.sampling import choose
from matquant.engine.speculation import Numbers
from matquant.serve.admission import cache_bytes, check_prompt
from matquant.serve.logits import Penalties, adjust, score
from matquant.serve.prefixes import SHORTEST, Mark, Prefix, add_mark
from matquant.serve.work import Deliver, Event, Generation, Scored
from matquant.system.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Width:
    """A width of a step: of every matrix, uint8, the bytes of these, a label, and the uniform width it costs like."""

    table: np.ndarray
    key: bytes
    label: str
    bits: int


def make_width(engine: Engine, plan: Plan) -> Width:
    """Return the width of a plan. A plan that names paths is labelled "plan"; it costs like its mean, rounded up."""
    table = engine.widths(plan=plan)
    label, bits = str(plan.default), plan.default
    if plan.bits or bits is None:
        planes = [
            engine.model.weights[path].planes if path in engine.model.weights else None for path in engine.model.paths
        ]
        sizes = [0 if held is None else held.rows * held.columns for held in planes]
        label, bits = "plan", math.ceil(np.average(table, weights=sizes))
    return Width(table=table, key=table.tobytes(), label=label, bits=bits)


def at_least(width: Width, other: Width) -> Width | None:
    """Return the width of which each matrix is as wide as in both; None if that is ``width``."""
    table = np.maximum(width.table, other.table)
    if (table == width.table).all():
        return None
    return Width(table=table, key=table.tobytes(), label=other.label, bits=max(width.bits, other.bits))


class Slot:
    """One generation. fixed: its width, None if the policy chooses. InputError for a generation that cannot run.

    prefill: a wider width at which its prompt is read, all but the last token; None: that at which it is served.
    """

    def __init__(
        self, engine: Engine, generation: Generation, deliver: Deliver, *, number: int, clock: Callable[[], float]
    ) -> None:
        vocab = engine.model.architecture.vocab
        check_prompt(generation.ids, context=engine.context, vocab=vocab)
        if generation.max_tokens < (0 if generation.prompt_logprobs else 1):
            raise InputError(f"max_tokens={generation.max_tokens}; give a number of at least 1")
        self.generation = generation
        self.number = number
        self.arrived_s = self.admitted_s = clock()
        self.fixed = None if generation.plan is None else make_width(engine, generation.plan)
        self.least_bits = min(generation.least_bits, engine.max_bits)
        self.prefill: Width | None = None
        self.prompt = np.asarray(generation.ids, dtype=np.int32)
        self.ids = [int(token) for token in generation.ids]
        # the last token is never read, so it takes no room
        self.most = min(generation.max_tokens, engine.context - len(self.ids) + 1)
        self.capacity = min(engine.context, len(self.ids) + generation.max_tokens)
        self.bytes = cache_bytes(engine, self.capacity)
        self.cache: _native.Cache | None = None
        self.read = 0  # tokens whose keys and values are in the cache
        self.reached = 0  # tokens that the cache has held, rejected drafts included
        self.reads: Width | None = None  # that of its prompt; None: it has not been begun
        self.marks: list[Mark] = []
        self.cached_tokens: int | None = None  # None: the prompt has not been begun
        self.cancelled = False
        self.ending = ""  # "stop", "length", "abort" or "error"; "": it goes on
        self.numbers = Numbers(generation.sampling.seed)
        self.choosable = engine.choosable
        self.penalties = Penalties(generation, vocab)
        self.lookup = Lookup()  # for drafts; it may be behind
        self.paces: dict[bytes, Pace] = {}  # how often drafts are accepted, by the key of a width
        self._deliver = deliver
        self._clock = clock
        self._events: list[Event] = []
        self._label = ""  # the width that chose the last token
        self._told = False  # how it began
        self._prompt_scores: list[Scored] = [Scored(token=self.ids[0])] if generation.prompt_logprobs else []

    @property
    def order(self) -> tuple[int, int]:
        """Return the place in the queue: higher priority first, then first come."""
        return -self.generation.priority, self.number

    @property
    def new(self) -> int:
        """Return the number of new tokens."""
        return len(self.ids) - len(self.prompt)

    @property
    def finished(self) -> bool:
        """Return whether the last event has been noted."""
        return self.ending != ""

    @property
    def is_reading(self) -> bool:
        """Return whether part of the prompt is to be read; otherwise one new token is."""
        return self.read < len(self.prompt)

    # ------------------------------------------------------------------------------------------------- the engine's

    def begin(self, cache: _native.Cache, source: _native.Cache | None, length: int, width: Width) -> None:
        """Begin to read the prompt in an empty cache, with ``length`` tokens copied from another."""
        self.cache, self.reads, self.read, self.cached_tokens = cache, width, length, length
        if source is not None and length:
            cache.copy_prefix(source, length)
            add_mark(self.marks, length, width.key)

    def advance(self, stop: int, table: bytes) -> None:
        """Note that the tokens before ``stop`` have been read."""
        self.read = stop
        add_mark(self.marks, stop, table)

    def score_prompt(self, start: int, logits_TV: np.ndarray) -> None:
        """Score the tokens of the prompt that follow those at ``start``, ``start`` + 1, ..."""
        for place, logits_V in enumerate(logits_TV, start + 1):
            if place < len(self.prompt):
                token, top = self.ids[place], self.generation.logprobs or 0
                self._prompt_scores.append(score(logits_V, token, top, choosable=self.choosable))

    def choose(self, logits_V: np.ndarray, *, label: str, reason: str, drafts: Sequence[int] = ()) -> bool:
        """Choose the next token from its logits, which are changed, and note the event.

        label: the width that computed them. reason: why the policy chose it, of use if it differs from the last one's.
        drafts: tokens that may come next. Returns whether the first of them came.
        """
        generation = self.generation
        if self._prompt_scores:
            self._events.append(Event(prompt=tuple(self._prompt_scores), **self._beginning()))
            self._prompt_scores.clear()
        if not self.most:
            self.finish("length")
            return False
        adjust(logits_V, generation, self.penalties, new=self.new)
        token = choose(logits_V[: self.choosable], generation.sampling, self.numbers)
        scored = Scored(token=token)
        if generation.logprobs is not None:
            scored = score(logits_V, token, generation.logprobs, choosable=self.choosable)
        self.penalties.take(token)
        self.ids.append(token)
        if generation.constraint is not None and token not in generation.ends:
            generation.constraint.accept(token)
        ended = token in generation.ends or (generation.constraint is not None and generation.constraint.ended)
        finish = "stop" if ended else "length" if self.new == self.most else None
        changed = self._label not in ("", label)
        self._label = label
        self.ending = finish or ""
        accepted = token in drafts[:1]
        self._events.append(
            Event(
                token=scored,
                bits=label,
                finish=finish,
                reason=reason if changed else "",
                accepted=int(accepted),
                rejected=0 if accepted and finish is None else len(drafts) - accepted,
                **self._beginning(),
            )
        )
        return accepted

    def _beginning(self) -> dict[str, Any]:
        """Return the fields of the first event, once."""
        if self._told:
            return {}
        self._told = True
        assert self.reads is not None, "begin first"
        prompt_bits = None if self._label in ("", self.reads.label) else int(self.reads.label)
        times = {"queue_s": self.admitted_s - self.arrived_s, "prompt_s": self._clock() - self.admitted_s}
        return {"cached_tokens": self.cached_tokens, "prompt_bits": prompt_bits, **times}

    def finish(self, finish: str, reason: str = "") -> None:
        """End, unless it has ended."""
        if not self.finished:
            self.ending = finish
            self._events.append(Event(finish=finish, reason=reason))

    def send(self) -> None:
        """Deliver the events noted since the last call."""
        events, self._events = self._events, []
        if events:
            self._deliver(events)

    def prefix(self) -> Prefix | None:
        """Return what later requests may copy, and leave the cache to it; None if that is too short."""
        cache, self.cache = self.cache, None
        if cache is None or self.read < SHORTEST:
            return None
        ids = np.asarray(self.ids[: self.read], dtype=np.int32)
        return Prefix(ids=ids, marks=tuple(self.marks), cache=cache, bytes=cache.bytes_in_use(self.reached))
