"""torch modules whose weight stays packed: a linear layer and an embedding, at a width that may change.

The width is an argument of the product or lookup, or a number in the device's memory, so switching costs nothing. Two
kinds of calls of a linear layer make the dense weight and use torch's product: calls that need gradients, and calls of
the native kernels with many bfloat16 tokens and float activations, for which torch uses hardware that they do not. N
out features or tokens of the vocabulary, K in features or hidden size.
"""

from typing import Any

import torch

from matquant.backends.backend import Backend
from matquant.core.nest import MASTER_BITS
from matquant.core.tensor import NestedTensor
from matquant.system.errors import InputError

DENSE_TOKENS = 256  # from here on torch's bfloat16 product is faster, including making the weight
WITHOUT = "load the model with kernels='none'"


class NestedWeight(torch.nn.Module):
    """A module with a fixed packed weight [N, K]. ``bits`` may be set at any time.

    tensor: the nested weight, numpy. packed: the same, packed by ``backend``; modules may share it. like: the module to
    replace, which gives dtype and device of the dense ``weight``, made on access.
    """

    def __init__(self, tensor: NestedTensor, packed: Any, like: Any, *, backend: Backend) -> None:
        super().__init__()
        self.dtype, self.device = like.weight.dtype, like.weight.device
        self._tensor, self._packed, self._backend = tensor, packed, backend
        self.bits = MASTER_BITS

    @property
    def bits(self) -> int:
        """Return the width."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self._bits = bits
        if self._backend.select is not None:
            self._backend.select(self._packed, bits)

    @property
    def _given(self) -> int | None:
        """Return the width as an argument; None if the packed weight knows it, so that nothing traced depends on it."""
        return self._bits if self._backend.select is None else None

    @property
    def weight(self) -> torch.Tensor:
        """Return the dense weight [N, K] at ``bits`` bits; a new tensor every time."""
        if self._backend.dense is not None:
            return self._backend.dense(self._packed, self.dtype)
        return torch.from_numpy(self._tensor.read(self.bits)).to(device=self.device, dtype=self.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # True requests the model's live tensors, and there are none
            destination[f"{prefix}weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:
            raise InputError(f"{prefix}weight cannot be loaded: the codes are fixed; {WITHOUT}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


class NestedLinear(NestedWeight):
    """y = x W_bits^T + bias, the weight fixed; activations: one of ``backend.activations``."""

    def __init__(self, tensor: NestedTensor, packed: Any, like: Any, *, backend: Backend, activations: str) -> None:
        super().__init__(tensor, packed, like, backend=backend)
        self.out_features, self.in_features = tensor.codes.shape
        self.activations = activations
        self.bias = like.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., K] -> [..., N] in the dtype of x. InputError for unsupported devices and dtypes."""
        if not torch.compiler.is_compiling():
            self._check(x)
        tokens = x.numel() // self.in_features
        many = (
            self.activations == "float"
            and self._backend.select is None
            and x.dtype == torch.bfloat16
            and tokens >= DENSE_TOKENS
        )
        if many or (x.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)
        y = self._backend.matmul(self._packed, x, bits=self._given, activations=self.activations)
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, activations={self.activations}"
        )

    def _check(self, x: torch.Tensor) -> None:
        """Raise InputError unless the backend supports x: the backend checks nothing."""
        obstacle = self._backend.why_not(x.device, x.dtype, self.activations)
        if obstacle is not None:
            raise InputError(f"the kernels of this layer do not support its input: {obstacle}; {WITHOUT}")
        if x.shape[-1] != self.in_features:
            raise InputError(f"the input must be [..., {self.in_features}], found {list(x.shape)}")


class NestedEmbedding(NestedWeight):
    """The rows of a fixed weight, times ``scale`` (a number or None, of families that scale in their embedding)."""

    def __init__(self, tensor: NestedTensor, packed: Any, like: Any, *, backend: Backend) -> None:
        super().__init__(tensor, packed, like, backend=backend)
        self.num_embeddings, self.embedding_dim = tensor.codes.shape
        self.scale = getattr(like, "embed_scale", None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return ids, integers [...] -> [..., K] in the model's dtype. InputError for ids outside the vocabulary."""
        # A GPU checks ids itself, and to look at them here would make the processor wait for it.
        readable = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise InputError(f"token ids must be from 0 to {self.num_embeddings - 1}")
        rows = self._backend.rows(self._packed, ids, bits=self._given).to(self.dtype)
        return rows if self.scale is None else rows * torch.as_tensor(self.scale, dtype=self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"
