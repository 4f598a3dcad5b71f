"""The paper's four layer-wise strategies (MatQuant, arXiv 2502.06786 v3, App. B), for any depth, widths and budget.

Each is an order of the layers in which widths do not fall: ``increasing`` along the depth, ``decreasing`` against it,
``pyramid`` from both ends towards the middle (2 2 4 8 8 4 2), ``reverse-pyramid`` the other way round. A plan of a form
is thus the counts of layers at each width, and there are C(L + W - 1, W - 1) of them for L layers and W widths. All are
tried: the best costs most within the budget; of equals a mix comes before one width for all, then fewest narrow layers.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from matquant.system.errors import InputError

# Number of layers -> the layers from the narrowest to the widest.
STRATEGIES: dict[str, Callable[[int], list[int]]] = {
    "pyramid": lambda layers: _outside_in(layers),
    "reverse-pyramid": lambda layers: _outside_in(layers)[::-1],
    "increasing": lambda layers: list(range(layers)),
    "decreasing": lambda layers: list(range(layers))[::-1],
}


def mixes(strategy: str, widths: Sequence[int], *, layers: int) -> np.ndarray:
    """Every assignment of the form: widths [count, layers], the widths of each row ascending along its order."""
    return _assign(strategy, widths, _edges(layers, len(widths)))


def widest_mix(strategy: str, widths: Sequence[int], *, costs: Sequence[Sequence[int]], limit: int) -> tuple[int, ...]:
    """The width of each layer: of all assignments of the form the one that costs most and not above ``limit``.

    costs: [layer][width], ascending along the widths. InputError for an unknown strategy, or if nothing fits.
    """
    order = check_strategy(strategy)(len(costs))
    edges = _edges(len(costs), len(widths))
    before = np.vstack([np.zeros(len(widths), dtype=np.int64), np.cumsum(np.asarray(costs)[order], axis=0)])
    total = sum(before[edges[:, w + 1], w] - before[edges[:, w], w] for w in range(len(widths)))
    mixed = (np.diff(edges, axis=1) > 0).sum(1) > 1
    fitting = np.flatnonzero(total <= limit)
    if not len(fitting):
        raise InputError(f"a budget of {limit} asked, the smallest {strategy} takes {total.min()}; give at least that")
    best = fitting[np.lexsort((-fitting, mixed[fitting], total[fitting]))[-1]]
    return tuple(_assign(strategy, widths, edges[best][None])[0].tolist())


def check_strategy(strategy: str) -> Callable[[int], list[int]]:
    """The order of a strategy; InputError if there is none of that name."""
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy {strategy!r} is not known; use one of search, {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy]


def _edges(layers: int, widths: int) -> np.ndarray:
    """All ways to cut the layers into a run for each width: where runs begin and the last ends, [count, widths + 1]."""
    cuts = np.array(list(itertools.combinations_with_replacement(range(layers + 1), widths - 1)), dtype=np.int64)
    return np.pad(np.pad(cuts, ((0, 0), (1, 0))), ((0, 0), (0, 1)), constant_values=layers)


def _assign(strategy: str, widths: Sequence[int], edges: np.ndarray) -> np.ndarray:
    """The width of each layer, [count, layers], for runs along the order of a strategy."""
    order = check_strategy(strategy)(int(edges[0, -1]))
    run_of = (np.arange(len(order))[None, :, None] >= edges[:, None, 1:-1]).sum(-1)
    result: np.ndarray = np.empty_like(run_of)
    result[:, order] = np.asarray(widths)[run_of]
    return result


def _outside_in(layers: int) -> list[int]:
    return [index // 2 if index % 2 == 0 else layers - 1 - index // 2 for index in range(layers)]
