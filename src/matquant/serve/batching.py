"""The engine side of the server: one thread that makes every native call, for all requests at once.

Each turn of its loop ends what was cancelled, admits waiting requests while a place and the memory of keys and
values are free, lets the policy look at the load, builds a step (scheduling.py), runs it (stepping.py) and delivers
events. A sequence's text does not depend on what else runs: logits of a row do not depend on the other rows of a step,
and every sequence has a random generator of its seed.

``start(engine, **limits)`` returns a running Batcher (work.py). ``submit``, ``stats`` and ``stop`` may be called from
any thread. After an error in the thread itself every request ends with "error", ``failure`` says why, and nothing more
is admitted.
"""

import atexit
import threading
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from matquant.core.spec import Plan
from matquant.engine.engine import Engine
from matquant.engine.speculation import OFF
from matquant.serve.admission import Limits, available_bytes, cache_bytes, candidates, resolve_kv_bytes
from matquant.serve.cost import Costs, drafting, measure
from matquant.serve.drafting import Drafter
from matquant.serve.policy import Load, Policy, counted
from matquant.serve.scheduling import Piece, fill_panels, next_chunks
from matquant.serve.slots import Slot, Width, at_least, make_width
from matquant.serve.stepping import Stepper, now_s
from matquant.serve.work import Deliver, Generation, Refused
from matquant.system.errors import InputError

IDLE_S = 0.5  # how often an idle loop looks whether the width may rise
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 120.0
SMOOTHING = 0.2  # weight of the newest request in the mean duration
# limits, and what vLLM calls refusals for them
REFUSALS = {"max_queued_requests": "max_num_queued_reqs", "max_queued_tokens": "max_num_queued_tokens"}

Force = Callable[[Generation, int], int]  # generation, number of the new token -> its width


class Admitted:
    """A generation that was admitted."""

    def __init__(self, slot: Slot, wake: Callable[[], None]) -> None:
        self._slot = slot
        self._wake = wake

    def cancel(self) -> None:
        """Stop it; its rows are gone within two steps, and one event with finish "abort" follows."""
        self._slot.cancelled = True
        self._wake()


