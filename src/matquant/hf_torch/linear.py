"""A torch linear whose weight stays in bit planes: ``forward`` is one product of the native kernels.

torch and the kernels share memory by address, so a call copies nothing that is float32 already, and a width is an
argument of the call. A call that asks for gradients is a product with the dense weight, made for the call, and so is
one of many bfloat16 tokens with float activations: torch has hardware for that product, the kernels do not use it.
N out features, K in features.
"""

from collections.abc import Iterable
from typing import Any

import torch

from matquant.core.nest import MASTER_BITS
from matquant.core.tensor import NestedTensor
from matquant.system.errors import InputError

try:
    from matquant.core import planes

    MISSING = ""
except ImportError as error:  # a source tree that was never built; dense weights do without
    MISSING = f"the native extension is missing ({error})"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE_TOKENS = 256  # from here on torch's bfloat16 product is faster, the weight's making included
WITHOUT = "load the model with kernels='none'"


class NestedLinear(torch.nn.Module):
    """y = x W_bits^T + bias on a CPU, the weight fixed. ``bits`` may be set at any time.

    tensor: the nested weight, numpy; its codes are read once into planes and may be mapped from a file. activations:
    ``int8`` or ``float``, as ``planes.matmul``. dtype: of the dense ``weight``, which is made when asked for.
    """

    def __init__(
        self, tensor: NestedTensor, bias: torch.nn.Parameter | None, *, activations: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.codes.shape
        self.bits = MASTER_BITS
        self.activations = activations
        self.dtype = dtype
        self.bias = bias
        self._tensor = tensor
        self._planes = planes.load_weight(tensor)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [N, K] at ``bits`` bits; a new tensor every time."""
        return torch.from_numpy(self._tensor.read(self.bits)).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] of its dtype. InputError for other devices and dtypes."""
        self._check(x)
        tokens = x.numel() // self.in_features
        many = self.activations == "float" and x.dtype == torch.bfloat16 and tokens >= DENSE_TOKENS
        if many or (x.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)
        values = x.float().contiguous()  # x itself if it is that already
        y = torch.empty(*x.shape[:-1], self.out_features, dtype=torch.float32, device="cpu")
        planes.matmul_at(
            self._planes,
            values.data_ptr(),
            y.data_ptr(),
            tokens=tokens,
            bits=self.bits,
            activations=self.activations,
            threads=torch.get_num_threads(),
        )
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, activations={self.activations}"
        )

    def _check(self, x: torch.Tensor) -> None:
        """InputError unless x is something whose address the kernels may be given."""
        if x.device.type != "cpu":
            raise InputError(f"kernels asked on {x.device}, they run on cpu; {WITHOUT}")
        if x.dtype not in DTYPES:
            raise InputError(f"kernels asked of {x.dtype}, they take {_names(DTYPES)}; {WITHOUT}")
        if x.shape[-1] != self.in_features:
            raise InputError(f"a linear of {self.in_features} inputs asked of {list(x.shape)}; give [..., K]")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # which asks for the tensors that live in the model: there is none
            destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            raise InputError(f"{prefix}weight asked to be loaded into codes, which are fixed; {WITHOUT}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def find_obstacle(device: torch.device | str, dtype: torch.dtype) -> str:
    """Why kernels cannot serve a model of ``dtype`` on ``device``, or an empty text."""
    if MISSING:
        return MISSING
    if torch.device(device).type != "cpu":
        return f"they run on cpu, not on {device}"
    if dtype not in DTYPES:
        return f"they take {_names(DTYPES)}, not {_names([dtype])}"
    return ""


def describe(count: int, activations: str) -> str:
    """What multiplies in a model with ``count`` NestedLinears."""
    return f"{planes.isa()} kernels for {count} linears, {activations} activations"


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
