"""The paper's four layer-wise strategies (MatQuant, arXiv 2502.06786 v3, App. B), for any depth, widths and budget.

Each is an order of the layers in which widths do not fall: ``increasing`` along the depth, ``decreasing`` against it,
``pyramid`` from both ends towards the middle (2 2 4 8 8 4 2), ``reverse-pyramid`` the other way round. A plan is thus a
count of layers at each width, and there are C(L + W - 1, W - 1) plans for L layers and W widths. All are tried: the
best plan costs most within the budget. Of equal costs, mixed plans come before uniform ones, then plans with fewer
narrow layers.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from matquant.system.errors import InputError

# Number of layers -> the layers in the order from narrowest to widest.
STRATEGIES: dict[str, Callable[[int], list[int]]] = {
    "pyramid": lambda layers: _outside_in(layers),
    "reverse-pyramid": lambda layers: _outside_in(layers)[::-1],
    "increasing": lambda layers: list(range(layers)),
    "decreasing": lambda layers: list(range(layers))[::-1],
}


def mixes(strategy: str, widths: Sequence[int], *, layers: int) -> np.ndarray:
    """Return every assignment of a strategy, [count, layers]: the widths of each row ascend along its order."""
    return _assign(strategy, widths, _edges(layers, len(widths)))


def widest_mix(strategy: str, widths: Sequence[int], *, costs: Sequence[Sequence[int]], limit: int) -> tuple[int, ...]:
    """Return the width of each layer, from the assignment of a strategy that costs most without exceeding ``limit``.

    costs: [layer][width], ascending along the widths. InputError for an unknown strategy, or if nothing fits.
    """
    order = check_strategy(strategy)(len(costs))
    edges = _edges(len(costs), len(widths))
    before = np.vstack([np.zeros(len(widths), dtype=np.int64), np.cumsum(np.asarray(costs)[order], axis=0)])
    total = sum(before[edges[:, w + 1], w] - before[edges[:, w], w] for w in range(len(widths)))
    mixed = (np.diff(edges, axis=1) > 0).sum(1) > 1
    fitting = np.flatnonzero(total <= limit)
    if not len(fitting):
        raise InputError(
            f"a budget of {limit} is below the smallest {strategy} plan, which costs {total.min()}; use a larger budget"
        )
    best = fitting[np.lexsort((-fitting, mixed[fitting], total[fitting]))[-1]]
    return tuple(_assign(strategy, widths, edges[best][None])[0].tolist())


def check_strategy(strategy: str) -> Callable[[int], list[int]]:
    """Return the layer order of a strategy; InputError for an unknown name."""
    if strategy not in STRATEGIES:
        raise InputError(f"--strategy {strategy!r} is not known; use one of search, {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy]


def _edges(layers: int, widths: int) -> np.ndarray:
    """Return all ways to cut the layers into a run per width: starts and the last end, [count, widths + 1]."""
    cuts = np.array(list(itertools.combinations_with_replacement(range(layers + 1), widths - 1)), dtype=np.int64)
    return np.pad(np.pad(cuts, ((0, 0), (1, 0))), ((0, 0), (0, 1)), constant_values=layers)


def _assign(strategy: str, widths: Sequence[int], edges: np.ndarray) -> np.ndarray:
    """Return the width of each layer, [count, layers], for runs along the order of a strategy."""
    order = check_strategy(strategy)(int(edges[0, -1]))
    run_of = (np.arange(len(order))[None, :, None] >= edges[:, None, 1:-1]).sum(-1)
    result: np.ndarray = np.empty_like(run_of)
    result[:, order] = np.asarray(widths)[run_of]
    return result


def _outside_in(layers: int) -> list[int]:
    return [index // 2 if index % 2 == 0 else layers - 1 - index // 2 for index in range(layers)]
