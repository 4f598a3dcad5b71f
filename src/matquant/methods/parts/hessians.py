"""The Hessian H = X^T X of a linear layer's inputs, and the factor with which GPTQ compensates errors.

H is summed over the calibration tokens, once per decoder layer, from the inputs of the model at its widest width.
Linear layers with the same input share one H and one factor, which saves a quarter of the Cholesky work of a Llama
layer. The factor is U, upper triangular, with U^T U = (H + damping)^-1 (Frantar et al. 2022, Alg. 1).

A few tokens, above all the first of a sequence, have hidden states hundreds of times as long as all others (Sun et al.
2024, "Massive activations in large language models"). X^T X is then the error of these tokens alone in the feed-forward
layers that make them. So there inputs are multiplied by rms(h)^-1/4, where h is the decoder layer's output for the
token; attention counts every token alike, because its keys and values are read by the others (experiments/log.md).
Shapes: B sequences, K in features, T tokens.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from matquant.distributed.collect import total_values
from matquant.distributed.sums import Sums
from matquant.hf_torch.experts import is_experts
from matquant.hf_torch.layers import is_attention
from matquant.methods.parts.blocks import Block
from matquant.methods.parts.experts import Paths, paths_by_expert, product, routed
from matquant.system.errors import InputError

DAMP_LIMIT = 1.0  # with more damping than the mean diagonal the Hessian carries no information
SHRINK = 0.25  # power of the root mean square of a token's hidden states by which its feed-forward inputs are divided


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


@dataclass(frozen=True, kw_only=True)
class Hessians:
    """The Hessians of a block's linear layers."""

    of: dict[str, torch.Tensor]  # leader's path -> X^T X [K, K], float32, on the block's device
    leaders: Mapping[str, str]  # path -> the path whose Hessian it shares
    few: Mapping[str, int] = field(default_factory=dict)  # expert's name -> its tokens, fewer than in features
    experts: int = 0  # number of fused experts of the block


def collect_hessians(block: Block) -> Hessians:
    """Return the Hessians of every linear layer's inputs, sums over the sequences of all processes.

    Linear layers with the same input share one. Fused experts see the tokens routed to them, or if these are fewer than
    their in features, all tokens of the layer (experts.py).
    """
    sums = _Sums(block)
    hessians = sums.run()
    missing = sorted(set(block.views) - set(sums.leaders))
    if missing:
        raise InputError(
            f"method 'gptq' cannot observe the inputs of {missing[0]}; use --exclude for it, or --method rtn"
        )
    tokens = total_values(sums.tokens)
    few = {path: expert for path, expert in sums.expert_of.items() if tokens[expert] < block.views[path].shape[1]}
    if few:
        wide = _Sums(block, wide=few)
        hessians |= wide.run()
        sums.leaders |= wide.leaders
    for hessian in hessians.values():
        if not hessian.diagonal().any():
            hessian.fill_diagonal_(1.0)  # only zeros reach this weight: round to nearest
    return Hessians(
        of={leader: hessians[leader] for leader in sums.leaders.values()},
        leaders=sums.leaders,
        few={expert: int(tokens[expert]) for expert in dict.fromkeys(few.values())},
        experts=len(tokens),
    )


