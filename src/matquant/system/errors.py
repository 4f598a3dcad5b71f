"""Errors for users' mistakes. A message says what is wrong, what was found and what to do."""

import math


class InputError(ValueError):
    """An input that cannot be used. The command line prints the message without a traceback and exits with 2."""


class InputTypeError(InputError, TypeError):
    """An argument has the wrong type."""


class InUseError(InputError, RuntimeError):
    """An object that serves one thread at a time is in use by another thread."""


def check_positive(**numbers: float) -> None:
    """Raise InputError unless every number is finite and above 0."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise InputError(f"{name}={value}; give a number above 0")
