"""What the HTTP side and the engine side of the server exchange: generations in, events out.

The HTTP side runs in one asyncio thread: it checks requests, encodes prompts, decodes tokens, applies stop texts and
writes answers. The engine side is one thread that makes every native call (batching.py). A generation is one sequence:
a request with ``n`` answers is ``n`` generations. Nothing here knows text, HTTP or JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from matquant.core.spec import Plan
from matquant.engine.sampling import Sampling
from matquant.serve.cost import Costs


class Constraint(Protocol):
    """Which tokens may come next: a grammar, a schema, tools. Used by the engine thread only.

    ``copy``, ``allowed`` and ``forced`` are for drafts, and change nothing.
    """

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits [vocab], float32, of tokens that may not come next to -inf, in place."""

    def accept(self, token: int) -> None:
        """Take a chosen token."""

    @property
    def ended(self) -> bool:
        """Return whether nothing more may come."""

    def copy(self) -> "Constraint":
        """Return the same constraint at the same place."""

    def allowed(self, tokens: Sequence[int]) -> int:
        """Return how many of the tokens may come next, one after another."""

    def forced(self) -> Sequence[int]:
        """Return the tokens that write the only text that may come next, as far as there is only one."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One sequence to generate."""

    ids: Sequence[int]  # the prompt, at least one id, checked against the vocabulary and the context
    plan: Plan | None = None  # the widths; None: the policy chooses, and may change them between steps
    least_bits: int = 1  # the policy does not go below this width
    priority: int = 0  # higher is scheduled first; 0 is usual
    max_tokens: int  # new tokens, at least 1; 0 only with ``prompt_logprobs``
    min_tokens: int = 0  # ends are not chosen before so many new tokens
    sampling: Sampling
    repetition_penalty: float = 1.0  # of tokens in prompt and answer; as transformers defines it
    presence_penalty: float = 0.0  # subtracted once from tokens in the answer
    frequency_penalty: float = 0.0  # subtracted for each time that a token is in the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to logits, by token
    ends: frozenset[int] = frozenset()  # tokens that end the sequence
    constraint: Constraint | None = None
    logprobs: int | None = None  # None: none; N: of the chosen token and of the N most probable
    prompt_logprobs: bool = False  # the same for the tokens of the prompt, sent as one event before all others


class Scored(NamedTuple):
    """A token with its log-probability (nats, after temperature 1, penalties and bias) and the most probable ones."""

    token: int
    logprob: float | None = None  # None: not asked for, or the first token of a prompt
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), most probable first; includes the chosen one's rank


class Event(NamedTuple):
    """Something that happened to a generation."""

    token: Scored | None = None  # a new token
    bits: str = ""  # the width that chose it: "8", or the label of a plan
    prompt: tuple[Scored, ...] = ()  # with ``prompt_logprobs``
    cached_tokens: int | None = None  # with the first event: prompt tokens that were in the cache already
    prompt_bits: int | None = None  # with the first event: width that read the prompt, if not that of ``token``
    queue_s: float | None = None  # with the first event: seconds until it was given a place
    prompt_s: float | None = None  # with the first event: seconds from then on
    finish: str | None = None  # the last event: "stop" (an end), "length", "abort", or "error"
    reason: str = ""  # with "error": what happened; with a change of width: why
    accepted: int = 0  # 1 if the token had been drafted
    rejected: int = 0  # drafts that the token replaced or ended


Deliver = Callable[[Sequence[Event]], None]  # called by the engine thread; it must not block


class Refused(Exception):  # noqa: N818 (not an error of the program)
    """A generation was not admitted: too many requests, or the server is stopping.

    limit: the one that was reached, as /metrics names it: "max_num_queued_reqs", "max_num_queued_tokens" or "stopping".
    """

    def __init__(self, reason: str, *, retry_after_s: float, limit: str = "stopping") -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.limit = limit


class Handle(Protocol):
    """A generation that was admitted."""

    def cancel(self) -> None:
        """Stop it; its rows are gone within two steps, and one event with finish "abort" follows."""


class Batcher(Protocol):
    """The engine side. All methods may be called from any thread."""

    @property
    def capacity(self) -> int:
        """Return the most generations that are admitted at once, running or waiting."""

    def submit(self, generation: Generation, deliver: Deliver) -> Handle:
        """Admit a generation; its events go to ``deliver``. Refused if a limit is reached."""

    def stats(self) -> Mapping[str, float]:
        """Return counters and gauges for /metrics: running, waiting, kv_bytes, prompt_tokens, ..."""

    @property
    def costs(self) -> Costs:
        """Return the costs of the widths that it may choose."""

    def between(self, work: Callable[[], None]) -> None:
        """Let the engine thread call ``work`` between two steps; it must not raise."""

    def widen(self, costs: Costs) -> None:
        """Choose from all widths that the engine holds by now, by these costs. In the engine thread only."""

    def stop(self, drain_s: float) -> None:
        """Admit nothing more, wait up to ``drain_s`` seconds for what runs, end the rest with "abort", and return."""
