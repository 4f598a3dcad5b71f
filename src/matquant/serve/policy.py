"""The width of requests that leave it to the server: as wide as the load permits.

Before each step the policy predicts from the measured cost table (cost.py) how long the step takes, which is the time
between two tokens of every sequence. If that exceeds its target, or the oldest waiting request its own, for PATIENCE
steps, the policy goes down: to the widest narrower width at which the step is predicted to be at least GAIN times as
fast. If no width gains that much, it stays: a narrower width would cost quality for nothing. It goes up to the widest
width whose prediction has stayed under MARGIN of the target for ``hold_s`` seconds, with nobody waiting for long. Going
down again soon after going up doubles the time for the next rise, so that a load near a limit does not make the width
change all the time.

A request with ``least_bits`` gets the narrowest candidate that is not below it, or this width if there is none.
Explicit widths are never changed, but their rows count in predictions. Predictions are corrected by what recent steps
took, compared with the table, and by the time that choosing tokens takes besides. Where sequences draft, they are
multiplied by the time and divided by the tokens of recent steps at that width: accepted drafts that meet the target
keep the width. A width at which nothing was drafted yet is predicted without drafts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from matquant.serve.cost import Costs

PATIENCE = 3  # steps over a target before going down
GAIN = 1.15  # least predicted ratio of step times that is worth a narrower width
MARGIN = 0.8  # of the target, below which a wider width may be used
HOLD_S = 2.0  # for so long
LONGEST_HOLD_S = 30.0
RELAPSE_S = 10.0  # going down so soon after going up doubles the hold; without it the hold returns to HOLD_S
SMOOTHING = 0.1  # weight of the newest step in the correction
MOST_CORRECTION = 8.0
LEAST_CHUNK = 8  # rows of prompts
UNKNOWN = 1.0, 1.0, 0  # what drafting yields before any was tried


@dataclass(frozen=True, kw_only=True)
class Load:
    """A step to come. auto: ``least_bits`` of each decode row whose width is free. fixed: other decode rows, by width.

    prompt_rows: rows that read prompts, at the widest width. oldest_wait_s: of the requests that wait. drafts: whether
    its sequences may draft, which can yield several tokens of each.
    """

    now_s: float
    auto: Sequence[int] = ()
    fixed: Mapping[int, int] = field(default_factory=dict)
    prompt_rows: int = 0
    oldest_wait_s: float = 0.0
    drafts: bool = False

    @property
    def decoding(self) -> int:
        """Return the number of decode rows."""
        return len(self.auto) + sum(self.fixed.values())


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change of width. cause: "latency", "waiting" or "recovered"; reason: the same in words, with figures."""

    before: int
    after: int
    cause: str
    reason: str

    @property
    def direction(self) -> str:
        return "down" if self.after < self.before else "up"


def counted(widths: Iterable[int], others: Mapping[int, int] = MappingProxyType({})) -> dict[int, int]:
    """Return the number of rows by width, with those of ``others``. A Counter takes longer for a row or two."""
    rows = dict(others)
    for bits in widths:
        rows[bits] = rows.get(bits, 0) + 1
    return rows


