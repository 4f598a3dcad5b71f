"""The processes of one run, as torchrun describes them in the environment. Needs no torch.

torchrun starts the same command several times and gives each process a RANK below WORLD_SIZE, and the address at which
they meet. Without these variables a run is one process of rank 0. Only rank 0 writes files that all processes share.

Only the commands and functions that share their work ask for it (``shared``). All others run in each process as if it
were alone, as in anybody's script that torchrun starts.
"""

import contextlib
import os
from collections.abc import Iterator

from matquant.system.errors import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # all are set by torchrun
_sharing = [False]


def share() -> None:
    """Share the work of this process's run, from now on, with the other processes that torchrun started."""
    _sharing[0] = True


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Within this context share the work with the other processes that torchrun started."""
    before = _sharing[0]
    _sharing[0] = True
    try:
        yield
    finally:
        _sharing[0] = before


def started() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return _number("WORLD_SIZE") if all(name in os.environ for name in VARIABLES) else 1


def count() -> int:
    """Return the number of processes that share this run."""
    return started() if _sharing[0] else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return _number("RANK") if count() > 1 else 0


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return _number("LOCAL_RANK") if count() > 1 else 0


def leads() -> bool:
    """Return whether this process writes the shared files and reports progress."""
    return rank() == 0


def check_single(verb: str) -> None:
    """Raise InputError for a command that runs in one process, if there are several."""
    if started() > 1:
        raise InputError(
            f"{verb} runs in one process, found WORLD_SIZE={started()}; start it without torchrun "
            "(quantize and eval can share their work)"
        )


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise InputError(f"the environment has {name}={value!r}, not a number; unset it, or start with torchrun")
    return int(value)
