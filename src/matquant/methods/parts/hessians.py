"""The Hessian H = X^T X of a linear layer's inputs, and the factor with which GPTQ compensates errors.

H is summed over the calibration tokens, once per decoder layer, from the inputs of the model at its widest width.
Linear layers with the same input share one H and one factor, which saves a quarter of the Cholesky work of a Llama
layer. The factor is U, upper triangular, with U^T U = (H + damping)^-1 (Frantar et al. 2022, Alg. 1).
Shapes: K in features, T tokens.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from matquant.distributed.sums import Sums
from matquant.methods.parts.blocks import Block
from matquant.system.errors import InputError

DAMP_LIMIT = 1.0  # with more damping than the mean diagonal the Hessian carries no information


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A damped Hessian, ready for compensation."""

    order_K: torch.Tensor  # columns, most important first
    upper_KK: torch.Tensor  # U, rows and columns in that order
    damp: float  # damping used, in units of the mean diagonal


def inverse_factor(hessian_KK: torch.Tensor, *, damp: float, name: str = "weight", reorder: bool = True) -> Factor:
    """Return U with U^T U = (H + damp * mean diagonal)^-1.

    If H is not positive definite, damping is multiplied by ten until it is; InputError at DAMP_LIMIT. Columns without
    any input get the mean. H included, torch holds five such matrices at the peak (measured at K = 2,048).
    """
    diagonal = hessian_KK.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise InputError(
            f"the Hessian of {name} is {float(mean)} on average, so its inputs are not usable; use other text"
        )
    order = (
        diagonal.argsort(descending=True, stable=True)
        if reorder
        else torch.arange(len(diagonal), device=diagonal.device)
    )
    dead = torch.where(diagonal[order] == 0, mean, torch.zeros_like(mean))
    while damp <= DAMP_LIMIT:
        matrix = hessian_KK[order][:, order]
        matrix.diagonal().add_(dead + damp * mean)
        matrix, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            matrix = torch.cholesky_inverse(matrix)
            upper, failed = torch.linalg.cholesky_ex(matrix, upper=True)
        if not failed and bool(torch.isfinite(upper).all()):
            return Factor(order_K=order, upper_KK=upper, damp=damp)
        damp *= 10
    raise InputError(f"the Hessian of {name} is not positive definite even with damping {damp / 10:g}; give more text")


def collect_hessians(block: Block) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return X^T X [K, K] of every linear layer's inputs by leader, float32, on the block's device, and path -> leader.

    They are sums over the sequences of all processes. Linear layers with the same input share the Hessian of one path,
    their leader. Fused experts see the tokens routed to them.
    """
    (states,) = block.inputs.values()
    sums = _Sums(block)
    handles = sums.watch()
    try:
        with torch.no_grad():
            for batch in states:
                sums.given.clear()
                block.call(block.module, batch)
        hessians = sums.totals()
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(block.views) - set(sums.leaders))
    if missing:
        raise InputError(
            f"method 'gptq' cannot observe the inputs of {missing[0]}; use --exclude for it, or --method rtn"
        )
    for hessian in hessians.values():
        if not hessian.diagonal().any():
            hessian.fill_diagonal_(1.0)  # no token reached this expert: round to nearest
    return hessians, sums.leaders


@dataclass
class _Sums:
    """The Hessians of a block while its forward passes run, and the hooks that add to them."""

    block: Block
    sums: dict[str, tuple[Sums, torch.Tensor]] = field(default_factory=dict)  # leader's path -> X^T X, one like it
    leaders: dict[str, str] = field(default_factory=dict)  # path -> the path whose Hessian it shares
    # Inputs of this forward pass, by id; kept alive so that ids are not reused.
    given: dict[int, tuple[str, torch.Tensor]] = field(default_factory=dict)

    def watch(self) -> list[Any]:
        """Hook every linear layer and every module of fused experts that the block quantises; return the handles."""
        views = self.block.views
        paths = {view.parameter.removesuffix(".weight"): path for path, view in views.items()}
        handles = []
        for local, module in self.block.module.named_modules():
            name, hook = f"{self.block.name}.{local}", None
            if name in paths and isinstance(module, torch.nn.Linear):
                hook = functools.partial(self._linear, path=paths[name])
            elif name.rpartition(".")[2] == "experts" and any(
                v.parameter.startswith(f"{name}.") for v in views.values()
            ):
                hook = functools.partial(self._experts, name=name)
            if hook is not None:
                handles.append(module.register_forward_pre_hook(hook))
        return handles

    def totals(self) -> dict[str, torch.Tensor]:
        """Return the Hessians, float32, with what the other processes have."""
        totals = {}
        for path in list(self.sums):
            sums, like = self.sums.pop(path)
            (totals[path],) = sums.total([like])
        return totals

    def _add(self, path: str, inputs: torch.Tensor) -> None:
        """Add the product of each sequence of [B, T, K], or of tokens [T, K]."""
        for inputs_TK in inputs if inputs.ndim > 2 else inputs[None]:
            product = inputs_TK.T @ inputs_TK
            if path not in self.sums:
                self.sums[path] = Sums(self.block.share.ranges), product.new_empty(()).expand(product.shape)
            self.sums[path][0].add([product])

    def _linear(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], path: str) -> None:
        leader, _ = self.given.setdefault(id(args[0]), (path, args[0]))
        self.leaders[path] = leader
        if leader == path:
            self._add(path, args[0])

    def _experts(self, module: Any, args: tuple[torch.Tensor, ...], name: str) -> None:
        tokens, chosen = args[0], args[1]
        for path, view in self.block.views.items():
            if view.parameter.rpartition(".")[0] != name:
                continue
            parameter = dict(module.named_parameters())[view.parameter.rpartition(".")[2]]
            expert = view.offset // (parameter.shape[1] * parameter.shape[2])
            routed = tokens[(chosen == expert).any(-1)]
            if parameter is module.down_proj:
                gate, up = (routed @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                routed = module.act_fn(gate) * up
            self.leaders[path] = path
            self._add(path, routed)
