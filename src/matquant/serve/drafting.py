"""Drafts for the sequences of a step: which of them draft, from where, and how many tokens (engine/speculation.py).

A step with drafts has a row for every sequence's last token and one for each draft, at most MOST_ROWS together, because
more rows cost more than they can yield. So four sequences may draft one token each, two of them three, and a sequence
alone seven; with five or more, or while a prompt is read, nothing is drafted. Sequences at one width choose together
(engine/pace.py), and those that draft by steps take them together. What steps cost is shared by all sequences and
starts from the table of costs (cost.py); how often drafts are accepted is measured for each, because texts differ.

Logit bias, penalties, ends before ``min_tokens`` and constraints count for drafts too, because a token that they
exclude is always rejected; of these only constraints see the drafts before. Where a constraint permits a single text,
that text is drafted without a step.
"""

from collections.abc import Callable, Sequence

import numpy as np

from matquant.engine.pace import PANELS, Pace, Times, Wish, choose_together
from matquant.engine.speculation import AUTO, DRAFT_WIDTHS, LEAST_SAVING, Draft, narrower
from matquant.serve.cost import Costs
from matquant.serve.logits import shift
from matquant.serve.scheduling import Piece, group_pieces
from matquant.serve.slots import Slot, Width
from matquant.serve.stepping import Stepper
from matquant.serve.work import Constraint

MOST_ROWS = PANELS[-1]
FORCED = "forced"
CATCH_UP = 4096  # tokens of a text that prompt lookup takes up in a step


