"""What a step costs, measured when the server starts: seconds by width and number of rows.

How much a narrower width gains depends on the machine and on the number of rows: a single row is bound by memory, so
int2 is several times as fast as int8; many rows are bound by arithmetic and gain little. So nothing is assumed. Rounds
of all widths take turns until the time is used, at least one round, and the shortest times are kept.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from matquant import _native
from matquant.core.spec import Plan
from matquant.engine.engine import Engine
from matquant.engine.speculation import DRAFT_WIDTHS

ROWS = (1, 2, 4, 8, 16)
PROMPT_ROWS = 32  # measured at the widest width only, at which prompts are read
BUDGET_S = 2.0
MOST_ROUNDS = 9
CONTEXT = 32  # tokens of the caches that are measured with


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a step by width, at ascending numbers of rows. plans: by name, of a single row."""

    seconds: Mapping[int, tuple[tuple[int, float], ...]]
    plans: Mapping[str, float] = field(default_factory=dict)

    def step_s(self, bits: int, rows: float) -> float:
        """Return the seconds of a step of ``rows`` rows: between measured points on a straight line, beyond the last
        in proportion to the rows. Of a width that was not measured: the next wider one, or the widest."""
        if rows <= 0:
            return 0.0
        wider = [width for width in self.seconds if width >= bits]
        points = self.seconds[min(wider) if wider else max(self.seconds)]
        if rows <= points[0][0]:
            return points[0][1]
        for (low, first), (high, second) in pairwise(points):
            if rows <= high:
                return first + (second - first) * (rows - low) / (high - low)
        return points[-1][1] * rows / points[-1][0]

    def to_json(self) -> dict[str, dict[str, float]]:
        """Return {width: {rows: seconds}}."""
        return {str(bits): {str(rows): s for rows, s in points} for bits, points in self.seconds.items()}


def measure(
    engine: Engine,
    widths: Sequence[int],
    *,
    most_rows: int,
    plans: Mapping[str, Plan] | None = None,
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Measure steps of up to ``most_rows`` rows for about ``budget_s`` seconds. widths: the widest first.

    plans: plans by name, whose single rows are measured too.
    A round is not begun if it is expected to end after the budget.
    """
    room = min(engine.context, CONTEXT)
    workspace = _native.Workspace(engine.model.native, most_rows, room, engine.threads)
    counts: list[tuple[int | str, int]] = [(bits, rows) for bits in widths for rows in ROWS if rows <= most_rows]
    counts += [(widths[0], PROMPT_ROWS)] if most_rows >= PROMPT_ROWS else []
    counts += [(name, 1) for name in plans or {}]
    caches = [_native.Cache(engine.model.native, room, engine.exact) for _ in range(min(most_rows, PROMPT_ROWS))]
    tables: dict[int | str, np.ndarray] = {bits: engine.widths(bits) for bits in widths}
    tables |= {name: engine.widths(plan=plan) for name, plan in (plans or {}).items()}
    logits = np.empty((max(ROWS), engine.model.architecture.vocab), dtype=np.float32)
    samples: dict[tuple[int | str, int], list[float]] = {count: [] for count in counts}

    def run(label: int | str, rows: int) -> float:
        began = clock()
        wanted = rows if rows in ROWS else 1  # a prompt has the logits of its last row
        _native.step(
            engine.model.native,
            tables[label],
            engine.exact,
            [row % engine.model.architecture.vocab for row in range(rows)],
            [0] * rows,
            caches[:rows],
            rows - wanted,
            logits,
            workspace,
        )
        return clock() - began

    for label in tables:
        run(label, 1)  # touch every plane once
    began = clock()
    for done in range(1, MOST_ROUNDS + 1):
        for label, rows in counts:
            samples[label, rows].append(run(label, rows))
        if (clock() - began) * (done + 1) / done > budget_s:
            break
    singles = {name: min(samples[name, 1]) for name in plans or {}}
    return Costs(seconds={bits: _rising(samples, bits) for bits in widths}, plans=singles)


def drafting(widths: Sequence[int], engine: Engine) -> tuple[int, ...]:
    """Return the widths to measure for a server that speculates: ``widths`` and those that draft, widest first."""
    return tuple(sorted({*widths, *(bits for bits in DRAFT_WIDTHS if bits <= engine.max_bits)}, reverse=True))


def _rising(samples: Mapping[tuple[int | str, int], Sequence[float]], bits: int) -> tuple[tuple[int, float], ...]:
    """Return the shortest time at each number of rows, or at more rows if that is shorter: noise only adds."""
    counts = sorted(rows for label, rows in samples if label == bits)
    return tuple((rows, min(min(samples[bits, more]) for more in counts if more >= rows)) for rows in counts)
