"""The native calls of the engine thread: one workspace and one array of logits for all sequences, and their caches.

``Stepper.step`` runs the groups of a step one after another and lets every sequence choose its next token. A sequence
that cannot go on (its constraint raises, its logits are not finite) ends alone, with finish "error".
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from matquant import _native
from matquant.engine.engine import Engine
from matquant.serve.prefixes import SHORTEST, Prefixes
from matquant.serve.scheduling import LOGIT_VALUES, Group, Piece, find_running, group_pieces
from matquant.serve.slots import Slot, Width


class Stepper:
    """Everything that is shared by the steps of an engine. counts: of tokens, steps and seconds, for /metrics."""

    def __init__(self, engine: Engine, *, rows: int, choosing: int, clock: Callable[[], float]) -> None:
        vocab = engine.model.architecture.vocab
        self.engine = engine
        self.workspace = _native.Workspace(engine.model.native, rows, engine.context, engine.threads)
        self.prefixes = Prefixes()
        self.counts: defaultdict[str, float] = defaultdict(float)
        self._clock = clock
        scored = min(rows, max(1, LOGIT_VALUES // vocab))
        self._logits = np.empty((choosing + scored, vocab), dtype=np.float32)  # address space until it is used

    def begin(self, slot: Slot, width: Width, running: Iterable[Slot]) -> bool:
        """Give a slot its cache, with as much of its prompt as is known; False: more of it is being read just now."""
        source, length = None, 0
        if not slot.generation.prompt_logprobs:
            source, length, expected = find_running(slot, width.key, running)
            kept, kept_length = self.prefixes.find(slot.prompt[:-1], width.key)
            if kept_length > length:
                source, length = kept, kept_length
            if expected >= length + SHORTEST:
                return False
        try:
            cache = _native.Cache(self.engine.model.native, slot.capacity, self.engine.exact)
        except MemoryError:
            slot.finish("error", f"not enough memory for a sequence of {slot.capacity} tokens")
            return False
        slot.begin(cache, source, length, width)
        self.counts["prompt_tokens"] += len(slot.prompt)
        self.counts["cached_tokens"] += length
        return True

    def step(self, pieces: Sequence[Piece], *, reason: str) -> tuple[float, float]:
        """Read the pieces, and choose tokens where all has been read; return the seconds of native code, and of the
        rest. reason: why the policy chose its width."""
        native_s = choosing_s = 0.0
        tokens = sum(piece.stop - piece.start for piece in pieces if piece.start < len(piece.slot.prompt))
        before = self.counts["generation_tokens"]
        for group in group_pieces(pieces):
            began = self._clock()
            logits = self.run(group)
            middle = self._clock()
            first = group.pieces[0].draft
            if first and all(piece.draft for piece in group.pieces):
                first.times.spent(middle - began, rows=len(group.tokens))
            for piece, place in zip(group.pieces, group.places, strict=True):
                self._take(piece, logits[place : place + piece.logits], reason)
            native_s += middle - began
            choosing_s += self._clock() - middle
            self.counts["native_steps"] += 1
        self.counts[f"iteration_tokens/{tokens + self.counts['generation_tokens'] - before:.0f}"] += 1
        self.counts["native_s"] += native_s
        self.counts["choosing_s"] += choosing_s
        return native_s, choosing_s

    def run(self, group: Group) -> np.ndarray:
        """Compute the rows of a group; return the logits, float32 [at least as many as it wants, vocab]."""
        for piece in group.pieces:
            piece.slot.reached = max(piece.slot.reached, piece.stop)
        _native.step(
            self.engine.model.native,
            group.width.table,
            self.engine.exact,
            group.tokens,
            group.positions,
            group.caches,
            group.first_logit,
            self._logits,
            self.workspace,
        )
        self.engine.stepped(self.workspace)
        self.counts["rows"] += len(group.tokens)
        return self._logits

    def _take(self, piece: Piece, logits: np.ndarray, reason: str) -> None:
        slot, drafts = piece.slot, piece.draft.tokens if piece.draft else []
        slot.advance(piece.stop - len(drafts), piece.width.key)
        try:
            if piece.scored:
                slot.score_prompt(piece.start, logits)
            if piece.chooses:
                self._choose(piece, logits[-1 - len(drafts) :], drafts, reason)
        except Exception as error:  # whatever a constraint raises concerns its sequence alone
            slot.finish("error", f"{type(error).__name__}: {error}")

    def _choose(self, piece: Piece, logits: np.ndarray, drafts: Sequence[int], reason: str) -> None:
        """Choose tokens for as long as they are those drafted, and the one after them."""
        slot, label, accepted = piece.slot, piece.width.label, 0
        while True:
            new = slot.new
            came = slot.choose(logits[accepted], label=label, reason=reason, drafts=drafts[accepted:])
            accepted += came
            self.counts["generation_tokens"] += slot.new - new
            self.counts[f"generation_tokens/{label}"] += slot.new - new
            if not came or slot.finished:
                break
            slot.advance(len(slot.ids), piece.width.key)
        if piece.draft and not slot.finished:
            piece.draft.judge(accepted, slot.ids[-1])
        if drafts:
            self.counts["drafts"] += 1
            self.counts["draft_tokens"] += len(drafts)
            self.counts["accepted_tokens"] += accepted
            for position in range(accepted):
                self.counts[f"accepted_tokens/{position}"] += 1

    def release(self, slot: Slot, *, limit: int, broken: bool) -> None:
        """Keep what later requests may copy of a sequence that has ended, in ``limit`` bytes of prefixes."""
        prefix = slot.prefix()
        if prefix is not None and not broken:
            self.prefixes.add(prefix, limit=limit)


def now_s() -> float:
    """Return the seconds of the clock that everything here uses."""
    return time.perf_counter()
