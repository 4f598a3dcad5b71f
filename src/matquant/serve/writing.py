"""The text of one generation: tokens in, pieces of whole characters out, up to a stop text; and what was counted."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from matquant.hf.vocabulary import TextStream, Vocabulary
from matquant.serve.work import Event, Generation, Scored

CONTEXT_TAIL = 8  # tokens of the prompt that the text of the first new token may depend on


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What became known of an answer. tokens: of ``text``, scored; finish: set in the last piece only."""

    text: str = ""
    tokens: tuple[Scored, ...] = ()
    prompt: tuple[Scored, ...] = ()
    finish: str | None = None


@dataclass(kw_only=True)
class Counts:
    """What is counted of a generation. served: label of a width and how many tokens it chose, in order."""

    tokens: int = 0
    cached_tokens: int = 0
    prompt_bits: int | None = None  # as in Event
    accepted: int = 0  # drafted tokens
    rejected: int = 0
    served: list[tuple[str, int]] = field(default_factory=list)
    reason: str = ""  # of the last change of width, or of an error

    def serve(self, label: str) -> None:
        """Count a token."""
        self.tokens += 1
        if self.served and self.served[-1][0] == label:
            self.served[-1] = (label, self.served[-1][1] + 1)
        else:
            self.served.append((label, 1))


class Writer:
    """Turn the events of a generation into pieces. After a piece with ``finish`` nothing follows."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        generation: Generation,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        special: bool = False,
    ) -> None:
        self.counts = Counts()
        self.finish: str | None = None
        self.matched: str | int | None = None  # the stop text or the token at which the answer ended
        self._ends = generation.ends
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._stream = TextStream(vocabulary, after=list(generation.ids[-CONTEXT_TAIL:]), special=special)
        self._held = ""  # may be the start of a stop text
        self._waiting: list[Scored] = []  # tokens whose text is held

    def push(self, event: Event, *, label: str = "") -> Piece:
        """Take an event. label: the width served, if the request fixed it."""
        if self.finish is not None:
            return Piece()
        if event.cached_tokens is not None:
            self.counts.cached_tokens, self.counts.prompt_bits = event.cached_tokens, event.prompt_bits
        if event.reason:
            self.counts.reason = event.reason
        self.counts.accepted += event.accepted
        self.counts.rejected += event.rejected
        text = ""
        if event.token is not None:
            text = self._token(event.token, label or event.bits)
        if event.finish is not None and self.finish is None:
            text += self._rest()
            self.finish = self.finish or event.finish
        tokens: tuple[Scored, ...] = ()
        if text or self.finish is not None or not self._held:
            tokens, self._waiting = tuple(self._waiting), []
        return Piece(text=text, tokens=tokens, prompt=event.prompt, finish=self.finish)

    def _token(self, scored: Scored, label: str) -> str:
        self.counts.serve(label)
        self._waiting.append(scored)
        if scored.token in self._ends:  # the event that ends the generation comes with it or after it
            self.matched = scored.token
            return ""
        return self._release(self._stream.push(scored.token))

    def _rest(self) -> str:
        """Return the text that was held back."""
        text = self._release(self._stream.finish())
        if self.finish is None:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        """Return the text that no stop text can begin in; set ``finish`` at a stop text."""
        text = self._held + text
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            place, self.matched = min(found, key=lambda pair: pair[0])
            self.finish, self._held = "stop", ""
            return text[: place + (len(self.matched) if self._include_stop else 0)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
