"""Decoders: each is one way to choose the ids of new tokens.

A decoder yields ids and knows nothing else. Text, stop strings, end-of-sequence tokens, limits and clocks are filters
around it (``completion.Completion``), which stop iterating when they have enough. A step runs only when the next id is
requested, so no step is wasted.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from matquant.engine.sampling import Sampling, choose


class Steps(Protocol):
    """The part of a session that a decoder uses."""

    capacity: int  # maximum number of tokens

    def begin(self, ids: Sequence[int], widths: np.ndarray) -> tuple[int, np.ndarray]:
        """Read a prompt; return the turn and the logits of the next token."""

    def advance(self, token: int, widths: np.ndarray, *, turn: int) -> np.ndarray:
        """Append a token; return the logits of the next one."""


class Decoder(Protocol):
    """The interface of a decoder: ``start`` reads the prompt, iterating yields new ids until the session is full."""

    steps: int  # steps at the requested width after the prompt
    drafted: int  # tokens drafted, and of these accepted
    accepted: int

    def start(self) -> None: ...

    def __iter__(self) -> Iterator[int]: ...


class StepByStep:
    """One step per token: greedy, or sampled as ``sampling`` says.

    widths: the width of every matrix as ``Engine.widths`` returns them, uint8.
    """

    def __init__(self, session: Steps, prompt: Sequence[int], *, widths: np.ndarray, sampling: Sampling) -> None:
        self.steps = self.drafted = self.accepted = 0
        self._session = session
        self._prompt = list(prompt)
        self._widths = widths
        self._sampling = sampling
        self._started: tuple[int, np.ndarray] | None = None

    def start(self) -> None:
        """Read the prompt."""
        self._started = self._session.begin(self._prompt, self._widths)

    def __iter__(self) -> Iterator[int]:
        """Yield ids until the session is full. Call ``start`` first."""
        assert self._started is not None, "start first"
        turn, logits = self._started
        generator = np.random.default_rng(self._sampling.seed)
        for _ in range(len(self._prompt), self._session.capacity):
            token = choose(logits, self._sampling, generator)
            yield token
            logits = self._session.advance(token, self._widths, turn=turn)
            self.steps += 1
        # the last token: nothing follows it, so it takes no room in the session
        yield choose(logits, self._sampling, generator)
