"""torch modules whose weight stays packed: a linear layer and an embedding, at a width that may change.

The width is an argument of the product or lookup, so switching costs nothing. Two kinds of calls of a linear layer make
the dense weight and use torch's product: calls that need gradients, and calls with many bfloat16 tokens and float
activations, for which torch uses hardware that the native kernels do not. N out features or tokens of the vocabulary, K
in features or hidden size.
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
        self.bits = MASTER_BITS
        self.dtype, self.device = like.weight.dtype, like.weight.device
        self._tensor, self._packed, self._backend = tensor, packed, backend

    @property
    def weight(self) -> torch.Tensor:
        """Return the dense weight [N, K] at ``bits`` bits; a new tensor every time."""
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
        self._check(x)
        tokens = x.numel() // self.in_features
        many = self.activations == "float" and x.dtype == torch.bfloat16 and tokens >= DENSE_TOKENS
        if many or (x.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)
        y = self._backend.matmul(self._packed, x, bits=self.bits, activations=self.activations)
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
        obstacle = self._backend.why_not(x.device, x.dtype)
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
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise InputError(f"token ids must be from 0 to {self.num_embeddings - 1}")
        rows = self._backend.rows(self._packed, ids, bits=self.bits).to(self.dtype)
        return rows if self.scale is None else rows * torch.as_tensor(self.scale, dtype=self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"
