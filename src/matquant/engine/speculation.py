"""Self-speculative decoding: a slice of the same weights drafts, the requested width verifies. The text is the same.

The drafts come from prompt lookup (``lookup.py``) or from steps at a narrower width. One step at the requested width
then computes the logits after each draft at once, which takes little longer than a single token, because the weights
are read once. Each token is chosen from those logits exactly as without drafts, with the same random number; drafts
count only as long as they equal what was chosen. So the text is equal bit for bit, greedy or sampled, whatever drafts.

Drafts are chosen with the random number that their position will use, so a sampled draft agrees more often. They read
and write the session's own key/value cache beyond its last token; verifying overwrites what they wrote. How much is
drafted, and from where, is decided by ``pace.py``.

Sources: Zhao et al., QSpec (arXiv 2410.11305), one cache for both widths; Leviathan et al. 2023 for the formula.
"""

import time
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from matquant.engine.decoder import Steps
from matquant.engine.lookup import Lookup
from matquant.engine.pace import LENGTHS, Pace, Times
from matquant.engine.sampling import Sampling, choose, confidence, pick
from matquant.system.arguments import check_types
from matquant.system.errors import InputError

DRAFT_WIDTHS = (2, 3, 4)
LEAST_SAVING = 0.85  # a draft that reads more than this share of the bytes is not worth a trial
AUTO, OFF = "auto", "off"


class Attempts(Steps, Protocol):
    """The part of a session that speculation uses."""

    def attempt(self, ids: Sequence[int], widths: np.ndarray, *, ahead: int, turn: int) -> np.ndarray:
        """Return the logits after each of ``ids``, ``ahead`` places after the last token, without appending them.

        The next attempt overwrites them.
        """

    def keep(self, token: int, *, turn: int) -> None:
        """Append a token that the last ``attempt`` computed at its place."""


class Finder(Protocol):
    """Drafts without model steps: ``Lookup``."""

    def extend(self, ids: Sequence[int]) -> None: ...

    def find(self) -> str: ...

    def propose(self, count: int) -> list[int]: ...


