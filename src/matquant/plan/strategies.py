"""The paper's four layer-wise strategies (MatQuant, arXiv 2502.06786 v3, App. B), for any depth, widths and budget.

Each is an order of the layers in which widths do not fall: ``increasing`` along the depth, ``decreasing`` against it,
``pyramid`` from both ends towards the middle (2 2 4 8 8 4 2), ``reverse-pyramid`` the other way round. A plan of a form
is thus the counts of layers at each width, and there are C(L + W - 1, W - 1) of them for L layers and W widths. All are
tried: the best costs most within the budget; of equals it has the most different widths, then the fewest narrow layers.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from matquant.errors import InputError

# Number of layers -> the layers from the narrowest to the widest.
STRATEGIES: dict[str, Callable[[int], list[int]]] = {
    "pyramid": lambda layers: _outside_in(layers),
    "reverse-pyramid": lambda layers: _outside_in(layers)[::-1],
    "increasing": lambda layers: list(range(layers)),
    "decreasing": lambda layers: list(range(layers))[::-1],
}


def mixes(strategy: str, widths: Sequence[int], *, layers: int) -> np.ndarray:
    """Every assignment of the form: widths [count, layers], the widths of each row ascending along its order."""
    ends = np.array(list(itertools.combinations_with_replacement(range(layers + 1), len(widths) - 1)), dtype=np.int64)
    narrow_to_wide = (np.arange(layers)[None, :, None] >= ends[:, None, :]).sum(-1)
    result = np.empty_like(narrow_to_wide)
    result[:, check_strategy(strategy)(layers)] = narrow_to_wide
    assigned: np.ndarray = np.asarray(widths)[result]
    return assigned


def widest_mix(strategy: str, widths: Sequence[int], *, costs: Sequence[Sequence[int]], limit: int) -> tuple[int, ...]:
    """The width of each layer: of all assignments of the form the one that costs most and not above ``limit``.

    costs: [layer][width], ascending along the widths. InputError for an unknown strategy, or if nothing fits.
    """
    found = mixes(strategy, widths, layers=len(costs))
    chosen = np.searchsorted(widths, found)
    total = np.take_along_axis(np.asarray(costs, dtype=np.int64)[None], chosen[..., None], axis=2).sum((1, 2))
    different = 1 + (np.diff(np.sort(chosen, axis=1), axis=1) > 0).sum(1)
    fits = total <= limit
    if not fits.any():
        raise InputError(f"a budget of {limit} asked, the smallest {strategy} takes {total.min()}; give at least that")
    best = max(np.flatnonzero(fits), key=lambda row: (total[row], different[row], -row))
    return tuple(found[best].tolist())


def check_strategy(strategy: str) -> Callable[[int], list[int]]:
    """The order of a strategy; InputError if there is none of that name."""
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy {strategy!r} is not known; use one of search, {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy]


def _outside_in(layers: int) -> list[int]:
    return [index // 2 if index % 2 == 0 else layers - 1 - index // 2 for index in range(layers)]
