"""Serving: the native decode step and what surrounds it. numpy and C++, never torch."""

from matquant.runtime.engine import Engine

__all__ = ["Engine"]