class Policy:
    """Chooses ``bits``, one of ``widths`` (widest first)."""

    def __init__(self, costs: Costs, widths: Sequence[int], *, latency_s: float, wait_s: float) -> None:
        self.costs = costs
        self.widths = tuple(widths)
        self.latency_s = latency_s
        self.wait_s = wait_s
        self.bits = self.widths[0]
        self.reason = ""
        self.correction = 1.0  # measured over predicted, of native code
        self.choosing_s = 0.0  # of a step, besides native code
        self.rejected = 0  # times that no narrower width gained enough
        self.hold_s = HOLD_S
        # level -> of recent steps that might draft: seconds relative to plain ones, tokens per sequence, and how many
        self._drafting: dict[int, tuple[float, float, int]] = {}
        self._over = 0  # steps in a row over a target
        self._fits_since: dict[int, float] = {}  # wider width -> since when it would do
        self._rose_at: float | None = None

    def bits_for(self, least: int, level: int | None = None) -> int:
        """Return the width of a request with ``least_bits``: the policy's, the narrowest not below it, or itself."""
        level = self.bits if level is None else level
        return next((bits for bits in reversed(self.widths) if bits >= max(level, least)), least)

    def predict_s(self, load: Load, level: int) -> float:
        """Return the predicted seconds between tokens with the policy at ``level``; 0 if nothing decodes."""
        seconds, tokens, _ = self._drafting.get(level, UNKNOWN) if load.drafts else UNKNOWN
        return self._plain_s(load, level) * seconds / tokens if load.decoding else 0.0

    def _plain_s(self, load: Load, level: int) -> float:
        """Return the predicted seconds of a step without drafts."""
        return self.correction * self._table_s(load, level) + self.choosing_s

    def _table_s(self, load: Load, level: int) -> float:
        rows = counted((self.bits_for(least, level) for least in load.auto), load.fixed)
        if load.prompt_rows:
            rows[self.widths[0]] = rows.get(self.widths[0], 0) + load.prompt_rows
        return sum(self.costs.step_s(bits, count) for bits, count in rows.items())

    def prompt_rows(self, load: Load, most: int) -> int:
        """Return how many rows of prompts to read beside decoding rows, at most ``most``.

        Fewer, by halves but not below LEAST_CHUNK, if the step would take longer than the target: prompts give way
        before widths do. If nothing decodes, no one waits for the step.
        """
        if not load.decoding:
            return most
        rows = most
        while rows > LEAST_CHUNK and self.predict_s(replace(load, prompt_rows=rows), self.bits) > self.latency_s:
            rows = max(rows // 2, LEAST_CHUNK)
        return rows

    def learn(self, load: Load, *, native_s: float, choosing_s: float) -> None:
        """Learn from a step: how long native code took, and choosing tokens. Single outliers count little."""
        predicted_s = self._table_s(load, self.bits)
        if predicted_s > 0:
            ratio = min(max(native_s / predicted_s, 1 / MOST_CORRECTION), MOST_CORRECTION)
            self.correction += SMOOTHING * (ratio - self.correction)
            self.choosing_s += SMOOTHING * (choosing_s - self.choosing_s)

    def learn_drafts(self, load: Load, *, step_s: float, tokens: int) -> None:
        """Learn from a step that might draft: how long it took, drafting included, and the new tokens of all sequences.

        Accepted drafts come at once, so what counts is the mean time between tokens.
        """
        seconds, mean, steps = self._drafting.get(self.bits, UNKNOWN)
        weight = max(SMOOTHING, 1 / (steps + 1))
        took, yielded = step_s / max(self._plain_s(load, self.bits), 1e-9), tokens / load.decoding
        seconds += weight * (min(took, MOST_CORRECTION) - seconds)
        self._drafting[self.bits] = seconds, mean + weight * (yielded - mean), steps + 1

    def observe(self, load: Load) -> Change | None:
        """Look at the next step; return the change of width, if there is one."""
        now_s = self.predict_s(load, self.bits)
        cause, reason = self._over_target(now_s, load)
        self._over = self._over + 1 if cause else 0
        self._note_fitting(load)
        if self._over >= PATIENCE:
            return self._lower(load, cause, reason)
        return None if cause else self._raise(load)

    def _over_target(self, predicted_s: float, load: Load) -> tuple[str, str]:
        if predicted_s > self.latency_s:
            words = f"{1000 * predicted_s:.0f} ms between tokens at int{self.bits}, target {1000 * self.latency_s:.0f}"
            return "latency", words
        if load.oldest_wait_s > self.wait_s:
            return "waiting", f"a request has waited {load.oldest_wait_s:.1f} s, target {self.wait_s:.1f}"
        return "", ""

    def _lower(self, load: Load, cause: str, reason: str) -> Change | None:
        now_s = self.predict_s(load, self.bits)
        for bits in self.widths[self.widths.index(self.bits) + 1 :]:
            if now_s >= GAIN * self.predict_s(load, bits):
                rose_s = None if self._rose_at is None else load.now_s - self._rose_at
                relapse = rose_s is not None and rose_s < max(RELAPSE_S, 2 * self.hold_s)
                self.hold_s = min(2 * self.hold_s, LONGEST_HOLD_S) if relapse else HOLD_S
                return self._change(bits, cause, reason)
        if self._over == PATIENCE:
            self.rejected += 1
        return None

    def _note_fitting(self, load: Load) -> None:
        """Note since when each wider width has been fast enough."""
        for bits in self.widths[: self.widths.index(self.bits)]:
            predicted_s = self.predict_s(load, bits)
            if predicted_s < MARGIN * self.latency_s and load.oldest_wait_s < MARGIN * self.wait_s:
                self._fits_since.setdefault(bits, load.now_s)
            else:
                self._fits_since.pop(bits, None)

    def _raise(self, load: Load) -> Change | None:
        hold_s = self.hold_s if load.decoding or load.prompt_rows else HOLD_S
        for bits in self.widths[: self.widths.index(self.bits)]:
            if load.now_s - self._fits_since.get(bits, load.now_s) >= hold_s:
                self._rose_at = load.now_s
                return self._change(bits, "recovered", "the load has fallen")
        return None

    def _change(self, bits: int, cause: str, reason: str) -> Change:
        change = Change(before=self.bits, after=bits, cause=cause, reason=f"int{self.bits} to int{bits}: {reason}")
        self.bits, self.reason = bits, change.reason
        self._over = 0
        self._fits_since.clear()
        return change
