"""Widths that arrive while the server runs: planes that ``matquant pull`` adds to the directory are loaded and offered.

A thread looks at the directory's files every POLL_S seconds. New planes are read and packed while requests go on. The
steps that they make possible are then measured by the engine thread, between two steps of requests, and the policy and
/v1/models get the new widths.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matquant.format.manifest import FOLDER
from matquant.serve.cost import Costs, drafting, measure
from matquant.serve.service import Service
from matquant.system.errors import InputError

POLL_S = 1.0
BUDGET_S = 0.3  # for measuring, during which requests wait


@dataclass(kw_only=True)
class Arrivals:
    """Looks for planes until widths up to ``most_bits`` are offered.

    widths: returns those to list. rows: most rows of a step. offer: is given the costs of all widths, in the engine
    thread, when there are more. offered: the widest width that is offered.
    """

    service: Service
    most_bits: int
    widths: Callable[[], Sequence[int]]
    rows: int
    offer: Callable[[Costs], None]
    note: Callable[[str], None]
    offered: int
    _seen: list[tuple[str, int, int]] = field(default_factory=list)

    def start(self) -> None:
        """Look in a thread from now on, if anything is missing."""
        if self.offered < self.most_bits:
            threading.Thread(target=self._run, name="matquant-planes", daemon=True).start()

    def _run(self) -> None:
        while self.offered < self.most_bits and not self.service.is_draining:
            self.look()
            time.sleep(POLL_S)

    def look(self) -> None:
        """Load what has arrived since the last look, and have it measured and offered."""
        engine, found = self.service.engine, files(self.service.engine.path)
        if found != self._seen:
            self._seen = found
            try:
                engine.add_planes(self.most_bits)
            except (InputError, OSError) as error:  # a file is damaged, or was moved: the next one may help
                self.note(f"planes cannot be loaded: {error}")
        if engine.max_bits > self.offered:
            self.service.batcher.between(self._adopt)

    def _adopt(self) -> None:
        """Measure and offer the widths that are in memory and not offered; in the engine thread."""
        engine, known = self.service.engine, self.service.batcher.costs
        widest = engine.max_bits
        new = [bits for bits in drafting([*self.widths(), widest], engine) if self.offered < bits <= widest]
        if not new:
            return
        try:
            found = measure(engine, new, most_rows=self.rows, budget_s=BUDGET_S)
            self.offer(Costs(seconds={**found.seconds, **known.seconds}, plans=known.plans))
        except Exception as error:  # requests go on at the widths that they had
            self.note(f"new widths cannot be offered: {type(error).__name__}: {error}")
            return
        self.offered = widest
        self.note(f"planes have arrived: int{widest} and narrower are served")


def files(directory: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of the files that may be planes or shards."""
    found = []
    for folder in (directory, directory / FOLDER):
        try:
            entries = [(file.name, file.stat()) for file in folder.iterdir() if file.is_file()]
        except OSError:  # it is gone, or a file was moved meanwhile
            continue
        found += [(name, facts.st_size, facts.st_mtime_ns) for name, facts in entries]
    return sorted(found)