class Numbers:
    """The uniform numbers of a generator, in order; those to come can be looked at."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._ahead: deque[float] = deque()

    def random(self) -> float:
        """Return the next number."""
        return self._ahead.popleft() if self._ahead else self._generator.random()

    def peek(self, place: int) -> float:
        """Return the number that is ``place`` numbers after the next."""
        while len(self._ahead) <= place:
            self._ahead.append(self._generator.random())
        return self._ahead[place]


class Draft:
    """The tokens drafted for a sequence in one step, and the ``confidences`` in them, between 0 and 1.

    proposed: tokens that took no step, used unless ``source`` drafts by steps. source: where the drafts come from, ""
    for nowhere. count: the most of them. ends: tokens after which none are drafted. found: where ``proposed`` are from;
    if nothing is drafted, it is noted whether the first would have been right.
    """

    def __init__(
        self,
        pace: Pace,
        proposed: Sequence[int],
        source: str,
        count: int,
        *,
        ends: Container[int] = (),
        found: str = "",
    ) -> None:
        self.source = source
        self._by_steps = source in pace.times.drafts
        self.tokens = [] if self._by_steps else list(proposed[:count])
        self.confidences = [1.0] * len(self.tokens)
        self._pace, self._count, self._ends = pace, count, ends
        self._chance = 1.0  # that all of them are accepted
        self._watched = (found, proposed[0]) if found and proposed and not source else None

    @property
    def goes_on(self) -> bool:
        """Return whether another step is to draft a token."""
        if not self._by_steps or len(self.tokens) >= self._count:
            return False
        return not self.tokens or self._pace.goes_on(self.source, self._chance, len(self.tokens))

    def take(self, logits_V: np.ndarray, sampling: Sampling, numbers: Numbers) -> int | None:
        """Draft a token from the logits, float32 [vocab], of a step at the width that drafts, and return it.

        None if there is none: the logits are not finite at this width, and the requested one decides.
        """
        try:
            token = pick(logits_V, sampling, partial(numbers.peek, len(self.tokens)))
        except InputError:
            self.stop()
            return None
        self.tokens.append(token)
        self.confidences.append(confidence(logits_V, sampling))
        self._chance *= self._pace.chance(self.source, self.confidences[-1])
        if token in self._ends:
            self.stop()
        return token

    def stop(self) -> None:
        """Draft no more."""
        self._count = 0

    @property
    def times(self) -> Times:
        """Return what steps for the sequence take."""
        return self._pace.times

    def judge(self, accepted: int, token: int) -> None:
        """Record how many of the tokens were accepted. token: the one that was chosen after them."""
        self._pace.judged(self.source, self.confidences, accepted=accepted)
        if self._watched:
            self._pace.watched(self._watched[0], right=self._watched[1] == token)


class Speculative:
    """Yield the ids that ``StepByStep`` yields, several per step where drafts are accepted.

    widths: as for ``StepByStep``. drafts: source -> narrower widths. pace: decides how much is drafted
    from which of them. most: tokens that will be taken at most. lookup: drafts without model steps.
    """

    def __init__(
        self,
        session: Attempts,
        prompt: Sequence[int],
        *,
        widths: np.ndarray,
        sampling: Sampling,
        drafts: Mapping[str, np.ndarray],
        pace: Pace,
        most: int,
        lookup: Finder | None = None,
    ) -> None:
        self.drafted = self.accepted = self.steps = 0
        self._session = session
        self._prompt = list(prompt)
        self._widths = widths
        self._sampling = sampling
        self._drafts = drafts
        self._pace = pace
        self._most = most
        self._lookup = lookup or Lookup()
        self._numbers = Numbers(sampling.seed)
        self._started: tuple[int, np.ndarray] | None = None

    def start(self) -> None:
        """Read the prompt."""
        self._started = self._session.begin(self._prompt, self._widths)
        self._lookup.extend(self._prompt)

    def __iter__(self) -> Iterator[int]:
        """Yield ids until the session is full. Call ``start`` first."""
        assert self._started is not None, "start first"
        turn, logits = self._started
        token = choose(logits, self._sampling, self._numbers)
        yield token
        held, taken = len(self._prompt), 1  # tokens in the session; tokens yielded, of which the last is not in it
        while held < self._session.capacity:
            self._lookup.extend([token])
            room = min(self._session.capacity - held, self._most - taken) - 1
            draft = self._draft(token, room, turn=turn)
            rows = self._verify([token, *draft.tokens], turn=turn)
            accepted = 0
            for row, drafted in enumerate([*draft.tokens, None]):
                self._session.keep(token, turn=turn)
                token = choose(rows[row], self._sampling, self._numbers)
                held, taken = held + 1, taken + 1
                if token == drafted:
                    accepted += 1
                    self.accepted += 1
                yield token
                if token != drafted:
                    break
                self._lookup.extend([token])
            draft.judge(accepted, token)

    def _verify(self, ids: Sequence[int], *, turn: int) -> np.ndarray:
        """Return the logits after each of ``ids`` at the requested width."""
        began = time.perf_counter()
        logits = self._session.attempt(ids, self._widths, ahead=0, turn=turn)
        self._pace.times.spent(time.perf_counter() - began, rows=len(ids))
        self.steps += 1
        self.drafted += len(ids) - 1
        return logits

    def _draft(self, token: int, room: int, *, turn: int) -> Draft:
        """Return the tokens that may follow ``token``."""
        found = self._lookup.find() if room > 0 else ""
        source, count = self._pace.choose(found, room)
        proposed = self._lookup.propose(max(count, 1)) if found else []
        draft = Draft(self._pace, proposed, source, count, found=found)
        while draft.goes_on:
            began, ahead = time.perf_counter(), len(draft.tokens)
            last, widths = [token, *draft.tokens][-1], self._drafts[draft.source]
            logits = self._session.attempt([last], widths, ahead=ahead, turn=turn)
            draft.take(logits[0], self._sampling, self._numbers)
            self._pace.times.spent(time.perf_counter() - began, rows=1, source=draft.source)
        return draft


def check_speculate(value: str | int) -> None:
    """Raise InputError unless ``value`` is "auto", "off" or a number of tokens to draft."""
    check_types(speculate=value)
    if value not in (AUTO, OFF, *range(1, max(LENGTHS) + 1)):
        raise InputError(
            f"speculate={value!r} is not known; use {AUTO!r}, {OFF!r} or a number of tokens to draft "
            f"from 1 to {max(LENGTHS)}"
        )


def narrower(candidates: Mapping[str, np.ndarray], widths: np.ndarray) -> dict[str, np.ndarray]:
    """Return the candidates, nowhere wider than ``widths``, that differ from it."""
    cut = {name: np.minimum(candidate, widths) for name, candidate in candidates.items()}
    return {name: candidate for name, candidate in cut.items() if (candidate != widths).any()}
