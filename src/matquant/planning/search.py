"""Choose a width for every group: exact for a sum of losses, then refined on the loss itself.

Alone, a group g at width w costs loss[g, w] (planning/gradients.py). If losses added up, the best plan would be a
multiple-choice knapsack, min sum loss[g, w_g] subject to sum cost[g, w_g] <= limit. ``choose`` solves it exactly by
dynamic programming over the Pareto-optimal plans (cost, loss) of the first groups (Nemhauser and Ullmann 1969). Layers
are alike, so costs are integers with large common divisors and there are few such plans. A general solver would be
another dependency and, working in floats, could exceed the budget.

In fact losses do not add up. ``refine`` therefore improves the best known plan by swaps within the budget: raise one
group, lower another if necessary, and keep the swap if the measured loss of the whole model falls. Swaps are tried in
the order of their estimated gain; every measurement corrects the estimates of the widths it moved to.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from matquant.core.nest import MASTER_BITS
from matquant.format.read import ends_of
from matquant.planning.budget import Budget, Groups, by_layer, by_width
from matquant.planning.strategies import STRATEGIES, widest_mix

Choice = tuple[int, ...]  # for each group the index of its width
EVALUATIONS = 100  # default number of plans a search measures, besides the sensitivities
PAPER_WIDTHS = (2, 4, 8)  # the widths that the paper mixes
MOST_MOVES = 1000  # of those that raise a group, and of those that lower one, for each swap
PATIENCE = 40  # the search ends after this many measured swaps without a gain


class Measured(Protocol):
    """The source of plans' losses (planning/sensitivity.py). paths: all paths that need a width."""

    paths: tuple[str, ...]

    def loss(self, bits: Mapping[str, int], /) -> float:
        """Return the loss of a plan {path: bits}, measured or looked up."""

    def known(self) -> list[tuple[float, dict[str, int]]]:
        """Return every plan measured so far, with its loss."""

    def estimates(self, groups: Groups, widths: Sequence[int], /) -> np.ndarray:
        """Return estimates of every group's loss at every width, float64 [groups, widths]; NaN in rows of groups that
        must be measured.
        """


def search(
    losses: Measured,
    budget: Budget,
    *,
    widths: Sequence[int],
    fused: bool = False,
    experts: bool = False,
    evaluations: int = EVALUATIONS,
) -> dict[str, int]:
    """Return the plan {path: bits} of least measured loss found within ``budget``. fused, experts: see ``by_width``.

    Never worse than the four strategies, the uniform widths and every plan of a smaller budget measured before.
    evaluations: maximum number of swaps to measure. InputError if nothing fits.
    """
    groups = by_width((path for path in losses.paths if path not in budget.fixed), fused=fused, experts=experts)
    cost_GW = np.array(budget.table(groups, widths), dtype=np.int64)
    loss_GW = sensitivities(losses, groups, widths, fixed=budget.fixed)

    def plan(choice: Choice) -> dict[str, int]:
        chosen = {path: widths[index] for group, index in zip(groups, choice, strict=True) for path in group}
        return {**budget.fixed, **chosen}

    def measure(choice: Choice) -> float:
        return losses.loss(plan(choice))

    first = choose(loss_GW, cost_GW, limit=budget.limit)
    for simple in _simple_plans(groups, budget, widths, plan(first)):
        losses.loss({**budget.fixed, **simple})
    measure(first)
    known = ((loss, bits) for loss, bits in losses.known() if budget.fixed.items() <= bits.items())
    found = ((loss, _express(bits, groups, widths)) for loss, bits in known)
    rows = np.arange(len(groups))
    start = min((loss, choice) for loss, choice in found if choice and cost_GW[rows, choice].sum() <= budget.limit)[1]
    best = refine(measure, start, loss_GW=loss_GW, cost_GW=cost_GW, limit=budget.limit, evaluations=evaluations)
    return plan(best)


def sensitivities(
    losses: Measured, groups: Groups, widths: Sequence[int], *, fixed: Mapping[str, int] | None = None
) -> np.ndarray:
    """Return every group's loss at every width, all else at 8 bits, minus the 8-bit loss: float64 [groups, widths].

    Estimated, and scaled so that they add up to what all estimated groups lose together at that width; measured where
    there is no estimate. fixed: widths of other paths, in all plans.
    """
    everything = {**dict.fromkeys(losses.paths, MASTER_BITS), **(fixed or {})}
    zero = losses.loss(everything)

    def alone(paths: Iterable[str], bits: int) -> float:
        return losses.loss({**everything, **dict.fromkeys(paths, bits)}) - zero

    loss_GW = losses.estimates(groups, widths)
    rough = np.isfinite(loss_GW).all(1)
    for row in np.flatnonzero(~rough):
        loss_GW[row] = [alone(groups[row], bits) for bits in widths]
    if rough.any():
        together = [path for row in np.flatnonzero(rough) for path in groups[row]]
        measured = np.array([alone(together, bits) for bits in widths])
        loss_GW[rough] *= measured / np.maximum(loss_GW[rough].sum(0), np.finfo(float).tiny)
    return loss_GW


def strategy_plan(strategy: str, paths: Sequence[str], budget: Budget, *, widths: Sequence[int]) -> dict[str, int]:
    """Return the plan {path: bits} of one of the paper's strategies that uses most of ``budget``."""
    return _widest(strategy, by_layer(paths), budget, widths)


def _widest(strategy: str, parts: Groups, budget: Budget, widths: Sequence[int]) -> dict[str, int]:
    mix = widest_mix(strategy, widths, costs=budget.table(parts, widths), limit=budget.limit)
    return {path: bits for part, bits in zip(parts, mix, strict=True) for path in part}


