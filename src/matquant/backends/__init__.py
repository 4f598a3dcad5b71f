"""Backends that multiply by nested weights: BACKENDS, in order of preference.

A backend packs the codes of a weight once and multiplies by any width of them. All backends compute the same product as
``NestedTensor.read(bits)``; tests/test_contract_backends.py checks this on all codes at every width. To add one, write
a file here that ends in a Backend, and add a line below (docs/extending.md).
"""

import torch

from matquant.backends import dense, gpu, native
from matquant.backends.backend import Backend

__all__ = ["BACKENDS", "DENSE", "Backend", "choose"]

BACKENDS: dict[str, Backend] = {
    "native": native.BACKEND,
    "gpu": gpu.BACKEND,
    "dense": dense.BACKEND,
}
DENSE = "dense"  # the last row, which supports everything


def choose(device: torch.device | str, dtype: torch.dtype, *, activations: str) -> tuple[str, str]:
    """Return the first backend for ``dtype`` on ``device``, and why none before it that is for such devices serves.

    The reason is "" if the first of these serves.
    """
    kind = torch.device(device).type
    known = sorted({name for backend in BACKENDS.values() for name in backend.devices})
    reasons = [] if kind in known else [f"kernels run on {' and '.join(known)}, found {device}"]
    for name, backend in BACKENDS.items():
        if (activations in backend.activations or backend.trains) and kind in (backend.devices or (kind,)):
            reason = backend.why_not(device, dtype, activations)
            if reason is None:
                return name, (reasons or [""])[0]
            reasons.append(reason)
    raise AssertionError("the last row supports everything")