@dataclass
class _Sums:
    """The Hessians of a block while its forward passes run, and the hooks that add to them.

    wide: the only paths to observe, all of experts, with all tokens of the layer as their inputs.
    """

    block: Block
    wide: Mapping[str, str] | None = None
    sums: dict[str, tuple[Sums, torch.Tensor]] = field(default_factory=dict)  # leader's path -> X^T X, one like it
    leaders: dict[str, str] = field(default_factory=dict)  # path -> the path whose Hessian it shares
    expert_of: dict[str, str] = field(default_factory=dict)  # path -> expert's name
    tokens: dict[str, float] = field(default_factory=dict)  # expert's name -> tokens that reached it, of this process
    # Inputs of this forward pass, by id and kind; kept alive so that ids are not reused.
    given: dict[tuple[int, bool], tuple[str, torch.Tensor]] = field(default_factory=dict)
    # Feed-forward inputs of this forward pass: the paths that read them, what makes them, [B, ..., T, K] or [T, K], and
    # the numbers of their tokens; None: all tokens, in order.
    waiting: list[tuple[list[str], Callable[[], torch.Tensor], torch.Tensor | None]] = field(default_factory=list)

    def run(self) -> dict[str, torch.Tensor]:
        """Run the block on its one stream; return the Hessians, float32, with what the other processes have."""
        (states,) = self.block.inputs.values()
        handles = self._watch()
        try:
            with torch.no_grad():
                for batch in states:
                    self._add_weighted(self.block.call(self.block.module, batch))
            return self._totals()
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self) -> list[Any]:
        """Hook every linear layer and every module of fused experts that is observed; return the handles."""
        views = self.block.views
        paths = {view.parameter.removesuffix(".weight"): path for path, view in views.items()}
        handles = []
        for local, module in self.block.module.named_modules():
            name, hook = f"{self.block.name}.{local}", None
            if name in paths and isinstance(module, torch.nn.Linear) and self.wide is None:
                hook = functools.partial(self._linear, path=paths[name])
            elif is_experts(name) and (experts := paths_by_expert(module, name, views, only=self.wide)):
                for expert, found in experts.items():
                    self.expert_of |= dict.fromkeys([*found.first, *found.last], f"{name}.{expert}")
                    self.tokens[f"{name}.{expert}"] = 0.0
                hook = functools.partial(self._experts if self.wide is None else self._all_tokens, experts=experts)
            if hook is not None:
                handles.append(module.register_forward_pre_hook(hook))
        return handles

    def _totals(self) -> dict[str, torch.Tensor]:
        totals = {}
        for path in list(self.sums):
            sums, like = self.sums.pop(path)
            (totals[path],) = sums.total([like])
        return totals

    def _add_weighted(self, outputs_BTH: torch.Tensor) -> None:
        """End a forward pass: add the feed-forward inputs, weighted by the layer's outputs."""
        weights_BT1 = (outputs_BTH.float().square().mean(-1, keepdim=True) + 1e-6) ** (-SHRINK / 2)
        for paths, make, tokens in self.waiting:
            inputs = make()
            if tokens is not None:
                inputs = inputs * weights_BT1.flatten(0, 1)[tokens]
            elif inputs.shape[:-1].numel() == weights_BT1.numel():  # else some tokens, and which ones is not known
                inputs = inputs * weights_BT1.view(*inputs.shape[:-1], 1)
            self._add(paths, inputs)
        self.waiting.clear()
        self.given.clear()

    def _add(self, paths: list[str], inputs: torch.Tensor) -> None:
        """Add the product of each sequence of [B, ..., T, K], or of tokens [T, K], to the Hessian that ``paths`` share;
        the first one leads."""
        if not paths:
            return
        self.leaders |= dict.fromkeys(paths, paths[0])
        for inputs_TK in inputs.flatten(1, -2) if inputs.ndim > 2 else inputs[None]:
            product = inputs_TK.T @ inputs_TK
            if paths[0] not in self.sums:
                self.sums[paths[0]] = Sums(self.block.share.ranges), product.new_empty(()).expand(product.shape)
            self.sums[paths[0]][0].add([product])

    def _linear(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], path: str) -> None:
        attention = is_attention(path)
        leader, _ = self.given.setdefault((id(args[0]), attention), (path, args[0]))
        self.leaders[path] = leader
        if leader == path and attention:
            self._add([path], args[0])
        elif leader == path:
            self.waiting.append(([path], lambda: args[0], None))

    def _experts(self, module: Any, args: tuple[torch.Tensor, ...], experts: Mapping[int, Paths]) -> None:
        for expert, paths in experts.items():
            rows, tokens = routed(module, args, expert)
            self.tokens[self.expert_of[[*paths.first, *paths.last][0]]] += len(rows)
            self._wait(module, expert, paths, rows, tokens)

    def _all_tokens(self, module: Any, args: tuple[torch.Tensor, ...], experts: Mapping[int, Paths]) -> None:
        rows, tokens = routed(module, args, None)
        self._wait(module, 0, Paths(first=[path for paths in experts.values() for path in paths.first]), rows, tokens)
        for expert, paths in experts.items():
            self._wait(module, expert, Paths(last=paths.last), rows, tokens)

    def _wait(self, module: Any, expert: int, paths: Paths, rows_TH: torch.Tensor, tokens_T: torch.Tensor) -> None:
        """Note an expert's inputs. Those of its last projection are made when they are added, one at a time."""
        if paths.first:
            self.waiting.append((paths.first, lambda: rows_TH, tokens_T))
        if paths.last:
            self.waiting.append((paths.last, functools.partial(product, module, rows_TH, expert), tokens_T))
