"""Which planes of experts a budget of memory is best spent on.

With u_e the decayed count of tokens that used expert e, a plane that takes e from b to b' bits is worth

    u_e * (4^-b - 4^-b') / bytes of the plane

its part in the squared rounding error of a uniform grid. The most valuable planes that fit are kept. A plane in memory
counts HYSTERESIS times, so that experts used alike do not take turns. A level is the number of planes that an expert
has above the narrowest width.

Shapes: E experts of all layers, P planes of an expert above the narrowest width. All experts have the same sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

HYSTERESIS = 1.5

Levels = Mapping[int, int]  # expert -> level


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The planes of an expert. bytes_P: int64. gains_P: fall of the squared error per byte, which falls with P."""

    bytes_P: np.ndarray
    gains_P: np.ndarray

    @property
    def count(self) -> int:
        """Return P."""
        return len(self.bytes_P)

    def total(self, levels_E: np.ndarray) -> int:
        """Return the bytes of the planes at these levels."""
        return int(np.concatenate([[0], np.cumsum(self.bytes_P)])[levels_E].sum())


def wanted(used_E: np.ndarray, levels_E: np.ndarray, sizes: Sizes, *, room: int) -> np.ndarray:
    """Return the levels that ``room`` bytes are best spent on, int64 [E].

    used_E: counts above 0. levels_E: those in memory.
    """
    return _fitting(_by_worth(used_E, levels_E, sizes), sizes, experts=len(used_E), room=room)


def exchange(
    used_E: np.ndarray, levels_E: np.ndarray, sizes: Sizes, *, room: int, most: int
) -> tuple[Levels, Levels, int]:
    """Return the new levels of experts that lose planes and of those that get some, and the bytes of those gained.

    room: bytes of all planes. most: bytes gained. The most valuable planes come first, and no more than they need
    are lost for them.
    """
    order = _by_worth(used_E, levels_E, sizes)
    target_E = _fitting(order, sizes, experts=len(used_E), room=room)
    experts, planes = order // sizes.count, order % sizes.count
    is_held, is_wanted = planes < levels_E[experts], planes < target_E[experts]
    gained = order[is_wanted & ~is_held]
    gained = gained[np.cumsum(sizes.bytes_P[gained % sizes.count]) <= most]
    gained_bytes = int(sizes.bytes_P[gained % sizes.count].sum())
    lost = order[is_held & ~is_wanted][::-1]  # of an expert the last plane first
    missing = gained_bytes - (room - sizes.total(levels_E))
    freed = np.cumsum(sizes.bytes_P[lost % sizes.count])
    lost = lost[: int(np.searchsorted(freed, missing)) + 1 if missing > 0 else 0]
    down = {int(number) // sizes.count: int(number) % sizes.count for number in lost}
    up = {int(number) // sizes.count: int(number) % sizes.count + 1 for number in gained}
    return down, up, gained_bytes


def _by_worth(used_E: np.ndarray, levels_E: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Return the numbers e * P + p of all planes, the most valuable first; those of an expert in their order."""
    worth_EP = used_E[:, None] * sizes.gains_P
    worth_EP[np.arange(sizes.count) < levels_E[:, None]] *= HYSTERESIS
    return np.argsort(-worth_EP, axis=None, kind="stable")


def _fitting(order: np.ndarray, sizes: Sizes, *, experts: int, room: int) -> np.ndarray:
    kept = order[np.cumsum(sizes.bytes_P[order % sizes.count]) <= room]
    return np.bincount(kept // sizes.count, minlength=experts)
