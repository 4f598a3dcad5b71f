"""How many threads to use: what is asked for, checked against the cores that this process may use.

More threads than cores never help. A few times as many are allowed, for they cost little (waiting threads sleep); far
more are a typing error that would exhaust the machine.
"""

import os

from matquant.system.errors import InputError, InputTypeError

PER_CORE = 4  # threads allowed for each core
ALWAYS = 16  # allowed on any machine
CEILING = 1024  # of native/core/team.hpp
VARIABLE = "OMP_NUM_THREADS"


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_threads() -> int:
    """The largest number of threads accepted here."""
    return min(max(ALWAYS, PER_CORE * cores()), CEILING)


def check_threads(threads: int | None, *, name: str = "threads") -> int:
    """``threads``, for None those of OMP_NUM_THREADS, else all cores; InputError below 1 and far beyond the cores."""
    if threads is None:
        return check_environment() or cores()
    if type(threads) is not int or threads < 1:
        raise (InputError if type(threads) is int else InputTypeError)(f"{name}={threads!r}; give a number above 0")
    if threads > most_threads():
        raise InputError(
            f"{name}={threads} is too many for {cores()} cores; use at most {most_threads()}, best one per core"
        )
    return threads


def check_environment() -> int | None:
    """The threads of OMP_NUM_THREADS, which torch obeys too; None if it is not a number above 0.

    InputError for far more than there are cores: torch would not survive them.
    """
    first = os.environ.get(VARIABLE, "").split(",")[0].strip()  # OpenMP takes a list, one number per nesting level
    return check_threads(int(first), name=VARIABLE) if first.isdecimal() and int(first) > 0 else None