def _simple_plans(
    groups: Groups, budget: Budget, widths: Sequence[int], estimated: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Yield the uniform widths within ``budget``, and the four strategies: over the paper's widths by layer, and over
    every two neighbouring widths by group, which uses more of the budget. Strategies give embedding and head the widths
    of the ``estimated`` plan.
    """
    paths = [path for group in groups for path in group]
    for bits in widths:
        uniform = dict.fromkeys(paths, bits)
        if budget.cost(uniform) <= budget.limit:
            yield uniform
    # layers have an order, embedding and head have none
    ends = {path: bits for path, bits in estimated.items() if path in ends_of(paths)}
    groups = tuple(group for group in groups if not set(group) & ends.keys())
    paths, budget = [path for group in groups for path in group], budget.fixing(ends)
    if ends:
        uniform_plans = (dict.fromkeys(paths, bits) for bits in widths)
        yield from ({**ends, **uniform} for uniform in uniform_plans if budget.cost(uniform) <= budget.limit)
    paper = [bits for bits in PAPER_WIDTHS if bits in widths]
    for mixed, parts in ((paper, by_layer(paths)), *((pair, groups) for pair in itertools.pairwise(widths))):
        if mixed and budget.cost(dict.fromkeys(paths, mixed[0])) <= budget.limit:
            for strategy in STRATEGIES:
                yield {**ends, **_widest(strategy, parts, budget, mixed)}


def _express(bits: Mapping[str, int], groups: Groups, widths: Sequence[int]) -> Choice | None:
    """Return a plan as a choice, or None if it splits a group or has another width."""
    chosen = [{bits[path] for path in group} for group in groups]
    if any(len(found) > 1 or not found <= set(widths) for found in chosen):
        return None
    return tuple(widths.index(next(iter(found))) for found in chosen)


def choose(loss_GW: np.ndarray, cost_GW: np.ndarray, *, limit: int) -> Choice:
    """Return the choice of least summed loss whose summed cost (integers) is at most ``limit``; one must fit."""
    widths = loss_GW.shape[1]
    rest = np.append(np.cumsum(cost_GW.min(1)[::-1])[::-1][1:], 0)  # the least that later groups cost
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps: list[np.ndarray] = []
    for group_loss, group_cost, least in zip(loss_GW, cost_GW, rest, strict=True):
        costs = (cost[:, None] + group_cost).ravel()
        losses = (loss[:, None] + group_loss).ravel()
        order = np.lexsort((losses, costs))
        order = order[costs[order] + least <= limit]
        best_before = np.minimum.accumulate(np.append(np.inf, losses[order]))[:-1]
        kept = order[losses[order] < best_before]
        cost, loss = costs[kept], losses[kept]
        steps.append(kept)
    state, choice = len(cost) - 1, []
    for kept in reversed(steps):
        state, width = divmod(int(kept[state]), widths)
        choice.append(width)
    return tuple(reversed(choice))


def refine(
    measure: Callable[[Choice], float],
    start: Choice,
    *,
    loss_GW: np.ndarray,
    cost_GW: np.ndarray,
    limit: int,
    evaluations: int,
    patience: int = PATIENCE,
) -> Choice:
    """Return a choice within ``limit`` whose measured loss no tried swap lowers. Deterministic.

    measure: the loss of a choice; called at most ``evaluations`` times after the start. loss_GW: estimates. Ends early
    after ``patience`` swaps in a row without a gain.
    """
    estimate_GW = loss_GW.astype(float)
    current, known, tried, failed = start, measure(start), {start}, 0
    while evaluations > 0 and failed < patience:
        swaps = _swaps(estimate_GW, cost_GW, current, limit=limit)
        candidate = next((swap for swap in swaps if swap not in tried), None)
        if candidate is None:
            break
        found = measure(candidate)
        tried.add(candidate)
        moved = [g for g, (old, new) in enumerate(zip(current, candidate, strict=True)) if old != new]
        predicted = sum(estimate_GW[g, candidate[g]] - estimate_GW[g, current[g]] for g in moved)
        for group in moved:
            estimate_GW[group, candidate[group]] += (found - known - predicted) / len(moved)
        evaluations -= 1
        failed += 1
        if found < known:
            current, known, failed = candidate, found, 0
    return current


def _swaps(loss_GW: np.ndarray, cost_GW: np.ndarray, current: Choice, *, limit: int) -> Iterator[Choice]:
    """Yield choices within ``limit`` that raise one group and lower another or none, in order of estimated loss."""
    groups, widths = cost_GW.shape
    rows = np.arange(groups)
    more_loss = (loss_GW - loss_GW[rows, current][:, None]).ravel()
    more_cost = (cost_GW - cost_GW[rows, current][:, None]).ravel()
    slack = limit - int(cost_GW[rows, current].sum())
    up, down = (_best(np.flatnonzero(moves), more_loss) for moves in (more_cost > 0, more_cost < 0))
    first = np.concatenate([up, np.repeat(up, len(down))])
    second = np.concatenate([np.full(len(up), -1), np.tile(down, len(up))])  # -1: nothing is lowered
    alone = second < 0
    cost = more_cost[first] + np.where(alone, 0, more_cost[second])
    loss = more_loss[first] + np.where(alone, 0, more_loss[second])
    fits = (cost <= slack) & (alone | (first // widths != second // widths))
    for swap in np.flatnonzero(fits)[np.argsort(loss[fits], kind="stable")]:
        choice = list(current)
        for move in (first[swap], second[swap]):
            if move >= 0:
                choice[move // widths] = int(move % widths)
        yield tuple(choice)


def _best(moves: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the MOST_MOVES moves of least loss, in their order: all pairs of them are tried."""
    return moves if len(moves) <= MOST_MOVES else np.sort(moves[np.argsort(loss[moves], kind="stable")[:MOST_MOVES]])
