"""Import modules at their first use.

``if TYPE_CHECKING: from matquant.measure import run`` serves editors and mypy, and
``else: run = lazy("matquant.measure.run")`` costs nothing until ``run`` is used.
"""

import importlib
from typing import Any

from matquant.system.errors import InputError
from matquant.system.startup import leave_on_interrupt


class Lazy:
    """A stand-in for one of our modules; the first attribute access imports it. InputError if a package is missing."""

    def __init__(self, name: str, extra: str) -> None:
        self._name, self._extra = name, extra

    def __getattr__(self, attribute: str) -> Any:
        return getattr(_load(self._name, self._extra), attribute)


def lazy(name: str, *, extra: str = "train") -> Any:
    """Return a stand-in for the module ``name``. extra: what installs the packages that it needs."""
    return Lazy(name, extra)


def _load(name: str, extra: str) -> Any:
    try:
        with leave_on_interrupt():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("matquant"):
            raise
        raise InputError(f"this needs {error.name}, which is not installed; pip install 'matquant[{extra}]'") from None
