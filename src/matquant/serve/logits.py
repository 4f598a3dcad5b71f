"""From the logits of a step to a token: bias, penalties, ends and constraints, then log-probabilities.

The order is that of vLLM and transformers, applied to float32 logits:

    1. logit_bias is added
    2. repetition penalty, of tokens in prompt or answer: a positive logit is divided by it, a negative one multiplied
    3. frequency penalty times the number of times that a token is in the answer is subtracted
    4. presence penalty is subtracted from tokens in the answer
    5. before ``min_tokens`` tokens, ends become -inf
    6. the constraint sets tokens that may not come next to -inf

Sampling (temperature, top-k, top-p, min-p) follows. Log-probabilities are those of the logits after step 6, before the
temperature: logit - (largest + log(sum(exp(logit - largest)))), float32. V tokens of the vocabulary.

Ids that the tokenizer does not have (``Engine.choosable``) are neither chosen nor among the most probable tokens. The
sum counts them, so that a chosen token has the log-probability that scoring gives it.
"""

import math

import numpy as np

from matquant.serve.work import Generation, Scored
from matquant.system.errors import InputError


class Penalties:
    """The tokens that penalties look at: ``seen_V`` in prompt or answer, ``counts_V`` in the answer."""

    def __init__(self, generation: Generation, vocab: int) -> None:
        self._repetition = np.float32(generation.repetition_penalty)
        self._frequency = np.float32(generation.frequency_penalty)
        self._presence = np.float32(generation.presence_penalty)
        self.seen_V = np.zeros(vocab, dtype=bool) if self._repetition != 1 else None
        if self.seen_V is not None:
            self.seen_V[np.asarray(generation.ids, dtype=np.int64)] = True
        self.counts_V = np.zeros(vocab, dtype=np.float32) if self._frequency != 0 or self._presence != 0 else None

    def take(self, token: int) -> None:
        """Count a new token."""
        if self.seen_V is not None:
            self.seen_V[token] = True
        if self.counts_V is not None:
            self.counts_V[token] += 1

    def apply(self, logits_V: np.ndarray) -> None:
        """Change logits, float32, in place."""
        if self.seen_V is not None:
            seen = np.flatnonzero(self.seen_V)
            values = logits_V[seen]
            logits_V[seen] = np.where(values < 0, values * self._repetition, values / self._repetition)
        if self.counts_V is not None:
            used = np.flatnonzero(self.counts_V)
            logits_V[used] -= self._frequency * self.counts_V[used]
            logits_V[used] -= self._presence


def shift(logits_V: np.ndarray, generation: Generation, penalties: Penalties, *, new: int) -> None:
    """Apply bias, penalties and ends in place: steps 1 to 5. new: tokens that the answer has already."""
    if generation.logit_bias:
        tokens = np.fromiter(generation.logit_bias, dtype=np.int64)
        logits_V[tokens] += np.fromiter(generation.logit_bias.values(), dtype=np.float32)
    penalties.apply(logits_V)
    if new < generation.min_tokens and generation.ends:
        logits_V[np.fromiter(generation.ends, dtype=np.int64)] = -np.inf


def adjust(logits_V: np.ndarray, generation: Generation, penalties: Penalties, *, new: int) -> None:
    """Apply bias, penalties, ends and constraint in place: steps 1 to 6. new: tokens that the answer has already."""
    shift(logits_V, generation, penalties, new=new)
    if generation.constraint is not None:
        generation.constraint.mask(logits_V)
    if (generation.constraint is not None or generation.min_tokens > new) and logits_V.max() == -math.inf:
        raise InputError("no token may come next: constraint, min_tokens and bias exclude all; relax one of them")


def log_probabilities(logits_V: np.ndarray) -> np.ndarray:
    """Return the log-softmax of logits, float32 [V], nats. Logits of -inf stay -inf; InputError if none is finite."""
    largest = logits_V.max()
    if not math.isfinite(largest):
        raise InputError(f"the model gives logits of {largest}, so there are no probabilities; try another width")
    shifted_V = logits_V - largest
    result: np.ndarray = shifted_V - np.log(np.exp(shifted_V).sum(dtype=np.float32))
    return result


def score(logits_V: np.ndarray, token: int, top: int, *, choosable: int) -> Scored:
    """Return a token's log-probability and those of the ``top`` most probable tokens, but at least of the first.

    choosable: tokens from this id on are not among these.
    A token that is the first has exactly the log-probability that ``top`` gives it. Of equally probable tokens the
    smaller id comes first. Tokens of probability 0 are left out.
    """
    logprobs_V = log_probabilities(logits_V)
    chances_V = logprobs_V[:choosable]
    count = min(max(top, 1), len(chances_V))
    best = np.flatnonzero(chances_V >= np.partition(chances_V, -count)[-count])
    best = best[np.lexsort((best, -logprobs_V[best]))][:count]
    first = tuple((int(index), float(logprobs_V[index])) for index in best if logprobs_V[index] > -math.inf)
    return Scored(token=token, logprob=float(logprobs_V[token]), top=first)
