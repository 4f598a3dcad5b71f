"""Modules that are imported at their first use.

Beside ``if TYPE_CHECKING: from matquant.measure import run``, which editors and mypy follow, an
``else: run = lazy("matquant.measure.run")`` costs nothing until ``run`` is used.
"""

import importlib
from typing import Any

from matquant.system.errors import InputError
from matquant.system.startup import leave_on_interrupt


class Lazy:
    """Stands for a module of ours; any attribute imports it. InputError if it needs a package that is missing."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_load(self._name), attribute)


def lazy(name: str) -> Any:
    """A stand-in for the module ``name``."""
    return Lazy(name)


def _load(name: str) -> Any:
    try:
        with leave_on_interrupt():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("matquant"):
            raise
        raise InputError(f"this needs {error.name}, which is not installed; pip install 'matquant[train]'") from None
