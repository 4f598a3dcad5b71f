"""Run a decoder one layer at a time: input of the first layer, call of each layer, output of the last.

The layers are replaced while the decoder around them runs, so that masks, positions and rotary tables come from
transformers for every family.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from matquant.hf.families import supported
from matquant.hf_torch import Model
from matquant.hf_torch.layers import decoder_layers, decoder_of
from matquant.system.errors import InputError

Call = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]  # runs a decoder layer on hidden states


def embed(model: Model, batches: Iterable[torch.Tensor]) -> tuple[list[torch.Tensor], list[Call]]:
    """Return the inputs of the first decoder layer, [B, T, H] per batch of token ids [B, T], and a function that calls
    each layer.

    The layers are not run and may be empty; the rest of the decoder must have its weights. All batches must have the
    same length: positions and masks are those of the first sequence.
    """
    if model.config.model_type in supported("per_sequence"):
        raise InputError(
            f"{type(model).__name__} does not support running one decoder layer at a time, "
            "because its layers take arguments per sequence; use --method qat or rtn, and --strategy pyramid for plans"
        )
    layers, batches = [layer for _, layer in decoder_layers(model)], list(batches)
    hand_on = _hand_on(model, batches[0][:1, :1])
    hidden: list[torch.Tensor] = []
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def first(states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        hidden.append(states.detach())
        return hand_on(states)

    def later(states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        arguments.append((rest, named))
        return hand_on(states)

    decoder = decoder_of(model)
    with torch.no_grad():
        with _replaced(layers, [later] * len(layers)):
            decoder(input_ids=batches[0][:1], use_cache=False)
        with _replaced(layers, [first] + [lambda states, *_, **__: hand_on(states)] * (len(layers) - 1)):
            for tokens in batches:
                decoder(input_ids=tokens, use_cache=False)

    def call(rest: tuple[Any, ...], named: dict[str, Any]) -> Call:
        return lambda layer, states: layer_output(layer(states, *rest, **named))

    return hidden, [call(rest, named) for rest, named in arguments]


def layer_output(output: Any) -> torch.Tensor:
    """Return the hidden states [B, T, H] from a decoder layer's output, which may be a tuple that begins with them."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


_READS_TUPLES: dict[type, bool] = {}  # by class of decoder, tested once


def _hand_on(model: Model, token: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """Return a function that wraps hidden states as the decoder expects them: unchanged, or in a tuple (Falcon)."""
    decoder = decoder_of(model)
    if type(decoder) not in _READS_TUPLES:
        layers = [layer for _, layer in decoder_layers(model)]
        with torch.no_grad(), _replaced(layers, [lambda states, *_, **__: (states, None)] * len(layers)):
            try:
                read = decoder(input_ids=token, use_cache=False)[0]
            except (AttributeError, TypeError):  # raised by the final norm, which received the tuple
                read = None
        _READS_TUPLES[type(decoder)] = isinstance(read, torch.Tensor)
    return (lambda states: (states, None)) if _READS_TUPLES[type(decoder)] else (lambda states: states)


def finish(model: Model, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return logits [B, T, vocab] from the last decoder layer's output, [B, T, H], for token ids [B, T].

    Gradients are recorded only if ``states`` requires them.
    """
    with torch.set_grad_enabled(states.requires_grad), _handing_on(model, tokens, states):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def head_inputs(model: Model, tokens: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return the decoder's output after its final norm, [B, T, H], from the last layer's, for token ids [B, T]."""
    with torch.no_grad(), _handing_on(model, tokens, states):
        result: torch.Tensor = decoder_of(model)(input_ids=tokens, use_cache=False)[0]
    return result


def _handing_on(model: Model, tokens: torch.Tensor, states: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Let every layer return ``states`` within this context, so that only what follows the layers is computed."""
    layers, hand_on = [layer for _, layer in decoder_layers(model)], _hand_on(model, tokens[:1, :1])
    return _replaced(layers, [lambda *_, **__: hand_on(states)] * len(layers))


@contextlib.contextmanager
def _replaced(modules: Sequence[torch.nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward functions of modules within this context."""
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward
