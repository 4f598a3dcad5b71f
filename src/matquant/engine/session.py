"""Sessions: each has a sequence, a key/value cache and a workspace. The weights are those of the engine."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from matquant import _native
from matquant.system.arguments import check_types
from matquant.system.errors import InputError, InUseError

if TYPE_CHECKING:
    from matquant.engine.engine import Engine

CHUNK = 128  # tokens of a prompt per step
MOST_TOKENS = 2**31 - 2**10  # limit of a sequence: positions are 32-bit numbers
NOT_HELD = "a width is not held in memory"  # as native code says


class Session:
    """One sequence: the tokens in its cache, and the workspace of a step.

    It serves one thread, and one completion, at a time: InUseError for a second one. An unfinished completion is
    abandoned when the next one starts.
    """

    def __init__(self, engine: "Engine", capacity: int) -> None:
        self.engine = engine
        self.capacity = capacity
        self.ids: list[int] = []
        native = engine.model.native
        try:
            if capacity > MOST_TOKENS:
                raise MemoryError
            self._cache = _native.Cache(native, capacity, engine.exact)
            self.workspace = _native.Workspace(native, CHUNK, capacity, engine.threads)
        except MemoryError:
            raise InputError(f"not enough memory for a sequence of {capacity} tokens; use fewer") from None
        self._caches = [self._cache]
        self._logits = self.workspace.logits
        self._attempts = np.empty((0, len(self._logits)), dtype=np.float32)
        self._lock = threading.Lock()
        self._turn = 0  # changes when anyone but the current completion uses the session

    def extend(
        self, ids: Sequence[int], widths: np.ndarray, *, all_logits: bool = False, into: np.ndarray | None = None
    ) -> np.ndarray:
        """Append tokens and return the logits after the last one, float32 [vocab], or after each, [tokens, vocab].

        The next call overwrites the logits after the last one. into: write those after each here, float32 [at least
        tokens, vocab], and return that part of it.
        """
        check_types(ids=ids, widths=widths, all_logits=all_logits)
        with self._alone():
            self._turn += 1
            every = np.empty((len(ids), len(self._logits)), dtype=np.float32) if all_logits and into is None else into
            return self._extend(ids, widths, every=None if every is None else every[: len(ids)])

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out; InUseError if another thread is using the session."""
        if not self._lock.acquire(blocking=False):
            raise InUseError("this session is in use by another thread; use one session per thread")
        try:
            yield
        finally:
            self._lock.release()

    def begin(self, ids: Sequence[int], widths: np.ndarray) -> tuple[int, np.ndarray]:
        """Read the ``ids`` that are not cached yet; return the turn that ``advance`` needs, and the last logits.

        Like those of ``advance`` and ``attempt``, these are of the ids that may be chosen, float32 [choosable].
        """
        with self._alone():
            self._turn += 1
            known = self.match(ids)
            del self.ids[known:]
            return self._turn, self._extend(ids[known:], widths)[: self.engine.choosable]

    def advance(self, token: int, widths: np.ndarray, *, turn: int) -> np.ndarray:
        """Append a token of the completion that began at ``turn``; InUseError if others used the session since."""
        with self._alone():
            self._check_turn(turn)
            return self._extend([token], widths)[: self.engine.choosable]

    def attempt(self, ids: Sequence[int], widths: np.ndarray, *, ahead: int, turn: int) -> np.ndarray:
        """Return the logits after each of ``ids``, ``ahead`` places after the last token, without appending them.

        turn: as for ``advance``. The next attempt overwrites the logits.
        """
        with self._alone():
            self._check_turn(turn)
            if len(self._attempts) < len(ids):
                self._attempts = np.empty((len(ids), len(self._logits)), dtype=np.float32)
            self._step(ids, widths, at=len(self.ids) + ahead, first=0, into=self._attempts[: len(ids)])
            return self._attempts[: len(ids), : self.engine.choosable]

    def keep(self, token: int, *, turn: int) -> None:
        """Append a token whose keys and values the last ``attempt`` computed, at the widths wanted here."""
        with self._alone():
            self._check_turn(turn)
            self.ids.append(token)

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise InUseError("another completion has used this session; use one session per completion")

    def _extend(self, ids: Sequence[int], widths: np.ndarray, *, every: np.ndarray | None = None) -> np.ndarray:
        if len(self.ids) + len(ids) > self.capacity:
            raise InputError(
                f"{len(self.ids) + len(ids)} tokens exceed the session's capacity of {self.capacity}; open a larger one"
            )
        for start in range(0, len(ids), CHUNK):
            chunk = list(ids[start : start + CHUNK])
            count, held = len(chunk), len(self.ids)
            is_last = start + count == len(ids)
            first = 0 if every is not None else count - 1 if is_last else count
            rows = None if every is None else every[start : start + count]
            self._step(chunk, widths, at=held, first=first, into=rows)
            self.ids += chunk
        return self._logits if every is None else every

    def _step(self, ids: Sequence[int], widths: np.ndarray, *, at: int, first: int, into: np.ndarray | None) -> None:
        """Compute ``ids`` at positions from ``at`` on; logits from row ``first`` on go to ``into``, None: _logits."""
        model, places = self.engine.model.native, list(range(at, at + len(ids)))
        try:
            _native.step(model, widths, self.engine.exact, list(ids), places, self._caches, first, into, self.workspace)
        except ValueError as error:
            if str(error) != NOT_HELD:
                raise
            raise InputError(f"{error}: it was evicted; bring it back with Engine.add_planes") from None
        self.engine.stepped(self.workspace)

    def rewind(self, length: int) -> None:
        """Forget the tokens from ``length`` on. InputError unless ``length`` is from 0 to the number of tokens."""
        check_types(length=length)
        with self._alone():
            if not 0 <= length <= len(self.ids):
                raise InputError(
                    f"cannot rewind a session of {len(self.ids)} tokens to length={length}; use 0 to {len(self.ids)}"
                )
            self._turn += 1
            del self.ids[length:]

    def match(self, ids: Sequence[int]) -> int:
        """Return how many tokens of ``ids`` are in the cache already, at most all but one."""
        same = next((n for n, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), len(self.ids))
        return min(same, len(ids) - 1, len(self.ids))
