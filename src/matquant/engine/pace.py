"""Decide how many tokens to draft, and from where, by measured costs and measured acceptance.

A draft of K tokens of which each is accepted with probability a, given that those before it were, yields

    E = 1 + a + a^2 + ... + a^K tokens in K * draft_s + verify_s(K + 1) seconds.

The choice is the source and the K with the most tokens per second; K = 0 if none beats a plain step by GAIN. Sequences
that are decoded together choose together: their tokens are added up, and so are the rows of the step that verifies.
Acceptance is a running mean per source. A time is the least of the last few measured, because other programs can only
lengthen it, in proportion to plain steps if some were made just before. Both start from guesses that favour a trial, or
from a measured table of costs. Every PROBE tokens there is
a plain step, and of the sources that could pay the one that was not used for longest is tried again at K = 1.

Where nothing pays, nothing is weighed again before the next draft, which a probe makes, or until a token that was found
but not drafted turns out to be right: plain steps take little longer than without speculation.

The choice depends on clocks. The text does not depend on the choice.
"""

from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

LENGTHS = (1, 3, 7)  # with the token before them 2, 4 or 8 rows, which is what a kernel computes at once
PANELS = (1, 2, 4, 8)  # rows of a step that cost the same as fewer ones
PANEL_OF = tuple(next(size for size in PANELS if size >= rows) for rows in range(PANELS[-1] + 1))
STEP = {1: 1.0, 2: 1.05, 4: 1.15, 8: 1.4}  # first guess of a step with these rows, relative to one row
PROBE = 64  # tokens
GAIN = 1.1
# first guesses
PRIOR = {"int2": 0.55, "int3": 0.7, "int4": 0.8, "lookup2": 0.5, "lookup3": 0.7, "lookup8": 0.85, "forced": 0.9}
TRIALS = 6.0  # judged drafts that a first guess counts as
SURE = (0.3, 0.5, 0.7, 0.9)  # bounds of the classes of a drafter's largest probability
FORGET = 0.97  # weight of the past after each judged draft
SHORTEST_S = 0.001  # of a plain step; below it what drafting does in Python costs more than it saves
RECENT = 5  # times of which the least counts
ENOUGH = 3  # times that outweigh the first guess
NEAR = 8  # steps after a plain one that are compared with it
PLAIN = ("", 0)  # the choice to draft nothing
PLAIN_STEP = ("", 1)  # its source and rows, if one sequence decodes


class Times:
    """What steps take that draft for one requested width and verify at it; shared by sequences at this width.

    drafts: source -> first guess of a draft step's cost relative to a plain step. table: seconds of a step at the
    width of a source ("": the requested one) with so many rows, if it has been measured; None: plain steps come first.
    """

    def __init__(self, drafts: Mapping[str, float], *, table: Callable[[str, int], float] | None = None) -> None:
        self.drafts = list(drafts)
        self.tokens = 0
        self._share = {"": 1.0, **drafts}
        self._table = table
        self.rests: dict[tuple[object, ...], int] = {}  # for whom nothing paid since the last draft, and in what room
        # of recent steps: seconds, and of a plain step about then, 0 if there was none
        self._seconds: dict[tuple[str, int], tuple[tuple[float, float], ...]] = {}
        self._since_plain = 0  # steps
        self._costs: dict[tuple[str, int], float] = {}  # what follows from them
        self._probed = 0  # tokens at the last probe
        self._probing = False  # whether the plain step of a probe has been made

    @property
    def ready(self) -> bool:
        """Return whether the time of a plain step is known, which the others are compared with."""
        return self._table is not None or len(self._seconds.get(PLAIN_STEP, ())) >= ENOUGH

    def cost(self, rows: int, source: str = "") -> float:
        """Return the seconds of a step with 1 to 8 rows at the requested width, or at that of a source of drafts."""
        key = source, PANEL_OF[rows]
        found = self._costs.get(key)
        if found is None:
            found = self._costs[key] = self._cost(key)
        return found

    def _cost(self, key: tuple[str, int]) -> float:
        times, plain_s = self._seconds.get(key, ()), 0.0 if key == PLAIN_STEP else self.cost(1)
        if len(times) < ENOUGH:
            times = (*times, self._guess(key))
        return min(seconds * plain_s / then_s if plain_s and then_s else seconds for seconds, then_s in times)

    def _guess(self, key: tuple[str, int]) -> tuple[float, float]:
        """Return the first guess of the seconds of a step, and of a plain one."""
        if self._table is None:
            return self._share[key[0]] * STEP[key[1]], 1.0
        return self._table(*key), self._table(*PLAIN_STEP)

    def spent(self, seconds: float, *, rows: int, source: str = "") -> None:
        """Record the time of a step."""
        key = source, PANEL_OF[rows]
        self._since_plain = 0 if key == PLAIN_STEP else self._since_plain + 1
        plain_s = self.cost(1) if 0 < self._since_plain < NEAR and self.ready else 0.0
        self._seconds[key] = (*self._seconds.get(key, ())[1 - RECENT :], (seconds, plain_s))
        self._costs.clear()

    def could_pay(self, source: str, sequences: int, room: int) -> bool:
        """Return whether drafts by steps at ``source`` would pay if all of them were accepted."""
        limit = self.cost(sequences) / GAIN
        return any(
            length * self.cost(sequences, source) + self.cost(sequences * (length + 1)) < (length + 1) * limit
            for length in LENGTHS
            if length <= room
        )

    def probe(self, sequences: int) -> str:
        """Return "plain" if the next step is to be plain, "source" if it is to try a source again, "" usually."""
        if self.tokens - self._probed < PROBE * sequences:
            return ""
        self._probing = not self._probing
        if self._probing:
            return "plain"
        self._probed = self.tokens
        return "source"


