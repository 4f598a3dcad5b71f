"""Serving: the native decode step and what surrounds it. numpy and C++, never torch."""
