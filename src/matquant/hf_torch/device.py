"""Choose the device that torch computes on, and check the processor for bf16."""

import platform

import torch

from matquant.system.errors import InputError


def bf16_is_fast() -> bool:
    """Return whether this processor multiplies bf16 in hardware.

    Other processors emulate it: a training step of the embedded model took 17 times as long as in fp32 (AVX2).
    """
    if platform.machine() in ("aarch64", "arm64"):
        return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def choose_device(name: str | None) -> torch.device:
    """Return the device of this name; None: cuda if there is one, else cpu. InputError if it is not available."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        found = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"device={name!r} is not available ({reason}); use one of {found}") from None
