"""Progress of a long command on stderr: a bar on a terminal, lines in a log.

A log gets a line for every new stage, block or width, and otherwise at most one a minute. Each line has the time
elapsed and, once a speed is known, an estimate of the time left. If a stage reports nothing for a minute (a model is
loading, a block is large), a thread repeats the last line, so that a log always shows that the command is alive.
Nothing is written to stdout, whose last line is JSON.
"""

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from matquant.system import ranks

EVERY_S = 60.0  # between two lines of one stage
QUIET_S = 2.0  # shorter stages get no line
SETTLED_S = 1.0  # progress in this time, such as a resumed run's finished work, does not count as speed
SAMPLES = 16  # speed is measured over this many reports
COUNTED = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
BYTES = (TextColumn("exporting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())

Count = Callable[[str, int, int], None]  # stage, done, total


class Log:
    """Progress lines for a file or a pipe. A context manager: a thread repeats the last line every minute."""

    def __init__(self, verb: str, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._verb, self._stream, self._clock = verb, stream or sys.stderr, clock
        self._began = self._shown = self._stage_began = self._counted_from = clock()
        self._is_new = True
        self._stage, self._text = "", ""
        self._done, self._total = 0.0, 0.0
        self._samples: deque[tuple[float, float]] = deque(maxlen=SAMPLES)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._repeat, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def at(
        self, stage: str, text: str, *, done: float = 0, total: float = 0, block: bool = False, quiet: bool = False
    ) -> None:
        """Record a state, and print it if the stage is new, it is a ``block``, or a minute has passed.

        quiet: the stage may be short; its first line comes after QUIET_S.
        """
        with self._lock:
            now = self._clock()
            if total != self._total or done < self._done or not self._text:
                self._counted_from = now
                self._samples.clear()
            if stage != self._stage or not self._text:
                self._stage, self._stage_began, self._is_new = stage, now, True
            self._text, self._done, self._total = text, done, total
            self._sample(now)
            first = self._is_new and (not quiet or now - self._stage_began >= QUIET_S)
            if first or block or now - self._shown >= EVERY_S:
                self._is_new = False
                self._print(now)

    def note(self, text: str) -> None:
        """Print a line as it is."""
        with self._lock:
            print(text, file=self._stream, flush=True)

    def beat(self) -> None:
        """Print the last state again if nothing was printed for a minute."""
        with self._lock:
            now = self._clock()
            if now - self._shown >= EVERY_S:
                self._print(now, again=True)

    def _repeat(self) -> None:
        while not self._ended.wait(EVERY_S / 4):
            self.beat()

    def _sample(self, now: float) -> None:
        if now - self._counted_from < SETTLED_S:
            self._samples.clear()
        elif len(self._samples) > 1 and now - self._samples[-1][0] < SETTLED_S:
            return
        self._samples.append((now, self._done))

    def _left_s(self, now: float) -> float | None:
        """Return the seconds left in this stage at the speed of the last reports."""
        if not self._samples or self._done <= self._samples[0][1] or not self._total:
            return None
        began, before = self._samples[0]
        left = (self._total - self._done) * (now - began) / (self._done - before)
        return max(left, 0.0)

    def _print(self, now: float, *, again: bool = False) -> None:
        self._shown = now
        words = [
            f"{self._verb}: {'still ' if again else ''}{self._text or 'starting'}",
            f"{duration(now - self._began)} elapsed",
        ]
        left = self._left_s(now)
        if left is not None:
            words.append(f"about {duration(left)} left")
        with contextlib.suppress(OSError, ValueError):  # a closed or full log does not stop the work
            print(", ".join(words), file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """Format seconds as 0:07, 12:30 or 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(console: Console, *columns: Any, transient: bool = False) -> Progress:
    return Progress(*columns, console=console, transient=transient)


@contextlib.contextmanager
def counted(verb: str) -> Iterator[Count]:
    """Yield report(stage, done, total) for sequences, layers or plans; of several processes only the first prints."""
    if not ranks.leads():
        yield lambda stage, done, total: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        with Log(verb) as log:
            yield lambda stage, done, total: log.at(
                stage,
                f"{stage}, {done:,} of {total:,} done" if total else stage,
                done=done,
                total=total,
                quiet=not total,
            )
        return
    bar = _bar(console, *COUNTED, transient=True)
    task = bar.add_task(verb, total=None)

    def report(stage: str, done: int, total: int) -> None:
        bar.start()  # only at the first report: a rejected run prints its message and nothing else
        bar.update(task, completed=done, total=total or None, description=f"{verb}: {stage}")

    try:
        yield report
    finally:
        if bar.live.is_started:
            bar.stop()


@contextlib.contextmanager
def transferring(verb: str, done_word: str) -> Iterator[Callable[[int, int], None]]:
    """Yield report(bytes, total bytes). done_word: what happened to the bytes, such as "written"."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with Log(verb) as log:
            yield lambda done, total: log.at(
                verb, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB {done_word}", done=done, total=total, quiet=True
            )
        return
    with _bar(console, *BYTES, transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Settings:
    """Lines printed once work has begun or QUIET_S have passed, so that a rejected run prints only its error."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._lines: Sequence[str] = ()
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def hold(self, lines: Sequence[str]) -> None:
        """Store ``lines`` to print later."""
        self._lines = lines
        self._timer = threading.Timer(QUIET_S, self.release)
        self._timer.daemon = True
        self._timer.start()

    def release(self) -> None:
        """Print the lines now."""
        with self._lock:
            lines, self._lines = self._lines, ()
        for line in lines:
            self._show(line)

    def close(self) -> None:
        """Drop the lines."""
        self._lines = ()
        if self._timer is not None:
            self._timer.cancel()


@contextlib.contextmanager
def quantising() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield report(record): the settings of a run, its loss per width, speed and time left, notices once.

    Of several processes only the first one prints.
    """
    if not ranks.leads():
        yield lambda record: None
        return
    with _quantising() as report:
        yield report


@contextlib.contextmanager
def _quantising() -> Iterator[Callable[[Mapping[str, Any]], None]]:
    console = Console(stderr=True)
    told: list[str] = []

    def notice(record: Mapping[str, Any]) -> str:
        """Return the notice of a record, "" if it has none or was printed before."""
        text = record.get("notice")
        if text is None or text in told:
            return ""
        told.append(text)
        return f"note: {text}"

    if not console.is_terminal:
        with Log("quantize") as log, contextlib.closing(Settings(log.note)) as settings:

            def write(record: Mapping[str, Any]) -> None:
                if text := notice(record):
                    log.note(text)
                if "settings" in record:
                    settings.hold(record["settings"])
                if "step" not in record:
                    return
                settings.release()
                step, steps = record["step"], record["steps"]
                quiet, unit = "unit" in record, "block" if "block" in record else record.get("unit", "step")
                words = [record.get("stage", ""), f"{unit} {step:,} of {steps:,}", _facts(record)]
                text = ", ".join(word for word in words if word)
                stage = f"{record.get('stage', '')} {unit}"
                whole = "block" in record or (step == steps and not quiet)
                log.at(stage, text, done=step, total=steps, block=whole, quiet=quiet)

            yield write
        return
    bar = _bar(console, *COUNTED)
    task = bar.add_task("quantising", total=None)

    def say(text: str) -> None:
        bar.console.print(text, highlight=False, soft_wrap=True, markup=False)

    settings = Settings(say)

    def report(record: Mapping[str, Any]) -> None:
        if text := notice(record):
            say(text)
        if "settings" in record:
            settings.hold(record["settings"])
        if "step" not in record:
            return
        settings.release()
        bar.start()  # only at the first step: a rejected run prints its message and nothing else
        text = "  ".join(part for part in (record.get("stage", ""), _facts(record)) if part)
        bar.update(task, completed=record["step"], total=record["steps"], description=text)

    try:
        yield report
    finally:
        settings.close()
        if bar.live.is_started:
            bar.stop()


def _facts(record: Mapping[str, Any]) -> str:
    """Format the loss by width, then the speed or the block, and what it is of a GPU's peak."""
    names = (f"int{name}" if name.isdecimal() else name for name in record["loss"])
    losses = "  ".join(f"{name} {loss:.3g}" for name, loss in zip(names, record["loss"].values(), strict=True))
    speed = f"{record['tok_s']:,.0f} tok/s" if "tok_s" in record else record.get("block", "")
    flops = f"{record['flop_s'] / 1e12:,.0f} TFLOP/s" if "flop_s" in record else ""
    used = f"{record['mfu']:.0%} MFU" if "mfu" in record else ""
    return "  ".join(part for part in (losses, speed, flops, used) if part)
