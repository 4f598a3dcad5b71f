"""Prefixes of earlier sequences, whose keys and values can be copied instead of computed.

Keys and values depend on the width at which they were computed, and on all tokens before. So a prefix is found by its
token ids and by the width table of each position, as a list of marks (stop, table): positions before ``stop`` and after
the mark before were computed with ``table``, the bytes of the widths of all matrices. A request finds only positions
whose table, and whose predecessors' table, is the one that it reads its prompt with. One engine has one mode of
activations, so the mode is not part of the key.

The least recently used prefixes go first when the memory for them is needed. The copy is exact: a text does not depend
on what was found.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from matquant import _native

SHORTEST = 16  # tokens: a tile of the cache; shorter prefixes are not worth a copy

Mark = tuple[int, bytes]  # stop, width table


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A finished sequence: ids [tokens], int32, the marks of its positions, and its cache."""

    ids: np.ndarray
    marks: tuple[Mark, ...]
    cache: _native.Cache
    bytes: int


def add_mark(marks: list[Mark], stop: int, table: bytes) -> None:
    """Note that positions up to ``stop`` were computed with ``table``."""
    if marks and marks[-1][1] == table:
        marks.pop()
    marks.append((stop, table))


def uniform(marks: Sequence[Mark], table: bytes) -> int:
    """Return the number of positions from the start that were computed with ``table`` only."""
    return marks[0][0] if marks and marks[0][1] == table else 0


def common(first: np.ndarray, second: np.ndarray) -> int:
    """Return the length of the common start of two arrays of ids."""
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length


class Prefixes:
    """Finished sequences, least recently used first, in at most ``limit`` bytes."""

    def __init__(self) -> None:
        self.bytes = 0
        self._entries: OrderedDict[int, Prefix] = OrderedDict()
        self._places: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)  # table and first ids -> entries
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, ids: np.ndarray, table: bytes) -> tuple[_native.Cache | None, int]:
        """Return the cache with the longest start of ``ids`` computed with ``table``, and its length; (None, 0)."""
        best, longest = None, 0
        for number in self._places.get((table, ids[:SHORTEST].tobytes()), ()):
            entry = self._entries[number]
            length = min(common(ids, entry.ids), uniform(entry.marks, table))
            if length > longest:
                best, longest = number, length
        if best is None or longest < SHORTEST:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best].cache, longest

    def add(self, prefix: Prefix, *, limit: int) -> None:
        """Keep a finished sequence, unless what it can give is kept already; older ones make room."""
        table = prefix.marks[0][1] if prefix.marks else b""
        usable = uniform(prefix.marks, table)
        if usable < SHORTEST or prefix.bytes > limit:
            return
        key = (table, prefix.ids[:SHORTEST].tobytes())
        for number in list(self._places.get(key, ())):
            other = self._entries[number]
            theirs = uniform(other.marks, table)
            same = common(prefix.ids[:usable], other.ids[:theirs])
            if same == usable:  # all of the new one is in this one
                self._entries.move_to_end(number)
                return
            if same == theirs:
                self._drop(number)
        self.shrink(limit - prefix.bytes)
        self._entries[self._next] = prefix
        self._places[key].append(self._next)
        self.bytes += prefix.bytes
        self._next += 1

    def shrink(self, limit: int) -> None:
        """Drop the least recently used prefixes until the rest takes at most ``limit`` bytes."""
        while self._entries and self.bytes > limit:
            self._drop(next(iter(self._entries)))

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number)
        self.bytes -= entry.bytes
        key = (entry.marks[0][1], entry.ids[:SHORTEST].tobytes())
        self._places[key].remove(number)
        if not self._places[key]:
            del self._places[key]
