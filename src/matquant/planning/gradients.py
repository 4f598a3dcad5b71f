"""Estimate from gradients what each layer loses at each width: one pass, not one evaluation per layer and width.

Near the 8-bit model the KL to it is a quadratic form of its Fisher information, per token

    KL(p || q) = 1/2 E[(g . d)^2],   g: the gradient of log p(y), y drawn from p;   d: the change of the weights

For a linear layer with inputs x_t and output gradients g_t, g . d is the sum over tokens of g_t (d x_t). Products of
different tokens are left out, so a single draw gives a term for every token (the "expand" setting of K-FAC, Eschenhagen
et al. 2023). Far from the 8-bit model, at narrow widths, estimates are too large.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from matquant.core.nest import MASTER_BITS
from matquant.format.read import Checkpoint
from matquant.hf_torch.arrays import nested_to_torch
from matquant.hf_torch.layers import decoder_layers, linear_views
from matquant.hf_torch.layerwise import Call, embed, finish
from matquant.planning.experts import Watched, expert_losses, watched

BATCH_TOKENS = 1024  # run through a layer at once, forwards and backwards

Sums = dict[str, torch.Tensor]  # path -> g_t (d x_t), float32 [tokens, widths]


def estimable(model: Any, paths: Iterable[str]) -> tuple[str, ...]:
    """Return the paths that are linear layers inside a decoder layer: no embedding, head or part of a fused tensor."""
    modules = {
        f"{name}.{inner}": module for name, layer in decoder_layers(model) for inner, module in layer.named_modules()
    }
    return tuple(path for path in paths if isinstance(modules.get(path), torch.nn.Linear))


def estimate(
    checkpoint: Checkpoint,
    model: Any,
    tokens: np.ndarray,
    widths: Sequence[int],
    *,
    paths: Sequence[str],
    experts: bool = False,
    seed: int = 0,
) -> Callable[[Sequence[str]], np.ndarray | None]:
    """Return a function of a group of ``paths``: its estimated KL at every width, all else at 8 bits, float64 [widths]
    in nats per token; None for groups without an estimate. experts: each expert's weights are such a group too.

    model: the checkpoint with dense weights (``matquant.load(kernels="none")``); it is left at 8 bits. tokens: int64
    [samples, T + 1]. paths: from ``estimable``. Memory: hidden states at every layer, 4 bytes x tokens x H x layers.
    """
    model.set_bits(MASTER_BITS)
    ids = torch.from_numpy(tokens[:, :-1]).to(model.device)
    batches = torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1]))
    layers = decoder_layers(model)
    states, calls = embed(model, batches)
    inputs = [states]
    with torch.no_grad():
        for call, (_, layer) in zip(calls, layers, strict=True):
            states = [call(layer, batch) for batch in states]
            inputs.append(states)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    gradients = [_score(model, part, last, generator) for part, last in zip(batches, inputs.pop(), strict=True)]
    sums: Sums = {}
    alone: dict[tuple[str, ...], np.ndarray] = {}
    views = linear_views(model) if experts else {}
    for call, (name, layer) in zip(reversed(calls), reversed(layers), strict=True):
        changes = {path: _changes(checkpoint, path, widths, model) for path in paths if path.startswith(f"{name}.")}
        watches = watched(model, name, views) if experts else []
        gradients = _backwards(call, layer, name, inputs.pop(), gradients, changes, sums, watches)
        for watch in watches:
            alone |= expert_losses(checkpoint, watch, widths, tokens=ids.numel())

    def of(group: Sequence[str]) -> np.ndarray | None:
        if tuple(sorted(group)) in alone:
            return alone[tuple(sorted(group))]
        if not set(group) <= sums.keys():
            return None
        total = sum((sums[path] for path in group), torch.zeros(()))
        mean: np.ndarray = total.double().square().mean(0).div(2).cpu().numpy()
        return mean

    return of


def _score(model: Any, ids: torch.Tensor, states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the gradient of the log-probability of tokens drawn from the model, by the last layer's output."""
    states = states.detach().requires_grad_()
    logits = finish(model, ids, states).float()
    drawn = torch.multinomial(logits.detach().softmax(-1).flatten(0, 1), 1, generator=generator)
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1).flatten(0, 1).gather(1, drawn).sum(), states)
    return gradient


def _changes(checkpoint: Checkpoint, path: str, widths: Sequence[int], model: Any) -> list[torch.Tensor | None]:
    """Return what each width changes in a weight, float32 [O, I]; None for nothing."""
    tensor = nested_to_torch(checkpoint.nested(path), device=model.device)
    whole = tensor.read(MASTER_BITS)
    return [None if bits == MASTER_BITS else tensor.read(bits) - whole for bits in widths]


def _backwards(
    call: Call,
    layer: torch.nn.Module,
    name: str,
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    changes: Mapping[str, Sequence[torch.Tensor | None]],
    sums: Sums,
    watches: Sequence[Watched],
) -> list[torch.Tensor]:
    """Run one layer backwards, batch by batch; fill ``sums`` and ``watches``, return the gradients of its inputs."""
    parts: dict[str, list[torch.Tensor]] = {path: [] for path in changes}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            def add(gradient: torch.Tensor) -> None:
                parts[path].append(_terms(args[0], gradient, changes[path]))

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    hooks = [layer.get_submodule(path[len(name) + 1 :]).register_forward_hook(watch(path)) for path in changes]
    hooks += [watch.module.register_forward_hook(watch.hook) for watch in watches]
    found: list[torch.Tensor] = []
    try:
        for states, gradient in zip(inputs, gradients, strict=True):
            states = states.detach().requires_grad_()
            found += torch.autograd.grad(call(layer, states), states, gradient)
    finally:
        for hook in hooks:
            hook.remove()
    sums.update((path, torch.cat(terms)) for path, terms in parts.items())
    return found


def _terms(inputs: torch.Tensor, gradient: torch.Tensor, changes: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Return g_t (d x_t) for every token and change, float32 [tokens, widths]."""
    inputs, gradient = inputs.detach().flatten(0, -2), gradient.flatten(0, -2)
    none = torch.zeros(len(inputs), device=inputs.device)
    terms = [none if change is None else ((gradient @ change) * inputs).sum(-1) for change in changes]
    return torch.stack(terms, 1)
