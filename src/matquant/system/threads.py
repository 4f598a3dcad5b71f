"""Choose the number of threads, and check it against the cores that this process may use.

More threads than cores never help. A few times as many are allowed, because they cost little (waiting threads sleep);
many more are probably a typing error that would exhaust the machine.
"""

import os

from matquant.system.errors import InputError, InputTypeError

PER_CORE = 4  # threads allowed for each core
ALWAYS = 16  # allowed on any machine
CEILING = 1024  # of native/core/team.hpp
VARIABLE = "OMP_NUM_THREADS"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_threads() -> int:
    """Return the largest number of threads accepted here."""
    return min(max(ALWAYS, PER_CORE * cores()), CEILING)


def check_threads(threads: int | None, *, name: str = "threads") -> int:
    """Return ``threads``; for None, OMP_NUM_THREADS or all cores. InputError below 1 and far above the cores."""
    if threads is None:
        return check_environment() or cores()
    if type(threads) is not int or threads < 1:
        raise (InputError if type(threads) is int else InputTypeError)(f"{name}={threads!r}; give a number above 0")
    if threads > most_threads():
        raise InputError(
            f"{name}={threads} is too many for {cores()} cores; use at most {most_threads()}, ideally one per core"
        )
    return threads


def check_environment() -> int | None:
    """Return the number in OMP_NUM_THREADS, which torch obeys too; None if it is not a number above 0.

    InputError for far more threads than cores: torch would crash.
    """
    first = os.environ.get(VARIABLE, "").split(",")[0].strip()  # OpenMP takes a list, one number per nesting level
    return check_threads(int(first), name=VARIABLE) if first.isdecimal() and int(first) > 0 else None
