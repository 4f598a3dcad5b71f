"""Judge a width in words, and choose one, by its loss.

The loss of a width is its log-perplexity less the float model's on the same text, in nats per token: 0.1 nats raise
perplexity by exp(0.1) - 1 = 10.5 %. The limits are ours and the same on every page and card; docs/evaluation.md lists
them. They judge text in general, so a task that matters needs its own measurement.
"""

import math
from collections.abc import Mapping

# (loss below this, in nats per token; the verdict, with what the width is compared with for {})
VERDICTS = (
    (0.02, "as good as {}"),
    (0.1, "slightly worse"),
    (0.3, "clearly worse"),
    (1.0, "much worse"),
    (math.inf, "not usable for text"),
)
RECOMMENDED = 0.1  # nats: the smallest width below this loss is recommended
USABLE = 0.3  # nats: the smallest width below this loss is named for small machines


def level(loss: float) -> int:
    """Return the index of the verdict on a loss in nats: 0 is best."""
    return next(index for index, (limit, _) in enumerate(VERDICTS) if loss < limit or limit == math.inf)


def verdict(loss: float, *, base: str) -> str:
    """Return the verdict on a loss in nats, compared with ``base``, such as "the float model"."""
    return VERDICTS[level(loss)][1].format(base)


def smallest(losses: Mapping[str, float], sizes: Mapping[str, float], *, below: float) -> str | None:
    """Return the name with the smallest size among those with a loss below ``below`` nats; None if there is none."""
    return min((name for name, loss in losses.items() if loss < below), key=lambda name: sizes[name], default=None)


def limits() -> str:
    """Return the limits of all verdicts in words, for notes below tables."""
    below = [f"{words.format('it').removesuffix(' as it')} below {limit:g}" for limit, words in VERDICTS[:-1]]
    return f"{', '.join(below)}, {VERDICTS[-1][1]} above"
