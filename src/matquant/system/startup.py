"""Guard the heavy imports: Ctrl-C ends them at once, and running out of memory or threads gives a one-line error.

Importing takes up to seconds, longer than any other part of a short command. Nothing is open or half-written then, so
Ctrl-C ends the process at once: an exception inside another package's initialisation would become a traceback, or be
swallowed.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
OWN_PAGES_BYTES = 2**25  # tensors above this, the most that glibc takes, get separate pages and always return them
NEVER = -1  # as a trim threshold
INTERRUPTED = 130  # the exit code of a program ended by Ctrl-C
SPINS = "2000"  # spins of torch's OpenMP threads before they sleep, some 30 us; the default is 300,000, milliseconds
SHORTAGES = {  # libraries' message -> the resource that the machine has run out of
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
    """End the process silently with exit code 130 on Ctrl-C. Has no effect outside the main thread."""
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
    """Let torch's threads sleep after a short spin, unless the environment sets their waiting policy.

    Beside a busy process, spinning threads take the core that the thread they wait for needs. For a command line only:
    the setting is read once, when the OpenMP library is loaded, and holds for the whole process.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep the memory of freed tensors for the next ones, instead of returning it to the system.

    The system clears each page that it hands out, which took a fifth of the CPU time of nested GPTQ and nearly half of
    that of training (SmolLM2-135M). Methods that work layer by layer return memory after each layer (parts/blocks.py),
    so that the peak does not grow with depth. For a command line only: it changes the whole process. Other C libraries
    are unaffected.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(MMAP_THRESHOLD, OWN_PAGES_BYTES)
        library.mallopt(TRIM_THRESHOLD, NEVER)


def shortage(error: BaseException) -> str | None:
    """Return a one-line message if the machine has run out of memory or threads; None for any other error.

    Libraries hide the reason of a failed import in chained errors.
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
    """Return the resource that has run out, by the error and its text."""
    if isinstance(error, MemoryError):
        return "memory"
    if not isinstance(error, (RuntimeError, ImportError, OSError)):
        return None
    return next((kind for words, kind in SHORTAGES.items() if words in text), None)
