"""A batcher for tests of the server: one thread, one generation after another, with the engine's sessions and numpy."""

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matquant.engine.engine import Engine
from matquant.engine.sampling import choose
from matquant.serve.work import Deliver, Event, Generation, Refused, Scored


class Handle:
    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.ended = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class OneByOne:
    """``Batcher`` of serve/work.py. most: generations that may be admitted at once. automatic: bits without a plan."""

    def __init__(self, engine: Engine, *, most: int = 512, automatic: Sequence[int] | None = None) -> None:
        self.engine, self.most, self.automatic = engine, most, automatic or [engine.max_bits]
        self.seen: list[Generation] = []
        self.handles: list[Handle] = []
        self.delay_s, self.capacity = 0.0, 512
        self.failure = ""
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped, self._abort = False, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, generation: Generation, deliver: Deliver) -> Handle:
        if self._stopped:
            raise Refused("the server is stopping", retry_after_s=5)
        if sum(not handle.ended.is_set() for handle in self.handles) >= self.most:
            raise Refused("too many", retry_after_s=2, limit="max_num_queued_reqs")
        handle = Handle()
        self.seen.append(generation)
        self.handles.append(handle)
        self._queue.put((generation, deliver, handle))
        return handle

    def stats(self) -> Mapping[str, float]:
        waiting = sum(not handle.ended.is_set() for handle in self.handles)
        return {"running": float(waiting), "waiting": 0.0, "steps": 1.0}

    def stop(self, drain_s: float) -> None:
        self._stopped = True
        for handle in self.handles:
            if not handle.ended.wait(drain_s):
                self._abort.set()
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            generation, deliver, handle = entry
            try:
                if self.failure:
                    raise ValueError(self.failure)
                self._generate(generation, deliver, handle)
            except Exception as error:
                deliver([Event(finish="error", reason=str(error))])
            handle.ended.set()

    def _generate(self, generation: Generation, deliver: Deliver, handle: Handle) -> None:
        ids = list(generation.ids)
        session = self.engine.session(len(ids) + generation.max_tokens + 1)
        generator = np.random.default_rng(generation.sampling.seed)
        count, constraint = generation.logprobs, generation.constraint
        bits = self.automatic[0] if generation.plan is None else (generation.plan.default or 8)
        widths = self.engine.widths(bits) if generation.plan is None else self.engine.widths(plan=generation.plan)
        if generation.prompt_logprobs:
            every = session.extend(ids, widths, all_logits=True)
            prompt, reach = [Scored(token=ids[0])], self.engine.choosable
            prompt += [score(row, token, count, reach) for row, token in zip(every, ids[1:], strict=False)]
            deliver([Event(prompt=tuple(prompt), cached_tokens=0)])
            logits = every[-1]
        else:
            logits = session.extend(ids, widths)
        for number in range(generation.max_tokens):
            if handle.cancelled.wait(self.delay_s) or self._abort.is_set():
                deliver([Event(finish="abort")])
                return
            logits = np.array(logits, dtype=np.float32)
            new = ids[len(generation.ids) :]
            penalise(logits, generation, ids, new)
            if number < generation.min_tokens:
                logits[list(generation.ends)] = -np.inf
            if constraint is not None:
                constraint.mask(logits)
            token = choose(logits[: self.engine.choosable], generation.sampling, generator)
            ends = token in generation.ends
            if constraint is not None and not ends:
                constraint.accept(token)
            ids.append(token)
            done = ends or (constraint is not None and constraint.ended)
            finish = "stop" if done else "length" if number + 1 == generation.max_tokens else None
            scored = score(logits, token, count, self.engine.choosable)
            deliver([Event(token=scored, bits=str(bits), cached_tokens=0, finish=finish)])
            if finish:
                return
            if generation.plan is None:
                bits = self.automatic[min(number + 1, len(self.automatic) - 1)]
                widths = self.engine.widths(bits)
            logits = session.extend([token], widths)
        deliver([Event(finish="length")])


def penalise(logits: np.ndarray, generation: Generation, ids: Sequence[int], new: Sequence[int]) -> None:
    """Repetition penalty over all tokens, presence and frequency over the new ones, then the bias. In place."""
    seen = np.unique(np.array(ids))
    logits[seen] = np.where(
        logits[seen] > 0, logits[seen] / generation.repetition_penalty, logits[seen] * generation.repetition_penalty
    )
    for token in set(new):
        logits[token] -= generation.presence_penalty + generation.frequency_penalty * new.count(token)
    for token, bias in generation.logit_bias.items():
        logits[token] += bias


def score(logits: np.ndarray, token: int, count: int | None, choosable: int) -> Scored:
    """The token with its log-probability and the ``count`` most probable tokens that have text (at least the first)."""
    if count is None:
        return Scored(token=token)
    exact = logits.astype(np.float64)
    values = exact - exact.max()
    values -= np.log(np.exp(values).sum())
    order = np.argsort(-values[:choosable], kind="stable")[: max(count, 1)]
    return Scored(
        token=token, logprob=float(values[token]), top=tuple((int(t), float(values[t])) for t in order)[: max(count, 1)]
    )
