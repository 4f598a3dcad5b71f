"""Serving: the native decode step and the code around it, in numpy and C++. Never imports torch."""

from matquant.engine.engine import Engine

__all__ = ["Engine"]
