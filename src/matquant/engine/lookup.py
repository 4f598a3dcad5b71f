"""Prompt lookup: draft the tokens that followed the last few tokens earlier in the same text.

The last three tokens are looked up among all earlier ones, then the last two; the latest occurrence counts. What is
copied may run into what is being written, so a repetition goes on. A lookup costs microseconds and no model step
(the idea: Saxena, prompt lookup decoding, 2023).
"""

from collections.abc import Sequence

SIZES = (3, 2)  # tokens that are looked up, the longest first
LONG = 8  # the longest agreement that is told apart from a longer one


class Lookup:
    """The ids so far, and where each short run of them was last followed by something."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._ends: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in SIZES}
        self._place = 0  # index of the id that followed the occurrence

    def extend(self, ids: Sequence[int]) -> None:
        """Append ids."""
        for token in ids:
            for size, ends in self._ends.items():
                if len(self.ids) >= size:
                    ends[tuple(self.ids[-size:])] = len(self.ids)
            self.ids.append(token)

    def find(self) -> str:
        """Return the kind of the occurrence found ("lookup2", "lookup3" or "lookup8": ids that agree), "" for none."""
        for size, ends in self._ends.items():
            place = ends.get(tuple(self.ids[-size:])) if len(self.ids) >= size else None
            if place is not None:
                self._place = place
                before, now = self.ids[max(0, place - LONG) : place], self.ids[-LONG:]
                return f"lookup{LONG}" if before == now else f"lookup{size}"
        return ""

    def propose(self, count: int) -> list[int]:
        """Return ``count`` ids that followed the occurrence which ``find`` found."""
        distance = len(self.ids) - self._place
        followed = self.ids[self._place : self._place + count]
        return [followed[number % distance] for number in range(count)]
