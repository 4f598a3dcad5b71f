"""The user's mistakes. Each message has three parts: what was asked, what was found, what would do."""

import math


class InputError(ValueError):
    """Something the user gave cannot be used. The command line prints it without a traceback and exits with 2."""


class InputTypeError(InputError, TypeError):
    """An argument of a wrong type."""


class InUseError(InputError, RuntimeError):
    """Something that serves one thread at a time is used by another."""


def check_positive(**numbers: float) -> None:
    """InputError unless every number is finite and above 0."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name}={value}; give a number above 0")
