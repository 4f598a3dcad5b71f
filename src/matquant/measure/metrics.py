"""Metrics of a model's predictions, in numpy: log-perplexity, KL divergence from a reference, and top-1 agreement.

Logits are float32; sums over tokens are float64. Rows are handled a few at a time, so that they stay in the processor's
cache. The torch engine has the same formulas in ``likelihood.py``; a test holds them together.

T tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from matquant.system.arguments import check_names
from matquant.system.errors import InputError

METRICS = ("ppl", "kld", "top1")
BLOCK_VALUES = 2**18  # logits handled at once, 1 MiB


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The reference model's prediction of T tokens."""

    log_probabilities: np.ndarray  # [T, V] float32, nats
    best: np.ndarray  # [T] int32, the most probable token


@dataclass
class Totals:
    """Sums over predicted tokens."""

    tokens: int = 0
    loss: float = 0.0  # nats
    kld: float = 0.0  # nats
    agreed: int = 0  # tokens with the reference's most probable token on top

    def add(self, *, tokens: int, loss: float, kld: float = 0.0, agreed: int = 0) -> None:
        self.tokens += tokens
        self.loss += loss
        self.kld += kld
        self.agreed += agreed

    def mean(self) -> dict[str, float]:
        """Return the mean over tokens of each metric."""
        values = (self.loss / self.tokens, self.kld / self.tokens, self.agreed / self.tokens)
        return dict(zip(METRICS, values, strict=True))


def check_metrics(metrics: Sequence[str], *, has_reference: bool) -> None:
    """Raise InputError for an unknown metric, and for one that needs a reference if there is none."""
    check_names(metrics, METRICS, flag="--metrics", kind="metric")
    compared = [name for name in metrics if name != "ppl"]
    if compared and not has_reference:
        raise InputError(
            f"--metrics {','.join(compared)} compares with a reference model and none was given; give --reference MODEL"
        )


def add_logits(totals: Totals, logits_TV: np.ndarray, targets: np.ndarray, truth: Truth | None) -> None:
    """Add the predictions ``logits_TV`` (float32, overwritten) of the tokens ``targets`` [T] to the sums."""
    size = max(1, BLOCK_VALUES // logits_TV.shape[1])
    scratch = np.empty((size, logits_TV.shape[1]), dtype=np.float32)  # reused: new pages cost more than exponentials
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        logits, wanted = logits_TV[rows], targets[rows]
        each = np.arange(len(wanted))
        best = logits.argmax(axis=1) if truth is not None else None
        logits -= logits.max(axis=1, keepdims=True)
        total = np.log(np.exp(logits, out=scratch[: len(wanted)]).sum(axis=1, dtype=np.float64))
        loss = float((total - logits[each, wanted]).sum())
        if truth is None or best is None:
            totals.add(tokens=len(wanted), loss=loss)
            continue
        logits -= total.astype(np.float32)[:, None]
        kld = divergence(truth.log_probabilities[rows], logits)
        totals.add(tokens=len(wanted), loss=loss, kld=kld, agreed=int((best == truth.best[rows]).sum()))


def divergence(reference_TV: np.ndarray, found_TV: np.ndarray) -> float:
    """Return the sum over rows of KL(reference || found), nats, of float32 log-probabilities."""
    with np.errstate(invalid="ignore"):  # a token that neither model gives
        difference = reference_TV - found_TV
    difference[np.isneginf(reference_TV)] = 0.0  # probability 0 adds nothing
    return math.fsum(np.einsum("tv,tv->t", np.exp(reference_TV), difference).tolist())
