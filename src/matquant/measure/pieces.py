"""A torch model's logits a few hundred tokens at a time, so that memory does not grow with the vocabulary.

The decoder runs once for a batch. Then the model's own ``forward`` runs on pieces of the decoder's output, with the
decoder replaced by a function that returns the piece: scales, caps and biases of the output layer are therefore the
model's. ``can_split`` compares both ways once; a model whose forward does otherwise gets its logits whole, one
sequence at a time.
"""

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from matquant.hf_torch import Model
from matquant.hf_torch.layers import decoder_of

PIECE_VALUES = 2**22  # logits held at once, 16 MiB in float32
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # more are not faster on a CPU
BATCH_VALUES = 2**25  # values of the widest activation of a batch, 128 MiB in float32
PROBE_TOKENS = 8


def batch_tokens(model: Model) -> int:
    """Return how many tokens to run through the decoder at once."""
    config = model.config.get_text_config()
    widest = max(getattr(config, "intermediate_size", None) or 0, 4 * (getattr(config, "hidden_size", None) or 1))
    return max(1, min(BATCH_TOKENS.get(model.device.type, 8192), BATCH_VALUES // widest))


def logits_in_pieces(
    model: Model, ids: torch.Tensor, firsts: Sequence[int], *, split: bool
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (sequence, position, logits [n, vocabulary] float32) of a batch of token ids [B, T], in order.

    firsts: the first position of each sequence whose logits are needed. split: what ``can_split`` returned. Call under
    ``torch.inference_mode``.
    """
    size = max(1, PIECE_VALUES // model.config.get_text_config().vocab_size)
    output = decoder_of(model)(input_ids=ids, use_cache=False) if split else None
    for sequence, first in enumerate(firsts):
        whole = None if split else model(input_ids=ids[sequence : sequence + 1], use_cache=False).logits[0]
        for start in range(first, ids.shape[1], size):
            stop = min(start + size, ids.shape[1])
            if whole is None:
                logits = _logits(model, output, slice(sequence, sequence + 1), slice(start, stop))[0]
            else:
                logits = whole[start:stop]
            yield sequence, start, logits.float()


def can_split(model: Model, ids: torch.Tensor) -> bool:
    """Return whether the model's logits can be computed in pieces: tried on the first tokens of ``ids`` [B, T]."""
    some = ids[:1, :PROBE_TOKENS]
    whole = model(input_ids=some, use_cache=False).logits.float()
    middle = some.shape[1] // 2
    try:
        output = decoder_of(model)(input_ids=some, use_cache=False)
        halves = [_logits(model, output, slice(0, 1), part) for part in (slice(0, middle), slice(middle, None))]
        found = torch.cat([half.float() for half in halves], dim=1)
    except Exception:  # any type: a model of any family was called in another way than its own
        return False
    if found.shape != whole.shape:
        return False
    # the products of other numbers of rows may round differently; another output layer is much further off
    scale = float(whole.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(found, whole, rtol=1e-2, atol=1e-2 * scale, equal_nan=True)


def _logits(model: Model, output: Any, rows: slice, positions: slice) -> torch.Tensor:
    """Return the logits [B, n, vocabulary] of a part of the decoder's output."""
    part = copy.copy(output)
    part["last_hidden_state"] = output.last_hidden_state[rows, positions]
    ids = torch.zeros(part.last_hidden_state.shape[:2], dtype=torch.long, device=part.last_hidden_state.device)
    with _returning(decoder_of(model), part):
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@contextlib.contextmanager
def _returning(module: Any, output: Any) -> Iterator[None]:
    """Within this context ``module`` returns ``output`` for any input."""
    before = module.__dict__.get("forward")
    module.forward = functools.partial(_answer, output)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _answer(output: Any, *arguments: Any, **options: Any) -> Any:
    return output