class Pace:
    """How often drafts are accepted, for one sequence or for several that follow each other.

    drafts: as for ``Times``, which are made from it unless given. length: draft always this many tokens instead of
    choosing; None: choose.
    """

    def __init__(
        self, drafts: Mapping[str, float] | None = None, *, times: Times | None = None, length: int | None = None
    ) -> None:
        self.times = times or Times(drafts or {})
        self.length = length
        self._judged: dict[str, tuple[float, float]] = {}
        self._sure: dict[tuple[str, int], tuple[float, float]] = {}  # accepted and judged by source and class
        self._expected: dict[tuple[str, int], float] = {}  # what follows from these
        self._used: dict[str, int] = {}  # source -> tokens when it was last tried
        # of the last choice: tokens per second that a draft step has to yield for this sequence, sequences of the
        # step and of its draft steps, and the most tokens to draft
        self._rate, self._together, self._drafting, self._most = 0.0, 1, 1, LENGTHS[-1]

    def choose(self, found: str, room: int) -> tuple[str, int]:
        """Return the source ("" for none) and the number of tokens to draft.

        found: the kind of occurrence that prompt lookup found, "" for none. room: the most tokens to draft.
        """
        return choose_together([Wish(pace=self, found=found, room=min(room, LENGTHS[-1]))])[0]

    def fixed(self, found: str, room: int) -> tuple[str, int]:
        """Return the source of ``length`` tokens."""
        length = min(self.length or 0, room)
        if length < 1 or not (found or self.times.drafts):
            return PLAIN
        return found or max(self.times.drafts, key=lambda source: self._alone(source, length)), length

    def longest_unused(self, sources: Sequence[str]) -> tuple[str, int]:
        """Return the source that was not tried for longest, and one token."""
        return (min(sources, key=lambda source: self._used.get(source, 0)), 1) if sources else PLAIN

    def best(self, offers: Iterable[tuple[str, int]]) -> tuple[float, str, int]:
        """Return the expected tokens of a step with drafts, and the offer, a source and a number, that yields most."""
        best = (1.0, *PLAIN)
        for source, number in offers:
            if source and number:
                best = max(best, (self.expected(source, number), source, number))
        return best

    def expected(self, source: str, length: int) -> float:
        """Return the expected tokens of a step that verifies ``length`` drafts of ``source``."""
        found = self._expected.get((source, length))
        if found is None:
            accepted = self.acceptance(source)
            found = self._expected[source, length] = sum(accepted**place for place in range(length + 1))
        return found

    def _alone(self, source: str, length: int) -> float:
        """Return the expected tokens per second of a sequence without others."""
        return self.expected(source, length) / (length * self.times.cost(1, source) + self.times.cost(length + 1))

    def set_out(self, rate: float, *, together: int, drafting: int, most: int) -> None:
        """Note the choice of a step: its tokens per second, its sequences, those that draft by steps, and the most."""
        self._rate, self._together, self._drafting, self._most = rate / drafting, together, drafting, most

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
        cost, together, tokens = self.times.cost, self._together, 0.0
        accepted, before = self.acceptance(source), cost(together * (drafted + 1))
        for more in range(1, self._most - drafted + 1):
            tokens += chance * accepted**more
            seconds = more * cost(self._drafting, source) + cost(together * (drafted + 1 + more)) - before
            if tokens > self._rate * seconds:
                return True
        return False

    def acceptance(self, source: str) -> float:
        """Return the probability that a draft of ``source`` is accepted if those before it were."""
        accepted, judged = self._judged.get(source) or self._first(source)
        return accepted / judged

    def _first(self, source: str) -> tuple[float, float]:
        return TRIALS * PRIOR.get(source, 0.5), TRIALS

    def judged(self, source: str, confidences: Sequence[float], *, accepted: int) -> None:
        """Record how many drafts were accepted; the step yielded one token more. confidences: one per draft."""
        self.times.tokens += accepted + 1
        self._used[source] = self.times.tokens
        if not confidences:
            return
        self._expected.clear()
        self.times.rests.clear()
        hits, trials = self._judged.get(source) or self._first(source)
        rejected = accepted < len(confidences)
        self._judged[source] = (FORGET * hits + accepted, FORGET * trials + accepted + rejected)
        for place, confidence in enumerate(confidences[: accepted + rejected]):
            key = source, bisect(SURE, confidence)
            hits, trials = self._sure.get(key, (0.0, 0.0))
            self._sure[key] = (FORGET * hits + (place < accepted), FORGET * trials + 1)

    def watched(self, source: str, *, right: bool) -> None:
        """Record whether a token that was found but not drafted would have been accepted."""
        hits, trials = self._judged.get(source) or self._first(source)
        self._judged[source] = (FORGET * hits + right, FORGET * trials + 1)
        self._expected.clear()
        if right:
            self.times.rests.clear()