class Batching:
    """A Batcher. force: widths of sequences that the policy would choose for, to replay a trace; None: the policy."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        *,
        costs: Costs | None = None,
        force: Force | None = None,
        note: Callable[[str], None] | None = None,
        clock: Callable[[], float] = now_s,
    ) -> None:
        self.engine = engine
        self.limits = limits
        self.capacity = limits.max_num_seqs + limits.max_queued_requests
        self.failure: str | None = None
        self.kv_bytes = resolve_kv_bytes(engine, limits, available=available_bytes())
        self._context_bytes = cache_bytes(engine, engine.context)
        self._clock, self._force, self._note = clock, force, note or (lambda text: None)
        self._stepper = Stepper(engine, rows=limits.rows, choosing=limits.max_num_seqs, clock=clock)
        widths = candidates(engine, limits)
        self._widths: dict[int, Width] = {}
        measured = widths if limits.speculate == OFF else drafting(widths, engine)
        self.widen(costs or measure(engine, measured, most_rows=limits.rows))
        self._changed = threading.Condition(threading.RLock())
        self._waiting: list[Slot] = []
        self._running: list[Slot] = []
        self._work: list[Callable[[], None]] = []
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._number = 0
        self._mean_s: float | None = None  # of a request, from its admission
        self._draining = self._halting = False
        self._thread = threading.Thread(target=self._loop, name="matquant-engine", daemon=True)
        self._thread.start()
        atexit.register(self.stop, 0)  # a process may end without stop()

    # ------------------------------------------------------------------------------------------------- any thread

    def submit(self, generation: Generation, deliver: Deliver) -> Admitted:
        """Admit a generation; its events go to ``deliver``.

        Refused if a limit is reached or nothing more is admitted; InputError for a generation that can never run.
        """
        slot = Slot(self.engine, generation, deliver, number=0, clock=self._clock)
        if slot.bytes > self.kv_bytes:
            raise InputError(
                f"{slot.capacity} tokens (prompt and max_tokens) need {slot.bytes} bytes of keys and values, and the "
                f"server has {self.kv_bytes}; use fewer tokens or a larger kv_bytes"
            )
        if slot.fixed is not None and self.limits.prefill_bits is not None and not generation.prompt_logprobs:
            slot.prefill = at_least(slot.fixed, self._uniform(min(self.limits.prefill_bits, self.engine.max_bits)))
        with self._changed:
            self._check_room(slot)
            slot.number = self._number
            self._number += 1
            insort(self._waiting, slot, key=lambda waiting: waiting.order)
            self._changed.notify_all()
        return Admitted(slot, self._wake)

    def _check_room(self, slot: Slot) -> None:
        if self.failure is not None:
            raise Refused(f"the engine has stopped: {self.failure}", retry_after_s=MOST_RETRY_S)
        if self._draining:
            raise Refused("the server is stopping", retry_after_s=self._retry_s())
        places = max(0, self.limits.max_num_seqs - len(self._running))
        queued = [waiting for waiting in self._waiting if not waiting.cancelled]
        tokens = sum(len(waiting.prompt) for waiting in queued[places:])  # the others are about to start
        for name, is_full in {
            "max_queued_requests": len(queued) >= self.limits.max_queued_requests + places,
            "max_queued_tokens": len(queued) > places and tokens + len(slot.prompt) > self.limits.max_queued_tokens,
        }.items():
            if is_full:
                self._counts[f"rejections/{name}"] += 1
                raise Refused(
                    f"{len(queued)} requests with {tokens} tokens are waiting, as many as {name} allows",
                    retry_after_s=self._retry_s(),
                    limit=REFUSALS[name],
                )

    def _retry_s(self) -> float:
        """Return when a place in the queue may be free: the mean duration of a request, for those that wait."""
        turns = (len(self._waiting) + 1) / self.limits.max_num_seqs
        return min(max((self._mean_s or 0.0) * turns, LEAST_RETRY_S), MOST_RETRY_S)

    def stats(self) -> Mapping[str, float]:
        """Return counters and gauges; "generation_tokens/8" is the part of generation_tokens at int8, and so on."""
        with self._changed:
            running, waiting = list(self._running), list(self._waiting)
            counts = dict(self._counts) | dict(self._stepper.counts)
        now = self._clock()
        reserved = sum(slot.bytes for slot in running)
        prefixes = self._stepper.prefixes
        return {
            **counts,
            "running": len(running),
            "waiting": len(waiting),
            "deferred": sum(slot.cached_tokens is None for slot in running),  # until a prompt like theirs has been read
            "oldest_wait_s": max((now - slot.arrived_s for slot in waiting), default=0.0),
            "kv_bytes": reserved + prefixes.bytes,
            "kv_bytes_reserved": reserved,
            "kv_bytes_limit": self.kv_bytes,
            "kv_tokens_limit": self.kv_bytes * self.engine.context // self._context_bytes,
            "kv_contexts_limit": self.kv_bytes / self._context_bytes,
            "prefixes": len(prefixes),
            "caches": len(prefixes) + sum(slot.cache is not None for slot in running),
            "bits": self.policy.bits,
            "width_rejected": self.policy.rejected,
            "width_correction": self.policy.correction,
            "failed": float(self.failure is not None),
            **(self.engine.residency.stats() if self.engine.residency is not None else {}),
        }

    def stop(self, drain_s: float) -> None:
        """Admit nothing more, wait up to ``drain_s`` seconds for what was admitted, end the rest with "abort"."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
        self._thread.join(max(0.0, drain_s))
        with self._changed:
            self._halting = True
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.stop)

    def between(self, work: Callable[[], None]) -> None:
        """Let the engine thread call ``work`` between two steps; it must not raise."""
        with self._changed:
            self._work.append(work)
            self._changed.notify_all()

    def widen(self, costs: Costs) -> None:
        """Choose from all widths that the engine holds by now, by these costs. In the engine thread only."""
        limits, widths = self.limits, candidates(self.engine, self.limits)
        self.costs = costs
        self.policy = Policy(costs, widths, latency_s=limits.latency_s, wait_s=limits.wait_s)
        self._drafter: Drafter | None = None
        if limits.speculate != OFF:
            speculate, rows = limits.speculate, limits.rows
            self._drafter = Drafter(self._stepper, costs, speculate=speculate, rows=rows, clock=self._clock)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------ the engine thread

    def _loop(self) -> None:
        ending = "abort", ""
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            self._note(f"the engine has stopped: {self.failure}")
            ending = "error", f"the engine has stopped: {self.failure}"
        with self._changed:
            self._draining = True
            left = self._running + self._waiting
            self._running, self._waiting = [], []
        for slot in left:
            slot.finish(*ending)
            self._retire(slot, broken=True)
        self._stepper.prefixes.shrink(0)

    def _turn(self) -> bool:
        """Run one step; return whether there is another."""
        if not self._admit():
            return False
        for slot in self._running:
            if slot.cancelled:
                slot.finish("abort")
        self._retire_finished()
        if self._running:
            self._step()
            self._retire_finished()
        else:
            self._look(Load(now_s=self._clock()))
        return True

    def _admit(self) -> bool:
        """Wait for work and move what fits from the queue to the running; False at the end."""
        with self._changed:
            while not (self._waiting or self._running or self._halting or self._draining or self._work):
                if not self._changed.wait(None if self.policy.bits == self.policy.widths[0] else IDLE_S):
                    return True
            if self._halting or not (self._waiting or self._running or self._work):
                return False
            work, self._work = self._work, []
            gone = [slot for slot in self._waiting if slot.cancelled]
            self._waiting = [slot for slot in self._waiting if not slot.cancelled]
            free = self.kv_bytes - sum(slot.bytes for slot in self._running)
            while self._waiting and len(self._running) < self.limits.max_num_seqs and self._waiting[0].bytes <= free:
                slot = self._waiting.pop(0)
                free -= slot.bytes
                slot.admitted_s = self._clock()
                self._counts["queue_s"] += slot.admitted_s - slot.arrived_s
                self._counts["admitted"] += 1
                self._running.append(slot)
        self._stepper.prefixes.shrink(free)
        for change in work:
            change()
        for slot in gone:
            slot.finish("abort")
            self._retire(slot, broken=True)
        return True

    def _step(self) -> None:
        decoding: list[Slot] = []
        reading: list[Slot] = []
        for slot in self._running:
            (reading if slot.cached_tokens is None or slot.is_reading else decoding).append(slot)
        chunks = self._chunks(sorted(reading, key=lambda slot: slot.order), self._load(decoding)) if reading else []
        drafts = bool(self._drafter and not chunks and self._drafter.room(len(decoding)))
        load = self._load(decoding, prompt_rows=sum(piece.stop - piece.start for piece in chunks), drafts=drafts)
        self._look(load)
        pieces = [Piece(slot=s, start=s.read, stop=s.read + 1, width=self._width(s)) for s in decoding]
        began, before = self._clock(), self._stepper.counts["generation_tokens"]
        if not chunks:
            pieces = self._draft(pieces)
        native_s, choosing_s = self._stepper.step([*pieces, *chunks], reason=self.policy.reason)
        if all(piece.stop - piece.start == 1 for piece in pieces):  # the table is of steps without drafts
            self.policy.learn(load, native_s=native_s, choosing_s=choosing_s)
        if drafts:
            tokens = int(self._stepper.counts["generation_tokens"] - before)
            self.policy.learn_drafts(load, step_s=self._clock() - began, tokens=tokens)
        self._counts["steps"] += 1
        for piece in (*pieces, *chunks):
            self._send(piece.slot)

    def _chunks(self, reading: Sequence[Slot], load: Load) -> list[Piece]:
        """Return the pieces of prompts that the next step reads, of the first slots first. load: without them."""
        return next_chunks(
            reading,
            reading=self._reading,
            rows=self._prompt_rows(load, self._reading(reading[0])[0].bits),
            vocab=self.engine.model.architecture.vocab,
            begin=lambda slot, width: self._stepper.begin(slot, width, self._running),
        )

    def _draft(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces, each of one row, with what is to be verified behind them."""
        room = self._drafter.room(len(pieces)) if self._drafter else 0
        if not room or not self._drafter:
            return pieces
        return self._drafter.draft(pieces, [self._room(piece.slot, room) for piece in pieces])

    def _room(self, slot: Slot, most: int) -> int:
        """Return how many tokens, at most ``most``, are of use after the next one and have its width."""
        most = min(most, slot.most - slot.new - 1)
        if slot.fixed is not None or self._force is None:
            return most
        bits = [self._force(slot.generation, slot.new + place) for place in range(most + 1)]
        return len(list(takewhile(lambda width: width == bits[0], bits))) - 1

    def _load(self, decoding: Sequence[Slot], *, prompt_rows: int = 0, drafts: bool = False) -> Load:
        now, oldest = self._clock(), 0.0
        if self._waiting:
            with self._changed:
                oldest = max((now - slot.arrived_s for slot in self._waiting), default=0.0)
        auto = [slot.least_bits for slot in decoding if slot.fixed is None]
        fixed = counted(slot.fixed.bits for slot in decoding if slot.fixed is not None)
        return Load(now_s=now, auto=auto, fixed=fixed, prompt_rows=prompt_rows, oldest_wait_s=oldest, drafts=drafts)

    def _prompt_rows(self, load: Load, bits: int) -> int:
        """Return how many rows of prompts the next step may have. bits: of the first ones."""
        most = self.limits.rows - load.decoding
        rows = min(self.limits.chunk, most) if load.decoding else most
        rows = self.policy.prompt_rows(load, rows) if self.limits.policy else rows
        beside = counted(map(self.policy.bits_for, load.auto), load.fixed).get(bits, 0)
        return min(fill_panels(rows, beside=beside, exact=self.engine.exact), most)

    def _look(self, load: Load) -> None:
        """Let the policy look at the load."""
        if not self.limits.policy or self._force is not None:
            return
        change = self.policy.observe(load)
        if change is not None:
            self._counts[f"width_changes/{change.direction}/{change.cause}"] += 1
            self._note(change.reason)

    def _reading(self, slot: Slot) -> tuple[Width, int]:
        """Return the width at which the next tokens of a prompt are read, and where they stop."""
        last = len(slot.prompt) - 1
        if slot.prefill is not None and slot.read < last:
            return slot.prefill, last
        return slot.fixed or self._uniform(max(self.policy.widths[0], slot.least_bits)), len(slot.prompt)

    def _width(self, slot: Slot) -> Width:
        """Return the width at which a decoding slot's next token is chosen."""
        if slot.fixed is not None:
            return slot.fixed
        if self._force is not None:
            return self._uniform(self._force(slot.generation, slot.new))
        return self._uniform(self.policy.bits_for(slot.least_bits))

    def _uniform(self, bits: int) -> Width:
        if bits not in self._widths:
            self._widths[bits] = make_width(self.engine, Plan(default=bits))
        return self._widths[bits]

    # ------------------------------------------------------------------------------------------------ what has ended

    def _retire_finished(self) -> None:
        ended = [slot for slot in self._running if slot.finished]
        if ended:
            with self._changed:
                self._running = [slot for slot in self._running if not slot.finished]
            for slot in ended:
                self._retire(slot, broken=slot.ending == "error")

    def _retire(self, slot: Slot, *, broken: bool) -> None:
        """Deliver the last events of a slot that has left the queue or the running, and keep its prefix."""
        self._send(slot)
        self._counts[f"finished/{slot.ending}"] += 1
        spent_s = self._clock() - slot.admitted_s
        if slot.ending in ("stop", "length"):
            mean = spent_s if self._mean_s is None else self._mean_s
            self._mean_s = mean + SMOOTHING * (spent_s - mean)
        free = self.kv_bytes - sum(running.bytes for running in self._running)
        self._stepper.release(slot, limit=free, broken=broken)

    def _send(self, slot: Slot) -> None:
        """Deliver a slot's events; if that fails, the slot ends."""
        try:
            slot.send()
        except Exception as error:
            self._note(f"events could not be delivered: {type(error).__name__}: {error}")
            slot.cancelled = True


def start(
    engine: Engine,
    *,
    costs: Costs | None = None,
    force: Force | None = None,
    note: Callable[[str], None] | None = None,
    **limits: Any,
) -> Batching:
    """Measure the cost table (about 2 s, unless ``costs`` are given) and return a running Batcher.

    limits: fields of ``admission.Limits``. note: is given a line of text about every change of width. force: the width
    of each token of sequences without a plan but the first, instead of the policy, to replay a trace.
    """
    return Batching(engine, Limits(**limits), costs=costs, force=force, note=note)
