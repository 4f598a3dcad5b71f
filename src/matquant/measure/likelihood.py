"""Measure the log-perplexity of every width of one checkpoint, in one process and without reloading.

Token-weighted mean negative log-likelihood, nats per token, over sequences of the model's context: sequence i holds
tokens i*stride .. i*stride + context and predicts each token once. With stride < context the earlier part of a sequence
is only context.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from matquant.core.spec import Plan
from matquant.hf_torch.config import context_length
from matquant.hf_torch.finite import check_result
from matquant.system.arguments import check_given, check_types
from matquant.system.errors import InputError
from matquant.system.progress import Count

BATCH_TOKENS = 8192
Report = Callable[[int, int], None]  # sequences done, total


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
    step = stride or context
    count = _count_windows(stream, context, step)
    starts = np.arange(count)[:, None] * step
    windows = stream[starts + np.arange(context + 1)]
    total, tokens = 0.0, 0
    size = max(1, BATCH_TOKENS // context)
    with torch.inference_mode():
        for first in range(0, count, size):
            report(first, count)
            rows = torch.from_numpy(windows[first : first + size]).to(model.device)
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
            for row, values in enumerate(loss.double()):
                new = values if first + row == 0 else values[context - step :]
                total += float(new.sum())
                tokens += new.numel()
            check_result(total, model, rows[:, :-1], what="log-perplexity")
    report(count, count)
    return total / tokens


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
    length = context or context_length(model)
    names = [*dict.fromkeys(map(str, bits)), *([] if plan is None else ["plan"])]
    results: dict[str, float] = {}
    for name in names:
        if name == "plan":
            model.set_bits(plan=plan)
        else:
            model.set_bits(int(name))
        label = name if name == "plan" else f"int{name}"

        def told(done: int, total: int, label: str = label, before: int = len(results)) -> None:
            report(label, done + before * total, total * len(names))

        results[name] = log_perplexity(model, stream, context=length, stride=stride, report=told)
    return results


def predicted_tokens(stream: np.ndarray, *, context: int, stride: int | None = None) -> int:
    """Return how many tokens ``log_perplexity`` averages over."""
    step = stride or context
    return context + (_count_windows(stream, context, step) - 1) * step


def _count_windows(stream: np.ndarray, context: int, step: int) -> int:
    if not 1 <= step <= context:
        raise InputError(f"stride={step} is outside 1..{context}, the sequence length; use a value inside")
    count = (len(stream) - 1 - context) // step + 1
    if count < 1:
        raise InputError(
            f"the text has {len(stream)} tokens, shorter than one sequence of {context} + 1; "
            "give more text or a smaller --seq-len"
        )
    return count