class Wish(NamedTuple):
    """A sequence that may draft: what was found without a step ("" for nothing), and the most tokens to draft."""

    pace: Pace
    found: str
    room: int
    held: int = LENGTHS[-1]  # tokens of what was found; this many if they fill the room


def choose_together(wishes: Sequence[Wish], *, beside: tuple[int, float] = (0, 0.0)) -> list[tuple[str, int]]:
    """Return the source ("" for none) and the number of tokens to draft for each of the sequences of a step.

    Their paces share their ``Times`` and ``length``. beside: tokens and seconds of what else the step computes.
    """
    times, length, count = wishes[0].pace.times, wishes[0].pace.length, len(wishes)
    plain = [PLAIN] * count
    room = min(LENGTHS[-1], max(wish.room for wish in wishes))
    if room < 1 or not times.ready:
        return plain
    if length is not None:
        return [wish.pace.fixed(wish.found, wish.room) for wish in wishes]
    if times.cost(1) < SHORTEST_S or not (times.drafts or any(wish.found for wish in wishes)):
        return plain
    probe = times.probe(count)
    if probe == "plain":
        return plain
    if probe == "source":
        able = [source for source in times.drafts if times.could_pay(source, count, room)]
        tried = [([wish.found] if wish.found else []) + able if wish.room else [] for wish in wishes]
        return [wish.pace.longest_unused(sources) for wish, sources in zip(wishes, tried, strict=True)]
    rested = beside[0], *((wish.pace, wish.found, wish.held) for wish in wishes)
    if room <= times.rests.get(rested, 0):
        return plain
    best, chosen = GAIN * (count + beside[0]) / (times.cost(count) + beside[1]), plain
    for number in [each for each in LENGTHS if each <= room] or [room]:
        for source in ("", *times.drafts):
            rate, choice = _weigh(wishes, source, number, beside)
            if rate > best:
                best, chosen = rate, choice
    if chosen is plain:
        times.rests[rested] = min(wish.room for wish in wishes)
    drafting = sum(source in times.drafts for source, _ in chosen)
    for wish, (source, number) in zip(wishes, chosen, strict=True):
        if source in times.drafts:
            wish.pace.set_out(best, together=count, drafting=drafting, most=number)
    return chosen


def _weigh(
    wishes: Sequence[Wish], source: str, length: int, beside: tuple[int, float]
) -> tuple[float, list[tuple[str, int]]]:
    """Return the expected tokens per second of a step with ``length`` drafts found or by ``source``; the choices.

    Drafts by steps may go on to the end of the room, because ``Pace.goes_on`` ends them.
    """
    times, tokens, rows, drafting, choices = wishes[0].pace.times, float(beside[0]), 0, 0, []
    for wish in wishes:
        room = min(length, wish.room)
        expected, best, number = wish.pace.best(((wish.found, min(room, wish.held)), (source, room)))
        by_steps = bool(best) and best == source
        tokens, rows, drafting = tokens + expected, rows + 1 + number, drafting + by_steps
        choices.append((best, min(wish.room, LENGTHS[-1]) if by_steps else number))
    drafting_s = length * times.cost(drafting, source) if drafting else 0.0
    return tokens / (drafting_s + times.cost(rows) + beside[1]), choices