class Drafter:
    """Chooses what sequences draft. speculate: "auto", or the number of tokens that each drafts if there is room."""

    def __init__(
        self, stepper: Stepper, costs: Costs, *, speculate: str | int, rows: int, clock: Callable[[], float]
    ) -> None:
        self._stepper, self._costs, self._clock = stepper, costs, clock
        self._rows = min(rows, MOST_ROWS)
        self._length = None if speculate == AUTO else int(speculate)
        engine = stepper.engine
        self._bits = {f"int{bits}": bits for bits in DRAFT_WIDTHS if bits <= engine.max_bits}
        self._tables = {name: engine.widths(bits) for name, bits in self._bits.items()}
        self._sources: dict[bytes, dict[str, Width]] = {}  # of a width, by its key: what may draft for it
        self._times: dict[bytes, Times] = {}

    def room(self, sequences: int) -> int:
        """Return how many tokens each of the sequences of a step may draft."""
        return max(0, self._rows // sequences - 1) if sequences else 0

    def draft(self, pieces: Sequence[Piece], rooms: Sequence[int]) -> list[Piece]:
        """Return the pieces, each of the last token of a sequence, with at most ``rooms`` drafts behind them."""
        began = self._clock()
        together: dict[bytes, list[tuple[Piece, Wish, Sequence[int]]]] = {}
        for piece, room in zip(pieces, rooms, strict=True):
            found, tokens = propose(piece.slot, room)
            held = len(tokens) if len(tokens) < room else MOST_ROWS - 1
            wish = Wish(self._pace(piece.slot, piece.width), found, room, held)
            together.setdefault(piece.width.key, []).append((piece, wish, tokens))
        seconds = {key: self._times[key].cost(len(own)) for key, own in together.items()}
        drafting: list[Piece] = []
        for key, own in together.items():
            beside = len(pieces) - len(own), sum(seconds.values()) - seconds[key]
            choices = choose_together([wish for _, wish, _ in own], beside=beside)
            for (piece, wish, tokens), choice in zip(own, choices, strict=True):
                draft = Draft(wish.pace, tokens, *choice, ends=piece.slot.generation.ends, found=wish.found)
                drafting.append(piece._replace(draft=draft))
        ahead: dict[int, Constraint] = {}  # constraints after the drafts
        while going := [piece for piece in drafting if piece.draft and piece.draft.goes_on]:
            self._step(going, ahead)
        self._stepper.counts["drafting_s"] += self._clock() - began
        return [
            piece._replace(stop=piece.stop + len(piece.draft.tokens)) if piece.draft and piece.draft.tokens else piece
            for piece in drafting
        ]

    def _pace(self, slot: Slot, width: Width) -> Pace:
        """Return how often drafts of a sequence are accepted at a width."""
        times, pace = self._of(width), slot.paces.get(width.key)
        if pace is None:
            pace = slot.paces[width.key] = Pace(times=times, length=self._length)
        return pace

    def _step(self, pieces: Sequence[Piece], ahead: dict[int, Constraint]) -> None:
        """Draft one more token for each of the pieces. ahead: their constraints after the drafts, by number."""
        steps = []
        for piece in pieces:
            assert piece.draft is not None
            start, width = piece.start + len(piece.draft.tokens), self._sources[piece.width.key][piece.draft.source]
            steps.append(piece._replace(start=start, stop=start + 1, width=width))
        for group in group_pieces(steps):
            began = self._clock()
            logits = self._stepper.run(group)
            for piece, place in zip(group.pieces, group.places, strict=True):
                self._take(piece, logits[place], ahead)
            spent_s = self._clock() - began
            for source, times in {(piece.draft.source, piece.draft.times) for piece in group.pieces if piece.draft}:
                times.spent(spent_s, rows=len(group.pieces), source=source)

    def _take(self, piece: Piece, logits_V: np.ndarray, ahead: dict[int, Constraint]) -> None:
        """Draft a token from logits, which are changed."""
        slot, generation, draft = piece.slot, piece.slot.generation, piece.draft
        assert draft is not None
        shift(logits_V, generation, slot.penalties, new=slot.new + len(draft.tokens))
        if generation.constraint is None:
            draft.take(logits_V[: slot.choosable], generation.sampling, slot.numbers)
            return
        try:
            constraint = ahead.get(slot.number) or ahead.setdefault(slot.number, generation.constraint.copy())
            constraint.mask(logits_V)
            token = draft.take(logits_V[: slot.choosable], generation.sampling, slot.numbers)
            if token is not None and token not in generation.ends:
                constraint.accept(token)
            if constraint.ended:
                draft.stop()
        except Exception:  # whatever a constraint raises: the step that verifies decides what it means
            draft.stop()

    def _of(self, width: Width) -> Times:
        """Return what steps for a width take."""
        if width.key not in self._times:
            cost, bits = self._costs.step_s, {"": width.bits, **self._bits}
            tables = narrower(self._tables, width.table)
            share = {name: cost(bits[name], 1) / cost(width.bits, 1) for name in tables}
            share = {name: part for name, part in share.items() if part <= LEAST_SAVING}
            self._sources[width.key] = {
                name: Width(table=tables[name], key=tables[name].tobytes(), label=name, bits=bits[name])
                for name in share
            }
            self._times[width.key] = Times(share, table=lambda source, rows: cost(bits[source], rows))
        return self._times[width.key]


def propose(slot: Slot, room: int) -> tuple[str, Sequence[int]]:
    """Return where drafts come from that take no step ("" for nowhere), and at most ``room`` tokens.

    They are copied by prompt lookup, as far as the constraint allows, or the only ones that it allows.
    """
    lookup, constraint = slot.lookup, slot.generation.constraint
    lookup.extend(slot.ids[len(lookup.ids) :][:CATCH_UP])
    found = lookup.find() if room and len(lookup.ids) == len(slot.ids) else ""
    tokens: Sequence[int] = lookup.propose(room) if found else []
    if constraint is None or not room:
        return found, tokens
    try:
        tokens = tokens[: constraint.allowed(tokens)]
        if not tokens:
            found, tokens = FORCED, constraint.forced()[:room]
    except Exception:  # as above
        tokens = []
    return (found, tokens) if tokens else ("", [])
