"""What each expert of a sparse layer loses at each width, and how often it is chosen.

An expert's output y at a narrower width differs only for the tokens that the router sends to it. With the gradient g_t
of log p by the layer's output and the router's weight a_t, the KL of the model is, per token of the text, about

    1/2 mean over all tokens of (g_t . a_t (y_t(r) - y_t(8)))^2,   0 where the expert is not chosen

so routing frequency is part of it. Within the expert nothing is linearised. gradients.py does linear layers.
Shapes: T tokens, H hidden features.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from matquant.core.experts import expert_name
from matquant.core.nest import MASTER_BITS
from matquant.format.read import Checkpoint
from matquant.hf_torch.arrays import nested_to_torch
from matquant.hf_torch.experts import expert_count, is_experts, is_transposed
from matquant.hf_torch.layers import decoder_layers, linear_views
from matquant.hf_torch.views import View
from matquant.methods.parts.experts import paths_by_expert, product, routed

Seen = tuple[tuple[torch.Tensor, ...], torch.Tensor]  # inputs of a module of fused experts, gradient of its output


@dataclass
class Watched:
    """A module of fused experts, and what passed through it."""

    module: Any
    experts: Mapping[str, tuple[int, Mapping[str, View]]]  # expert's name -> its number, its weights by path
    seen: list[Seen] = field(default_factory=list)

    def hook(self, module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Keep the inputs and, once it is known, the gradient of the output; a forward hook."""
        kept = tuple(tensor.detach() for tensor in args)
        output.register_hook(lambda gradient: self.seen.append((kept, gradient)))  # type: ignore[no-untyped-call]


def watched(model: Any, layer: str, views: Mapping[str, View]) -> list[Watched]:
    """Return the modules of fused experts in a decoder layer. views: of all linear layers of the model."""
    found = []
    for name, module in model.get_submodule(layer).named_modules(prefix=layer):
        if is_experts(name):
            experts = {}
            for number, paths in paths_by_expert(module, name, views).items():
                weights = {path: views[path] for path in (*paths.first, *paths.last)}
                experts[expert_name(next(iter(weights))) or f"{name}.{number}"] = (number, weights)
            found.append(Watched(module, experts))
    return found


def expert_losses(
    checkpoint: Checkpoint, watch: Watched, widths: Sequence[int], *, tokens: int
) -> dict[tuple[str, ...], np.ndarray]:
    """Return the sorted paths of each expert -> its estimated KL at every width, float64 [widths], nats per token.

    tokens: of the whole text. The module's weights are at 8 bits before and after.
    """
    found = {}
    for number, views in watch.experts.values():
        paths = tuple(sorted(path for path in views if path in checkpoint.shapes))
        if not paths:
            continue
        nested = {path: nested_to_torch(checkpoint.nested(path), device=watch.seen[0][1].device) for path in paths}
        chosen = [_chosen(watch.module, *seen, number) for seen in watch.seen]
        outputs = {}
        for bits in dict.fromkeys((*widths, MASTER_BITS)):  # ends at 8 bits
            with torch.no_grad():
                for path in paths:
                    view = views[path]
                    parameter = watch.module.get_parameter(view.parameter.rpartition(".")[2])
                    view.of(parameter).copy_(nested[path].read(bits))
                outputs[bits] = [_output(watch.module, rows, number) for rows, _ in chosen]
        with torch.no_grad():
            squares = [
                sum(
                    float(((narrow - wide) * gradient).sum(-1).double().square().sum())
                    for narrow, wide, (_, gradient) in zip(outputs[bits], outputs[MASTER_BITS], chosen, strict=True)
                )
                for bits in widths
            ]
        found[paths] = np.array(squares) / 2 / tokens
    return found


def routing(model: Any, batches: Iterable[torch.Tensor]) -> dict[str, float]:
    """Return the share of tokens that chooses each expert, by its name; empty for a dense model."""
    counts: dict[str, int] = {}
    views = linear_views(model)
    modules = [part for name, _ in decoder_layers(model) for part in watched(model, name, views)]

    def count(watch: Watched, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        for expert, (number, _) in watch.experts.items():
            rows, _ = routed(module, args, number)
            counts[expert] = counts.get(expert, 0) + len(rows)

    handles = [part.module.register_forward_pre_hook(functools.partial(count, part)) for part in modules]
    tokens = 0
    try:
        with torch.no_grad():
            for ids in batches if modules else ():
                model(input_ids=ids, use_cache=False)
                tokens += ids.numel()
    finally:
        for handle in handles:
            handle.remove()
    return {expert: seen / tokens for expert, seen in counts.items()}


def _chosen(
    module: Any, args: tuple[torch.Tensor, ...], gradient: torch.Tensor, expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs [T, H] of an expert and the gradient [T, H] of its output. args: see ``routed``."""
    rows, tokens = routed(module, args, expert)
    if len(args) == 1:
        return rows, gradient.view(expert_count(module), -1, gradient.shape[-1])[expert][tokens]
    chosen = args[1][tokens] == expert
    return rows, gradient[tokens] * args[2][tokens][chosen][:, None]


def _output(module: Any, rows_TH: torch.Tensor, expert: int) -> torch.Tensor:
    """Return an expert's output [T, H], before the router's weight."""
    weight, bias = module.down_proj[expert], getattr(module, "down_proj_bias", None)
    found = product(module, rows_TH, expert) @ (weight if is_transposed(module) else weight.T)
    found = found if bias is None else found + bias[expert]
    if getattr(module, "has_post_expert_norm", False):
        found = module.post_expert_norm(found)
    return found  # type: ignore[no-any-return]
