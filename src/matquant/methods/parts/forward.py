"""Forward passes in training: evaluation mode, outputs of the decoder layers, autocast."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from matquant.distributed.collect import exchange
from matquant.hf_torch import Model
from matquant.hf_torch.layers import decoder_layers
from matquant.hf_torch.layerwise import layer_output
from matquant.hf_torch.views import View
from matquant.hf_torch.whole_sequences import whole_sequences
from matquant.options.qat import Schedule


def prepare(model: Model, views: Mapping[str, View], schedule: Schedule) -> None:
    """Put the model into evaluation mode, without dropout; only trained parameters require gradients."""
    model.eval()
    taken = {view.parameter for view in views.values()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in taken or schedule.train_rest)
    if schedule.checkpoint_activations:
        # Nothing is random in evaluation mode, so no layer needs the random state that it had.
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for _, layer in decoder_layers(model):
            layer.training = True  # only this module: transformers checkpoints a layer only in training mode
            rates = [name for name, value in vars(layer).items() if "dropout" in name and isinstance(value, float)]
            vars(layer).update(dict.fromkeys(rates, 0.0))


@contextlib.contextmanager
def passes(model: Model, schedule: Schedule) -> Iterator[None]:
    """Run forward and backward passes within this context: rows are whole sequences, products bf16 if scheduled."""
    # No weight cache: weights change inside the context, and a cache would serve the first width's to all others.
    cast = torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False) if schedule.autocast else None
    with whole_sequences(), cast or contextlib.nullcontext():
        yield


@contextlib.contextmanager
def layer_outputs(model: Model, *, kept: bool = True) -> Iterator[list[torch.Tensor]]:
    """Yield a list that collects the decoder layers' outputs of a forward pass, in order; empty unless ``kept``."""
    outputs: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
        outputs.append(layer_output(output))

    hooks = [layer.register_forward_hook(keep) for _, layer in decoder_layers(model)] if kept else []
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def first_not_finite(model: Model, inputs: torch.Tensor) -> str:
    """Return the name of the first decoder layer whose output is not finite."""
    with layer_outputs(model) as outputs:
        model(input_ids=inputs, use_cache=False)
    names = [name for name, _ in decoder_layers(model)]
    broken = (index for index, output in enumerate(outputs) if not bool(torch.isfinite(output).all()))
    first = min(exchange(next(broken, len(names))))
    return names[first] if first < len(names) else "the head"
