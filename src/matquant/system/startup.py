"""Before the heavy imports, and what they may do: Ctrl-C ends them at once, a machine that is full is one line.

Importing takes up to seconds, longer than any other part of a short command. Nothing is open or half-written then, so
Ctrl-C leaves the process at once: an exception inside somebody's module initialisation becomes a traceback, or is
swallowed.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = 130  # the exit code of a program ended by Ctrl-C
SPINS = "2000"  # turns that torch's OpenMP threads wait awake, some 30 us; by default 300,000, milliseconds
SHORTAGES = {  # what libraries say where the machine has no more -> what that is
    "can't start new thread": "threads",
    "Resource temporarily unavailable": "threads",
    "can't allocate memory": "memory",
    "not enough memory": "memory",
    "Cannot allocate memory": "memory",
    "failed to map segment": "memory",
}
REMEDIES = {
    "memory": "close other programs, raise the limit (ulimit -v), or use a smaller model, --max-bits or batch",
    "threads": "use fewer --threads, close other programs, or raise the limit (ulimit -u, ulimit -v)",
}


@contextlib.contextmanager
def leave_on_interrupt() -> Iterator[None]:
    """Within it Ctrl-C ends the process with exit code 130 and no word. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(signum: int, frame: FrameType | None) -> None:
    sys.stdout.flush()
    os._exit(INTERRUPTED)


def let_threads_sleep() -> None:
    """Have torch's threads wait asleep after a short spin, unless the environment says how they are to wait.

    Beside a busy process those that spin take the core that the thread they wait for needs. For a command line only:
    it is read once, when the OpenMP library is loaded, and holds for the whole process.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def shortage(error: BaseException) -> str | None:
    """One line for an error of a machine that has no memory or threads left; None for any other error.

    Libraries hide the reason of a failed import in the errors behind theirs.
    """
    found: BaseException | None = error
    while found is not None:
        text = str(found).strip()
        kind = _kind(found, text)
        if kind is not None:
            first = text.splitlines()[0][:200] if text else type(found).__name__
            return f"the machine has no {kind} left ({first}); {REMEDIES[kind]}"
        found = (found.__cause__ or found.__context__) if isinstance(found, ImportError) else None
    return None


def _kind(error: BaseException, text: str) -> str | None:
    """What the machine has none of, by the error and its text."""
    if isinstance(error, MemoryError):
        return "memory"
    if not isinstance(error, (RuntimeError, ImportError, OSError)):
        return None
    return next((kind for words, kind in SHORTAGES.items() if words in text), None)
