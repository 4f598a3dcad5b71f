"""Choose the next token from logits: greedy, or sampled with temperature, top-k, top-p and min-p.

The steps are those of transformers, in this order: divide logits by the temperature; keep the k most probable tokens;
keep the smallest set whose probabilities add up to top_p; drop tokens less probable than min_p times the first. Each
token takes one uniform number from a generator seeded once per call, so the same seed gives the same text.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from matquant.system.arguments import check_types
from matquant.system.errors import InputError

SMALLEST_TEMPERATURE = float(np.finfo(np.float32).smallest_normal)
# nats below the most probable token: most of a large vocabulary is further below and need not be sorted; small steps,
# because sorting a few thousand tokens takes longer than several looks
LEVELS = (7.0, 8.5, 10.0, 12.0, 14.0)
BLOCK = 1024  # tokens that are added up together before one of all is drawn


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling options."""

    # divides the logits; 0, or too small for float32: greedy, and the other options are not used
    temperature: float = 0.0
    # keep the k most probable tokens; 0: all
    top_k: int = 0
    # nucleus sampling: keep the smallest set of tokens whose probabilities add up to p; 1: all
    top_p: float = 1.0
    # drop tokens less probable than this times the first; 0: keep all
    min_p: float = 0.0
    # random seed for sampling
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(temperature=self.temperature, top_p=self.top_p, min_p=self.min_p)
        ranges = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_k": (type(self.top_k) is int and self.top_k >= 0, "an integer of at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "seed": (type(self.seed) is int and self.seed >= 0, "an integer of at least 0"),
        }
        for name, (is_right, words) in ranges.items():
            if not is_right:
                raise InputError(f"{name}={getattr(self, name)}; give a number {words}")

    @property
    def keeps_all(self) -> bool:
        """Return whether no token is excluded: only the temperature counts."""
        return self.top_k == 0 and self.top_p == 1 and self.min_p == 0

    @classmethod
    def of_model(cls, generation: Mapping[str, Any], **given: float | None) -> Self:
        """Return the options of generation_config.json (greedy without do_sample), overridden by those ``given``."""
        asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        names = [entry.name for entry in dataclasses.fields(cls) if entry.name not in asked]
        values: dict[str, Any] = {}
        if generation.get("do_sample"):
            values = {"temperature": 1.0}
            values |= {key: generation[key] for key in names if generation.get(key) is not None}
            try:
                cls(**values)
            except InputError as error:
                raise InputError(f"generation_config.json has {error}") from None
        return cls(**values | asked)


class Uniform(Protocol):
    """A source of uniform numbers from 0 to 1, such as ``numpy.random.Generator``."""

    def random(self) -> float: ...


def log_probabilities(logits_TV: np.ndarray, targets: Sequence[int]) -> np.ndarray:
    """Return the log-probability of a target token in each row of logits, nats, float64 [T]."""
    values_TV = logits_TV.astype(np.float64)
    largest_T = values_TV.max(axis=1)
    totals_T = largest_T + np.log(np.exp(values_TV - largest_T[:, None]).sum(axis=1))
    return np.asarray(values_TV[np.arange(len(values_TV)), targets] - totals_T)


def choose(logits: np.ndarray, sampling: Sampling, generator: Uniform) -> int:
    """Return the next token id from logits [vocab], float32. InputError if they are not finite."""
    return pick(logits, sampling, generator.random)


def pick(logits: np.ndarray, sampling: Sampling, number: Callable[[], float]) -> int:
    """``choose`` with the uniform number that ``number`` returns; it is not called if decoding is greedy."""
    first = int(logits.argmax())
    largest = float(logits[first])
    if not math.isfinite(largest):
        raise InputError(
            f"the model gives logits of {largest}, so no token can be chosen; "
            "matquant eval --text FILE names the width and the layer"
        )
    if sampling.temperature < SMALLEST_TEMPERATURE:
        return first
    if sampling.keeps_all:
        return draw(np.exp(_shifted(logits, sampling)), number())
    ids, probabilities = distribution(logits, sampling)
    cumulative = np.cumsum(probabilities)
    place = np.searchsorted(cumulative, number() * cumulative[-1], side="right")
    return int(ids[min(int(place), len(ids) - 1)])


def draw(weights: np.ndarray, number: float) -> int:
    """Return the index that a uniform number draws by weights, float32: the first whose sum with those before exceeds
    ``number`` times the sum of all.

    Sums of blocks come first, because adding one by one through a large vocabulary takes longer than exp.
    """
    cumulative = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    wanted = min(number * cumulative[-1], np.nextafter(cumulative[-1], 0))
    block = int(np.searchsorted(cumulative, wanted, side="right"))
    inside = weights[block * BLOCK : (block + 1) * BLOCK]
    before = cumulative[block - 1] if block else 0.0
    place = int(np.searchsorted(before + np.cumsum(inside, dtype=np.float64), wanted, side="right"))
    if place == len(inside):  # the two sums of a block may differ in their last bits
        place = int(np.flatnonzero(inside)[-1])
    return block * BLOCK + place


def confidence(logits: np.ndarray, sampling: Sampling) -> float:
    """Return the largest probability, at the temperature or at 1 if decoding is greedy; no token is excluded."""
    temperature = sampling.temperature if sampling.temperature >= SMALLEST_TEMPERATURE else 1.0
    with np.errstate(over="ignore", under="ignore"):
        return 1 / float(np.exp((logits - logits.max()) / np.float32(temperature)).sum())


def distribution(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return the candidate ids and their probabilities, float64, summing to 1."""
    shifted = _shifted(logits, sampling)
    if sampling.keeps_all:
        weights = np.exp(shifted)
        return np.arange(len(weights)), weights / weights.sum(dtype=np.float64)
    total = np.exp(shifted).sum(dtype=np.float64) if sampling.top_p < 1 and not sampling.top_k else 0.0
    ids = _candidates(shifted, total, sampling)
    weights = np.exp(shifted[ids].astype(np.float64))
    order = np.lexsort((ids, -weights))[: sampling.top_k or None]
    ids, weights = ids[order], weights[order]
    if sampling.top_k:
        total = weights.sum()
    if sampling.top_p < 1:
        weights = weights[: 1 + int(np.searchsorted(np.cumsum(weights), sampling.top_p * total))]
    weights = weights[weights >= sampling.min_p * weights[0]]
    return ids[: len(weights)], weights / weights.sum()


def _shifted(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return logits over the temperature, 0 for the most probable token."""
    with np.errstate(over="ignore"):  # tokens far below the first underflow to probability 0
        shifted: np.ndarray = logits - logits.max()
        shifted /= np.float32(sampling.temperature)
    return shifted


def _candidates(shifted: np.ndarray, total: float, sampling: Sampling) -> np.ndarray:
    """Return the ids of a superset of the tokens to keep. shifted: nats, 0 for the most probable. total: the sum of
    exp(shifted), which only top_p without top_k needs.
    """
    for level in LEVELS:
        ids = np.flatnonzero(shifted >= -level)
        if sampling.top_k:
            enough = len(ids) >= sampling.top_k
        elif sampling.top_p == 1:
            enough = sampling.min_p >= math.exp(-level)
        else:
            held = np.exp(shifted[ids]).sum(dtype=np.float64)
            enough = sampling.min_p >= math.exp(-level) or held >= sampling.top_p * total
        if enough:
            return ids
    return np.arange(len(shifted))
