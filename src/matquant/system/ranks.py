"""The processes of one run, as torchrun describes them in the environment. Needs no torch.

torchrun starts the same command several times and gives each process a RANK below WORLD_SIZE, and the address at which
they meet. Without these variables a run is one process of rank 0. Only rank 0 writes files that all processes share.
"""

import os

from matquant.system.errors import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # all are set by torchrun


def count() -> int:
    """Return the number of processes of this run."""
    return _number("WORLD_SIZE") if all(name in os.environ for name in VARIABLES) else 1


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
    if count() > 1:
        raise InputError(
            f"{verb} runs in one process, found WORLD_SIZE={count()}; start it without torchrun (quantize and eval can "
            "share their work among processes)"
        )


def _number(name: str) -> int:
    value = os.environ[name]
    if not value.isdecimal():
        raise InputError(f"the environment has {name}={value!r}, not a number; unset it, or start with torchrun")
    return int(value)
