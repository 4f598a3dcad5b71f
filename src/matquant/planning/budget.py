"""Budgets of plans, and the groups of weights that share a width.

A cost is an integer for each path and width: bits on disk (``--bits-per-weight``, ``--size``) or nanoseconds per token
(``--tokens-per-second``, planning/speed.py). A budget limits their sum; integers make the limit exact.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from matquant.core.experts import expert_name
from matquant.core.nest import check_bits
from matquant.format.read import Checkpoint
from matquant.format.sizes import plain_bytes, size_bytes
from matquant.hf.families import fused_name
from matquant.system.arguments import read_size
from matquant.system.errors import InputError, check_positive

Groups = tuple[tuple[str, ...], ...]  # paths that share a width, in the order of the model


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit on a plan's cost. costs: (path, bits) -> integer. asked: the budget in words. least: a cost in words.

    fixed: paths whose widths are given, here and in every plan; their costs are not in ``limit``.
    """

    limit: int
    costs: Mapping[tuple[str, int], int]
    asked: str
    least: Callable[[int], str]
    fixed: Mapping[str, int] = field(default_factory=dict)

    def fixing(self, bits: Mapping[str, int]) -> "Budget":
        """Return the budget of the other paths, with these paths {path: bits} at these widths."""
        more = {path: width for path, width in bits.items() if path not in self.fixed}
        cost = self.cost(more)
        return replace(
            self,
            limit=self.limit - cost,
            least=lambda other: self.least(other + cost),
            fixed={**self.fixed, **more},
        )

    def cost(self, bits: Mapping[str, int]) -> int:
        """Return the cost of a plan {path: bits}."""
        return sum(self.costs[item] for item in bits.items())

    def table(self, groups: Groups, widths: Sequence[int]) -> list[list[int]]:
        """Return costs [group][width]. InputError if even the cheapest choice of every group does not fit."""
        table = [[sum(self.costs[path, bits] for path in group) for bits in widths] for group in groups]
        least = sum(map(min, table))
        if least > self.limit:
            raise InputError(
                f"{self.asked} is below the smallest plan of the widths {','.join(map(str, widths))}, which has "
                f"{self.least(least)}; use a larger budget, or other --widths"
            )
        return table


def size_costs(checkpoint: Checkpoint, widths: Iterable[int]) -> dict[tuple[str, int], int]:
    """Return the bits on disk of every path at every width, all overhead included: (path, bits) -> bits."""
    least = checkpoint.least
    return {
        (path, bits): round(8 * size_bytes(checkpoint, path, bits))
        for path in checkpoint.shapes
        for bits in {*widths} | ({least[path]} if path in least else set())
    }


def bits_budget(checkpoint: Checkpoint, bits_per_weight: float, *, widths: Iterable[int]) -> Budget:
    """Return a budget in bits per quantised weight, all overhead included."""
    check_positive(bits_per_weight=bits_per_weight)
    weights = sum(rows * columns for rows, columns in checkpoint.shapes.values())
    return Budget(
        limit=int(bits_per_weight * weights + 1e-3),  # tolerates rounding of the product
        costs=size_costs(checkpoint, widths),
        asked=f"{bits_per_weight:g} bits per weight",
        least=lambda bits: f"{math.ceil(1000 * bits / weights) / 1000:g} bits per weight",
    )


def size_budget(checkpoint: Checkpoint, size: str, *, widths: Iterable[int]) -> Budget:
    """Return a budget for the size of the whole model, such as "1.1GB": quantised weights and all other tensors."""
    plain = plain_bytes(checkpoint)
    return Budget(
        limit=8 * (read_size(size, "--size") - plain),
        costs=size_costs(checkpoint, widths),
        asked=size,
        least=lambda bits: f"{-(-bits // 8) + plain} bytes ({plain} of them not quantised)",
    )


def check_widths(widths: Sequence[int]) -> None:
    """Raise InputError unless ``widths`` are different widths in ascending order."""
    for bits in widths:
        check_bits(bits)
    if not widths or list(widths) != sorted(set(widths)):
        raise InputError(f"--widths {','.join(map(str, widths))} are not ascending; give them as in 2,4,8")


def by_layer(paths: Iterable[str]) -> Groups:
    """Return the paths of each decoder layer, in order: the first number in a path is its layer's."""
    layers: dict[int, list[str]] = {}
    for path in paths:
        layers.setdefault(_layer(path), []).append(path)
    return tuple(tuple(layers[layer]) for layer in sorted(layers))


def by_width(paths: Iterable[str], *, fused: bool, experts: bool = False) -> Groups:
    """Return the paths that share a width, in order: all experts of a layer, and with ``fused`` those of FUSED.

    experts: the projections of each expert share a width instead.
    """
    groups: dict[str, list[str]] = {}
    for path in (path for layer in by_layer(paths) for path in layer):
        expert = expert_name(path)
        together = fused_name(path) if fused or expert else path
        groups.setdefault(expert if expert and experts else together, []).append(path)
    return tuple(map(tuple, groups.values()))


def _layer(path: str) -> int:
    return next((int(part) for part in path.split(".") if part.isdecimal()), -1)
