"""Products with planes on a GPU: ``torch.ops.matquant.linear``, which reads the bits of one width and no others.

The width is a number in GPU memory that a kernel reads when it runs. So a captured CUDA graph or a compiled model
switches width by ``select``, without being captured again. On CUDA the Triton kernels run (gpu_launch.py). On a CPU
the same operator multiplies by the dense weight, a slow reference for tests and for tools that trace a model.

Shapes: N out features, K in features, T tokens.
"""

import dataclasses
import functools
import importlib
import importlib.util
from typing import Any

import torch

from matquant.backends import gpu_layout
from matquant.backends.backend import Backend, names
from matquant.backends.gpu_layout import Resident, load_resident, read, rounded
from matquant.core.tensor import NestedTensor

DTYPES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability of the first cards with tensor cores for int8 and bfloat16
TORCH: Any = torch.library  # without types
LIBRARY = TORCH.Library("matquant", "FRAGMENT")  # keeps the operators registered while it lives
LIBRARY.define(
    "linear(Tensor x, Tensor planes, Tensor affine, Tensor widths, Tensor bits, int rows, int group, str grid, "
    "str activations) -> Tensor"
)
LIBRARY.define(
    "rows(Tensor ids, Tensor planes, Tensor affine, Tensor widths, Tensor bits, int rows, int columns, int group, "
    "str grid) -> Tensor"
)


def linear(x: torch.Tensor, weight: Resident, *, activations: str = "float") -> torch.Tensor:
    """Return x [..., K] times the transposed weight at the width ``weight.bits``: [..., N] in the dtype of x.

    activations: "float", or "int8" to round x per token and 128 inputs first. The caller has checked device and shape.
    """
    parts = (weight.planes, weight.affine, weight.widths, weight.bits)
    y: torch.Tensor = torch.ops.matquant.linear(x, *parts, weight.rows, weight.group, weight.grid, activations)
    return y


def _linear_dense(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Multiply by the dense weight in float32, on any device."""
    *parts, activations = rest
    fields = ("planes", "affine", "widths", "bits", "rows", "group", "grid")
    weight = Resident(columns=x.shape[-1], **dict(zip(fields, parts, strict=True)))
    values = x.reshape(-1, weight.columns).float()
    if activations == "int8":
        values = rounded(values)
    return torch.nn.functional.linear(values, read(weight)).to(x.dtype).view(*x.shape[:-1], weight.rows)


def _linear_cuda(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Run the Triton kernels."""
    y: torch.Tensor = _kernels().linear(x, *rest)
    return y


@functools.cache
def _kernels() -> Any:
    """Import the kernels at their first use: Triton takes a second to import."""
    return importlib.import_module("matquant.backends.gpu_launch")


def _linear_fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Return the shape of the result, for tracing."""
    rows: int = rest[4]
    return x.new_empty(*x.shape[:-1], rows)


def _rows(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
    """Read rows of a weight; ids: integers, flat."""
    fields = ("planes", "affine", "widths", "bits", "rows", "columns", "group", "grid")
    return read(Resident(**dict(zip(fields, rest, strict=True))), ids)


def _rows_fake(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
    columns: int = rest[5]
    return ids.new_empty(len(ids), columns, dtype=torch.float32)


LIBRARY.impl("rows", _rows, "CompositeExplicitAutograd")
TORCH.register_fake("matquant::rows", _rows_fake, lib=LIBRARY)
LIBRARY.impl("linear", _linear_dense, "CPU")
LIBRARY.impl("linear", _linear_cuda, "CUDA")
TORCH.register_fake("matquant::linear", _linear_fake, lib=LIBRARY)


def pack(tensor: NestedTensor, /, *, device: torch.device | str) -> Resident:
    """Put a nested weight on ``device``; see ``gpu_layout.load_resident``."""
    return load_resident(tensor, device=device)


def select(weight: Resident, bits: int) -> None:
    """Set the width at which a weight is read from now on, by captured graphs too."""
    weight.bits.fill_(bits)


def matmul(weight: Resident, x: torch.Tensor, /, *, bits: int | None, activations: str) -> torch.Tensor:
    """Return x [..., K] -> [..., N] in the dtype of x."""
    return linear(x, _at(weight, bits), activations=activations)


def rows(weight: Resident, ids: torch.Tensor, /, *, bits: int | None) -> torch.Tensor:
    """Return float32 [..., K] for ids [...], equal to the rows of ``NestedTensor.read`` bit for bit."""
    parts = (weight.planes, weight.affine, weight.widths, _at(weight, bits).bits)
    shape = (weight.rows, weight.columns, weight.group, weight.grid)
    found: torch.Tensor = torch.ops.matquant.rows(ids.reshape(-1), *parts, *shape)
    return found.view(*ids.shape, weight.columns)


def dense(weight: Resident, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [N, K] at the selected width."""
    if weight.planes.device.type == "cpu":
        return read(weight).to(dtype)
    parts = (weight.planes, weight.affine, weight.widths, weight.bits)
    found: torch.Tensor = _kernels().dense(*parts, weight.rows, weight.columns, weight.group, weight.grid, dtype)
    return found


def why_not(device: torch.device | str, dtype: torch.dtype, activations: str) -> str | None:
    """See ``Backend.why_not``. A CPU runs the dense reference in any dtype, if it is asked for."""
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"kernels run on cuda, found {device}"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    reason = _why_not_card(device)
    if reason is not None:
        return reason
    if dtype not in DTYPES and not (activations == "int8" and dtype == torch.float32):
        return f"kernels take bfloat16 and float16, and float32 with int8 activations; found {names([dtype])}"
    return None


@functools.cache
def _why_not_card(device: torch.device) -> str | None:
    """Return why kernels cannot run on this card; None if they can."""
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        return f"kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, {device} has {found[0]}.{found[1]}"
    if importlib.util.find_spec("triton") is None:
        return "kernels need triton, which is not installed"
    return None


def why_not_weight(tensor: NestedTensor) -> str | None:
    """See ``Backend.why_not_weight``."""
    columns = tensor.codes.shape[-1]
    group = columns // tensor.scale.shape[-1]
    return gpu_layout.why_not(rule=tensor.rule, grid=tensor.grid, group=group, columns=columns)


def describe(count: int, activations: str) -> str:
    """See ``Backend.describe``."""
    return f"planes on the device for {count} layers, {activations} activations"


def _at(weight: Resident, bits: int | None) -> Resident:
    """Return the weight with another width to read at, without a copy; None: the selected one."""
    return weight if bits is None else dataclasses.replace(weight, bits=_width(bits, weight.bits.device))


@functools.cache
def _width(bits: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([bits], dtype=torch.int32, device=device)


BACKEND = Backend(
    pack=pack,
    matmul=matmul,
    rows=rows,
    why_not=why_not,
    describe=describe,
    activations=("float", "int8"),
    devices=("cuda",),
    why_not_weight=why_not_weight,
    select=select,
    dense=dense,
)
