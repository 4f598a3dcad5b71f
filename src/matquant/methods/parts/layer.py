"""Run a decoder layer with replaced parameters, differentiably.

``run`` replaces the layer's parameters by folded norms and simulated weights (torch.func.functional_call), so that one
pass of autograd reaches their inputs and the layer itself is never changed. Weights are addressed by path; parts of
fused parameters (experts) are assembled.
Shapes: B sequences, T tokens, H hidden features, N out features, K in features.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from matquant.core.tensor import NestedTensor
from matquant.hf.text import batch
from matquant.hf_torch.views import View
from matquant.methods.parts.blocks import Block
from matquant.methods.parts.share import mean_over_batches
from matquant.options.objective import FLOAT
from matquant.system.errors import InputError


class Layer(torch.nn.Module):
    """A decoder layer that runs with replaced parameters. tensors: the layer's parameters, by full name."""

    def __init__(self, block: Block, dtypes: Mapping[str, torch.dtype]) -> None:
        super().__init__()
        self.layer, self.call, self.block = block.module, block.call, block
        self.tensors = {f"{block.name}.{name}": p.detach() for name, p in block.module.named_parameters()}
        self.device = next(iter(self.tensors.values())).device
        self.dtypes = dtypes
        self.power = 1.0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.call(self.layer, states)

    def run(self, states: torch.Tensor, changed: Mapping[str, torch.Tensor], *, autocast: bool) -> torch.Tensor:
        """Return the layer's output [B, T, H], float32, with the parameters ``changed`` replaced."""
        start = len(self.block.name) + 1
        own = {f"layer.{name[start:]}": tensor for name, tensor in changed.items()}
        with _autocast(self.device) if autocast else contextlib.nullcontext():
            output: torch.Tensor = torch.func.functional_call(self, own, (states,))
        return output.float()

    def inputs(self, bits: int, index: int) -> torch.Tensor:
        """Return piece ``index`` of the stream of one width."""
        return self.block.inputs[bits][index].to(self.device).float()

    def targets(self, *, autocast: bool) -> list[torch.Tensor]:
        """Return the float outputs of this process's pieces, each on the device of its inputs; sets ``power``."""
        found = self.block.inputs[FLOAT]
        with torch.no_grad():
            outputs = [self.run(self.inputs(FLOAT, index), {}, autocast=autocast) for index in range(len(found))]
        share = self.block.share
        squares = torch.stack([output.square().mean() for output in outputs])
        self.power = mean_over_batches(share, range(len(share.batches)), squares.tolist()) or 1.0
        return [output.to(states.device) for output, states in zip(outputs, found, strict=True)]

    def distances(
        self,
        nested: Mapping[str, NestedTensor],
        targets: Sequence[torch.Tensor],
        widths: Iterable[int],
        *,
        autocast: bool,
        changed: Mapping[str, torch.Tensor] | None = None,
        every: int = 1,
    ) -> dict[int, float]:
        """Return ||F_r - F||^2 / ||F||^2 of each width, read from ``nested``, over every ``every``-th batch of its
        stream.

        targets: of this process's pieces. changed: further parameters that differ from the float layer's.
        """
        share = self.block.share
        batches = range(0, len(share.batches), every)
        pieces = [piece for number in batches for piece, _ in share.batches[number]]
        found = {}
        with torch.no_grad():
            for bits in widths:
                read = self.assemble({path: tensor.read(bits) for path, tensor in nested.items()})
                losses = torch.zeros(len(targets), device=self.device)
                for piece in pieces:
                    output = self.run(self.inputs(bits, piece), {**(changed or {}), **read}, autocast=autocast)
                    losses[piece] = (output - targets[piece].to(self.device)).square().mean()
                found[bits] = mean_over_batches(share, batches, losses.tolist()) / self.power
        return found

    def order(self, step: int, seed: int) -> int:
        """Return the batch of a step, which depends only on the seed and the step."""
        return int(batch(np.arange(len(self.block.share.batches)), step, size=1, seed=seed)[0])

    def weights(self, changed: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the weights [N, K] to quantise, by path."""
        for path, view in self.block.views.items():
            tensor = changed.get(view.parameter, self.tensors[view.parameter])
            yield path, tensor if _is_whole(view, tensor) else view.of(tensor).contiguous()

    def plain(self, changed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the changed parameters that are not quantised: norms and biases."""
        taken = {view.parameter for view in self.block.views.values()}
        return {name: tensor for name, tensor in changed.items() if name not in taken}

    def assemble(self, reads: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Assemble parameters by full name from weights by path, including fused ones."""
        parts: dict[str, list[str]] = {}
        for path in reads:
            parts.setdefault(self.block.views[path].parameter, []).append(path)
        assembled = {}
        for name, paths in parts.items():
            views = [self.block.views[path] for path in paths]
            if _is_whole(views[0], self.tensors[name]):
                assembled[name] = reads[paths[0]]
            else:
                parts_of_it = (reads[path] for path in paths)
                assembled[name] = _Assemble.apply(self.tensors[name], views, *parts_of_it)  # type: ignore[no-untyped-call]
        return assembled


def check_losses(
    losses: Mapping[int, float], name: str, when: str, *, limits: Mapping[int, float] | None = None
) -> None:
    """Raise InputError if a loss is not finite, or is above twice its limit and above 1, the layer output's size."""
    for bits, loss in losses.items():
        if not math.isfinite(loss) or (limits and loss > max(1.0, 2 * limits[bits])):
            raise InputError(
                f"training of {name} diverged: its loss at {bits} bits is {loss:.3g} at {when}; "
                "use a smaller --lr and --resume (finished layers are kept)"
            )


class _Assemble(torch.autograd.Function):
    """Write weights into a copy of the fused parameter that they are parts of."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, views: list[View], *parts: torch.Tensor) -> torch.Tensor:
        ctx.views, result = views, whole.clone()
        for view, part in zip(views, parts, strict=True):
            view.of(result).copy_(part)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        gradient = gradient.contiguous()
        return None, None, *(view.of(gradient) for view in ctx.views)


def _is_whole(view: View, tensor: torch.Tensor) -> bool:
    return tensor.shape == view.shape and view.stride == (view.shape[1], 1)


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # No weight cache: it would serve one width's weights to another.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
