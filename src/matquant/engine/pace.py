"""Decide how many tokens to draft, and from where, by measured costs and measured acceptance.

A draft of K tokens of which each is accepted with probability a, given that those before it were, yields

    E = 1 + a + a^2 + ... + a^K tokens in K * draft_s + verify_s(K + 1) seconds.

The choice is the source and the K with the most tokens per second; K = 0 if none beats a plain step by GAIN. Acceptance
is a running mean per source. A time is the least of the last few measured, because other programs can only lengthen it.
Both start from guesses that favour a trial. Every PROBE tokens there is a plain step, and the source that was not used
for longest is tried again at K = 1.

The choice depends on clocks. The text does not depend on the choice.
"""

import time
from bisect import bisect
from collections.abc import Mapping, Sequence

LENGTHS = (1, 3, 7)  # with the token before them 2, 4 or 8 rows, which is what a kernel computes at once
PANELS = (1, 2, 4, 8)  # rows of a step that cost the same as fewer ones
STEP = {1: 1.0, 2: 1.05, 4: 1.15, 8: 1.4}  # first guess of a step with these rows, relative to one row
PROBE = 64  # tokens
GAIN = 1.1
PRIOR = {"int2": 0.55, "int3": 0.7, "int4": 0.8, "lookup2": 0.5, "lookup3": 0.7, "lookup8": 0.85}  # first guesses
TRIALS = 6.0  # judged drafts that a first guess counts as
SURE = (0.3, 0.5, 0.7, 0.9)  # bounds of the classes of a drafter's largest probability
FORGET = 0.97  # weight of the past after each judged draft
SHORTEST_S = 0.001  # of a plain step; below it what drafting does in Python costs more than it saves
RECENT = 5  # times of which the least counts
ENOUGH = 3  # times that outweigh the first guess


class Pace:
    """What drafting costs and yields. drafts: source -> first guess of a draft step's cost relative to a plain step.

    length: draft always this many tokens instead of choosing; None: choose.
    """

    def __init__(self, drafts: Mapping[str, float], *, length: int | None = None) -> None:
        self.length = length
        self._guess: dict[str | int, float] = dict(drafts.items())
        self._guess.update(STEP.items())
        self._drafts = list(drafts)
        self._seconds: dict[str | int, tuple[float, ...]] = {}
        self._judged: dict[str, tuple[float, float]] = {}
        self._sure: dict[tuple[str, int], tuple[float, float]] = {}  # accepted and judged by source and class
        self._rate = 0.0  # expected tokens per second of the last choice
        self._tokens = 0
        self._used: dict[str, int] = dict.fromkeys(drafts, 0)  # source -> tokens when it was last tried
        self._probed = 0  # tokens at the last probe
        self._probing = False  # whether the plain step of a probe has been made

    def choose(self, found: str, room: int) -> tuple[str, int]:
        """Return the source ("" for none) and the number of tokens to draft.

        found: the kind of occurrence that prompt lookup found, "" for none. room: the most tokens to draft.
        """
        sources = [found, *self._drafts] if found else self._drafts
        if room < 1 or not sources:
            return "", 0
        if len(self._seconds.get(1, ())) < ENOUGH:  # a plain step is what the others are compared with
            return "", 0
        if self.length is not None:
            length = min(self.length, room)
            return found or max(sources, key=lambda source: self.rate(source, length)), length
        if self._cost(1) < SHORTEST_S:
            return "", 0
        if self._tokens - self._probed >= PROBE:
            self._probing = not self._probing
            if self._probing:
                return "", 0
            self._probed = self._tokens
            return min(sources, key=lambda source: self._used.get(source, 0)), 1
        lengths = [length for length in LENGTHS if length <= room] or [room]
        self._rate, source, length = max((self.rate(source, k), source, k) for source in sources for k in lengths)
        if self._rate <= GAIN * self.rate("", 0):
            return "", 0
        return source, length if source == found else min(room, LENGTHS[-1])

    def chance(self, source: str, confidence: float) -> float:
        """Return the probability that a draft of this confidence, its largest probability, is accepted."""
        accepted, judged = self._sure.get((source, bisect(SURE, confidence)), (0.0, 0.0))
        return (accepted + 2 * confidence) / (judged + 2)

    def goes_on(self, source: str, chance: float, drafted: int) -> bool:
        """Return whether more drafts pay. chance: the probability that all ``drafted`` ones are accepted.

        They do if any number of further ones yields more tokens than the time they take would yield otherwise.
        """
        if self.length is not None:
            return True
        accepted, before, tokens = self.acceptance(source), self._cost(panel(drafted + 1)), 0.0
        for more in range(1, LENGTHS[-1] - drafted + 1):
            tokens += chance * accepted**more
            seconds = more * self._cost(source) + self._cost(panel(drafted + 1 + more)) - before
            if tokens > self._rate * seconds:
                return True
        return False

    def rate(self, source: str, length: int) -> float:
        """Return the expected tokens per second of drafting ``length`` tokens from ``source``."""
        accepted = self.acceptance(source)
        tokens = sum(accepted**place for place in range(length + 1))
        drafting = length * self._cost(source) if source in self._guess else 0.0
        return tokens / (drafting + self._cost(panel(length + 1)))

    def acceptance(self, source: str) -> float:
        """Return the probability that a draft of ``source`` is accepted if those before it were."""
        accepted, judged = self._judged.get(source) or self._first(source)
        return accepted / judged

    def _first(self, source: str) -> tuple[float, float]:
        return TRIALS * PRIOR.get(source, 0.5), TRIALS

    def _cost(self, key: str | int) -> float:
        """Return the seconds of a step: a draft's by its source, another's by its rows."""
        times = self._seconds.get(key, ())
        if len(times) >= ENOUGH or key == 1:
            return min(times)
        return min([self._guess[key] * self._cost(1), *times])

    def spent(self, key: str | int, began: float) -> None:
        """Record a step that began at ``began`` of perf_counter. key: the source of a draft step, or rows of a step."""
        seconds = time.perf_counter() - began
        key = panel(key) if isinstance(key, int) else key
        self._seconds[key] = (*self._seconds.get(key, ())[1 - RECENT :], seconds)

    def judged(self, source: str, confidences: Sequence[float], *, accepted: int) -> None:
        """Record how many drafts were accepted; the step yielded one token more. confidences: one per draft."""
        self._tokens += accepted + 1
        self._used[source] = self._tokens
        if not confidences:
            return
        hits, trials = self._judged.get(source) or self._first(source)
        rejected = accepted < len(confidences)
        self._judged[source] = (FORGET * hits + accepted, FORGET * trials + accepted + rejected)
        for place, confidence in enumerate(confidences[: accepted + rejected]):
            key = source, bisect(SURE, confidence)
            hits, trials = self._sure.get(key, (0.0, 0.0))
            self._sure[key] = (FORGET * hits + (place < accepted), FORGET * trials + 1)


def panel(rows: int) -> int:
    """Return the rows that a step of ``rows`` costs."""
    return next(size for size in PANELS if size >= rows)
