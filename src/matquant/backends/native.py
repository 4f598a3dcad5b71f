"""The native kernels: codes in bit planes, of which a width reads only the first. CPU, no gradients.

torch and the kernels share memory by address, so a call copies nothing that is already float32 and contiguous.
docs/kernels.md describes the layout and the cost of each width.
"""

from typing import Any

import torch

from matquant.backends.backend import Backend, names
from matquant.core.nest import why_no_kernels
from matquant.core.tensor import NestedTensor

try:
    from matquant.core import planes

    MISSING = ""
except ImportError as error:  # a source tree that was never built
    MISSING = f"the native extension is missing ({error})"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pack(tensor: NestedTensor, /, *, device: torch.device | str) -> Any:
    """Pack the weight into bit planes, straight from a mapped file."""
    return planes.load_weight(tensor)


def matmul(weight: Any, x: torch.Tensor, /, *, bits: int, activations: str) -> torch.Tensor:
    """Return x [..., K] of one of DTYPES -> float32 [..., N]. The caller has checked device, dtype and K."""
    values = x.float().contiguous()  # no copy if x is float32 and contiguous
    y = torch.empty(*x.shape[:-1], weight.planes.rows, dtype=torch.float32, device="cpu")
    planes.matmul_at(
        weight,
        values.data_ptr(),
        y.data_ptr(),
        tokens=x.numel() // weight.planes.columns,
        bits=bits,
        activations=activations,
        threads=torch.get_num_threads(),
    )
    return y


def rows(weight: Any, ids: torch.Tensor, /, *, bits: int) -> torch.Tensor:
    """Return float32 [..., K] for ids [...], equal to the rows of ``NestedTensor.read`` bit for bit."""
    found = ids.to(torch.int64).contiguous()
    out = torch.empty(*ids.shape, weight.planes.columns, dtype=torch.float32, device="cpu")
    planes.rows_at(weight, found.data_ptr(), out.data_ptr(), count=found.numel(), bits=bits)
    return out


def why_not(device: torch.device | str, dtype: torch.dtype, activations: str) -> str | None:
    """See ``Backend.why_not``."""
    if MISSING:
        return MISSING
    if torch.device(device).type != "cpu":
        return f"kernels run on cpu, found {device}"
    if dtype not in DTYPES:
        return f"kernels take {names(DTYPES)}, found {names([dtype])}"
    return None


def describe(count: int, activations: str) -> str:
    """See ``Backend.describe``."""
    return f"{planes.isa()} kernels for {count} layers, {activations} activations"


BACKEND = Backend(
    pack=pack,
    matmul=matmul,
    rows=rows,
    why_not=why_not,
    describe=describe,
    activations=("float", "int8"),
    devices=("cpu",),
    why_not_weight=lambda tensor: why_no_kernels(tensor.grid),
)
