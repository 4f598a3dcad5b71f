"""Which rows the next step computes: one of every decoding sequence, and a chunk of prompts.

A prompt is read in chunks so that the sequences that decode meanwhile wait for a bounded time: ``chunk`` tokens of all
prompts together per step, or as many as a step takes if nothing decodes. Products take 8 or 16 rows at a time and fill
up what is missing, so a chunk is made as much longer as costs nothing. Prompts are read at the widest width of the
policy, unless their width is fixed: reading a prompt is bound by arithmetic and is about as fast at every width. So
with ``prefill_bits`` the prompt of a narrower width is read at that one, all but its last token, whose logits choose.

Rows are grouped by width; each group is one native step. Within a group, rows that want logits come last.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from matquant import _native
from matquant.engine.speculation import Draft
from matquant.serve.prefixes import SHORTEST, common, uniform
from matquant.serve.slots import Slot, Width

LOGIT_VALUES = 2**23  # logits that a step computes for prompts, at most


class Piece(NamedTuple):
    """Tokens ``start`` to ``stop`` of a sequence, to be read in one step. scored: all of their logits are wanted.

    draft: tokens behind those of the sequence; None: nothing was to be drafted.
    """

    slot: Slot
    start: int
    stop: int
    width: Width
    scored: bool = False
    draft: Draft | None = None

    @property
    def chooses(self) -> bool:
        """Return whether the next token is chosen after it."""
        return self.stop >= len(self.slot.ids)

    @property
    def logits(self) -> int:
        """Return how many rows want logits, the last ones."""
        rows = self.stop - self.start
        return rows if self.scored else min(rows, max(0, self.stop - len(self.slot.ids) + 1))

    def tokens(self, start: int, stop: int) -> list[int]:
        """Return the tokens ``start`` to ``stop``, drafts included."""
        ids, drafts, held = self.slot.ids, self.draft.tokens if self.draft else [], len(self.slot.ids)
        return ids[start:stop] + drafts[max(0, start - held) : max(0, stop - held)]


@dataclass(kw_only=True)
class Group:
    """The rows of one native step: arguments of ``_native.step``, and where the logits of each piece begin."""

    width: Width
    pieces: list[Piece]
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    caches: list[_native.Cache] = field(default_factory=list)
    first_logit: int = 0
    places: list[int] = field(default_factory=list)


def next_chunks(
    slots: Sequence[Slot],
    *,
    reading: Callable[[Slot], tuple[Width, int]],
    rows: int,
    vocab: int,
    begin: Callable[[Slot, Width], bool],
) -> list[Piece]:
    """Return the pieces of prompts to read, at most ``rows`` rows in all, of the first slots first.

    reading: returns the width of a slot's next tokens, and where they stop. begin: called for a slot whose prompt has
    not been begun; False: it waits for a prompt that is being read and begins alike.
    """
    pieces = []
    logits = max(1, LOGIT_VALUES // vocab)
    for slot in slots:
        if rows <= 0:
            break
        if slot.cached_tokens is None and not begin(slot, reading(slot)[0]):
            continue
        scored = slot.generation.prompt_logprobs
        width, stop = reading(slot)
        size = min(rows, stop - slot.read, logits if scored else rows)
        if size:
            pieces.append(Piece(slot=slot, start=slot.read, stop=slot.read + size, width=width, scored=scored))
        rows -= size
        logits -= size if scored else 0
    return pieces


def fill_panels(rows: int, *, beside: int, exact: bool) -> int:
    """Return ``rows``, and the rows more that products of them and of the rows ``beside`` take no longer with."""
    return _native.padded_tokens(rows + beside, exact) - beside


def group_pieces(pieces: Iterable[Piece]) -> list[Group]:
    """Return the native steps that read the pieces, one for each width, in the order of their first pieces."""
    groups: dict[bytes, Group] = {}
    for piece in pieces:
        groups.setdefault(piece.width.key, Group(width=piece.width, pieces=[])).pieces.append(piece)
    for group in groups.values():
        wanted = [piece.stop - piece.logits for piece in group.pieces]  # where the rows begin that want logits
        for piece, middle in zip(group.pieces, wanted, strict=True):
            if piece.start < middle:
                add_rows(group, piece, piece.start, middle)
        group.first_logit = len(group.tokens)
        for piece, middle in zip(group.pieces, wanted, strict=True):
            group.places.append(len(group.tokens) - group.first_logit)
            add_rows(group, piece, middle, piece.stop)
    return list(groups.values())


def add_rows(group: Group, piece: Piece, start: int, stop: int) -> None:
    """Append the rows of the tokens ``start`` to ``stop`` of a piece."""
    assert piece.slot.cache is not None, "begin first"
    group.tokens += piece.tokens(start, stop)
    group.positions += range(start, stop)
    group.caches += [piece.slot.cache] * (stop - start)


def find_running(slot: Slot, table: bytes, running: Iterable[Slot]) -> tuple[_native.Cache | None, int, int]:
    """Look for the start of a prompt in the prompts of running sequences.

    Returns the cache that holds most of it, how many tokens it holds, and how many it will once prompts that are being
    read with the same width ``table`` have been read. The last token of a prompt is always read.
    """
    best, longest, expected = None, 0, 0
    wanted = slot.prompt[:-1]
    for other in running:
        if other is slot or other.cache is None or other.reads is None:
            continue
        same = common(wanted, other.prompt)
        held = min(same, uniform(other.marks, table))
        if held > longest and held >= SHORTEST:
            best, longest = other.cache, held
        if other.is_reading and other.reads.key == table:
            expected = max(expected, same)
    return best, longest, max(longest, expected)
