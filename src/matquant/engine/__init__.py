"""Serving: the native decode step and what surrounds it. numpy and C++, never torch."""

from matquant.engine.engine import Engine

__all__ = ["Engine"]
