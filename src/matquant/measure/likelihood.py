"""Measure the log-perplexity of every width of one checkpoint, in one process and without reloading.

Token-weighted mean negative log-likelihood, nats per token, over sequences of the model's context: sequence i holds
tokens i*stride .. i*stride + context and predicts each token once. With stride < context the earlier part of a sequence
is only context. Beside a reference also the KL divergence from it, and how often both have the same best token.

Logits are computed in pieces (``pieces.py``): memory is the model, a batch's activations and a few hundred MB.

V vocabulary, n tokens of a piece.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from matquant.core.spec import Plan
from matquant.distributed.collect import exchange, own_part, together
from matquant.hf_torch.config import context_length
from matquant.hf_torch.finite import check_result
from matquant.measure.kept import LARGEST, STEP, Kept, Writer
from matquant.measure.metrics import Totals, Truth
from matquant.measure.pieces import batch_tokens, can_split, logits_in_pieces
from matquant.measure.windows import Windows, cut, steps
from matquant.system.arguments import check_given, check_types
from matquant.system.progress import Count

Report = Callable[[int, int], None]  # sequences done, total
Piece = tuple[int, torch.Tensor, torch.Tensor]  # predicted token, logits [n, V] float32, their targets [n]


def log_perplexity(
    model: Any,
    stream: np.ndarray,
    *,
    context: int,
    stride: int | None = None,
    report: Report = lambda done, total: None,
) -> float:
    """Return the mean nats per predicted token of ``stream`` (int64 token ids). Deterministic.

    Sequences have ``context`` inputs; stride None or context: no overlap. Tokens after the last whole sequence are left
    out. report: called with the number of sequences done, and in total. InputError if the text is shorter than one
    sequence, or naming the layer where NaN or infinity begins.
    """
    return measure(model, cut(stream, context=context, stride=stride), report=report)["ppl"]


def measure(model: Any, windows: Windows, *, kept: Kept | None = None, report: Report) -> dict[str, float]:
    """Return the mean of each metric of ``METRICS`` over the predicted tokens; kld and top1 are 0 without ``kept``.

    Several processes share the batches. The sums of all pieces are then added in their order in the text, so that the
    result is that of one process, bit for bit.
    """
    starts = _batches(model, windows)

    def pieces() -> list[dict[str, Any]]:
        found, totals = [], Totals()
        own = starts[own_part(len(starts))]
        for place, logits, targets in _predictions(model, windows, own, lambda: totals.loss, report):
            sums = _normalise(logits)
            compared = {} if kept is None else _compare(logits, sums, kept.read(place, len(targets)))
            found.append({"tokens": len(targets), "loss": float(_losses(logits, sums, targets).sum()), **compared})
            totals.add(**found[-1])
        return found

    totals = Totals()
    for piece in itertools.chain.from_iterable(exchange(together(pieces))):
        totals.add(**piece)
    return totals.mean()


def keep(model: Any, windows: Windows, writer: Writer, *, report: Report) -> float:
    """Write the log-probabilities of a reference model's predictions; return its log-perplexity."""
    totals = Totals()
    for _, logits, targets in _predictions(model, windows, _batches(model, windows), lambda: totals.loss, report):
        losses = _losses(logits, _normalise(logits), targets)
        totals.add(tokens=len(targets), loss=float(losses.sum()))
        writer.add(_encode(logits), logits.argmax(dim=1).cpu().numpy(), losses.cpu().numpy())
    return totals.mean()["ppl"]


def _batches(model: Any, windows: Windows) -> list[range]:
    """Return the sequences of each batch."""
    size = max(1, batch_tokens(model) // windows.context)
    return [range(first, min(first + size, windows.count)) for first in range(0, windows.count, size)]


def _predictions(
    model: Any, windows: Windows, batches: Sequence[range], so_far: Callable[[], float], report: Report
) -> Iterator[Piece]:
    """Yield every prediction of ``batches`` that counts, in order. so_far: the sum of losses, checked after each."""
    with torch.inference_mode():
        split = None
        for number, sequences in enumerate(batches):
            first = sequences.start
            report(number * windows.count // len(batches), windows.count)
            rows = torch.from_numpy(np.stack([windows.row(one) for one in sequences])).to(model.device)
            ids = rows[:, :-1]
            split = can_split(model, ids) if split is None else split
            firsts = [windows.first(one) for one in sequences]
            for sequence, start, logits in logits_in_pieces(model, ids, firsts, split=split):
                place = windows.place(first + sequence) + start - firsts[sequence]
                yield place, logits, rows[sequence, start + 1 : start + 1 + len(logits)]
            check_result(so_far(), model, ids, what="log-perplexity")
    report(windows.count, windows.count)


def _normalise(logits: torch.Tensor) -> torch.Tensor:
    """Subtract each row's largest logit in place; return the log of the sum of exponentials of each row, float64.

    torch's own cross entropy sums 49,152 exponentials in float32 in one order that costs 1.4e-4 nats (of rows that are
    not contiguous) and another that costs 8e-6.
    """
    logits -= logits.amax(dim=1, keepdim=True)
    return logits.exp().sum(dim=1, dtype=torch.float64).log()


def _losses(logits: torch.Tensor, totals: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the nats of each target, float64 [n]. logits, totals: from ``_normalise``."""
    return totals - logits.gather(1, targets[:, None])[:, 0].double()


def _compare(logits: torch.Tensor, totals: torch.Tensor, truth: Truth) -> dict[str, Any]:
    """Return the sums of KL(reference || model) and of agreements on the best token, as ``metrics.add_logits`` does."""
    best = torch.from_numpy(truth.best).to(logits.device)
    wanted = torch.from_numpy(truth.log_probabilities).to(logits.device)
    difference = wanted - (logits - totals.float()[:, None])
    difference.masked_fill_(wanted.isneginf(), 0.0)
    kld = (wanted.exp_() * difference).sum(dim=1).double().sum()
    return {"kld": float(kld), "agreed": int((logits.argmax(dim=1) == best).sum())}


def _encode(logits: torch.Tensor) -> np.ndarray:
    """Return the codes of logits whose largest is 0, as ``kept.encode`` does."""
    codes: np.ndarray = (logits * (-1 / STEP)).clamp_(max=LARGEST).round_().to(torch.int32).cpu().numpy()
    return codes.astype(np.uint16)


def evaluate(
    model: Any,
    stream: np.ndarray,
    *,
    bits: Sequence[int] = (8, 6, 4, 3, 2),
    plan: Plan | None = None,
    context: int | None = None,
    stride: int | None = None,
    report: Count = lambda stage, done, total: None,
) -> dict[str, float]:
    """Return the log-perplexity of a model from ``matquant.load`` at each width, and at ``plan`` (key "plan") if given.

    context None: the model's (max_position_embeddings). report: called with the width, and the sequences done and in
    total over all widths. The model is left at the last width evaluated.
    """
    check_types(stream=stream, bits=bits)
    check_given(context=context, stride=stride)
    windows = cut(stream, context=context or context_length(model), stride=stride)
    plans = {str(width): Plan(default=width) for width in bits} | ({} if plan is None else {"plan": plan})
    results: dict[str, float] = {}
    for name, told in steps(plans, report):
        model.set_bits(plan=plans[name])
        results[name] = measure(model, windows, report=told)["ppl"]
    return results
