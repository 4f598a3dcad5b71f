"""Limits: how much work is admitted, and how much memory keys and values may take.

A running sequence reserves the memory of its prompt and of all the tokens that it may still get, so an admitted request
never has to be stopped for lack of memory. What running sequences leave is used for prefixes of earlier requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matquant import _native
from matquant.core.nest import check_bits
from matquant.engine.engine import Engine
from matquant.engine.speculation import OFF, check_speculate
from matquant.system.errors import InputError, check_positive

WIDTHS = (8, 6, 4, 3, 2)
ROWS, MOST_ROWS = 128, 2**14  # of a step: by default, and at most
SHARE_OF_MEMORY = 4  # the default of kv_bytes is a quarter of the memory that is available
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server and targets of its policy."""

    max_num_seqs: int = 16  # sequences in a step
    max_queued_requests: int = 64  # sequences that wait
    max_queued_tokens: int = 2**17  # prompt tokens that wait
    max_batched_tokens: int | None = None  # rows of a step; None: 128, or max_num_seqs if that is more
    chunk: int = 64  # prompt tokens of a step in which other sequences decode; alone: all rows
    kv_bytes: int | None = None  # keys and values; None: a quarter of the memory available, see ``resolve``
    widths: tuple[int, ...] = WIDTHS  # that the policy may choose
    min_bits: int = 4  # the policy does not go below this width: int3 and int2 need a checkpoint trained for them
    latency_s: float = 0.1  # target of the time between two tokens of a sequence
    wait_s: float = 2.0  # target of the time that a request waits
    prefill_bits: int | None = None  # prompts of narrower requests are read at this width; None: at that of the request
    policy: bool = True  # False: the widest width always
    speculate: str | int = OFF  # tokens that a sequence drafts in a step with few rows: a number, "auto" or "off"

    def __post_init__(self) -> None:
        check_positive(
            max_num_seqs=self.max_num_seqs,
            max_queued_tokens=self.max_queued_tokens,
            max_batched_tokens=self.rows,
            chunk=self.chunk,
            latency_s=self.latency_s,
            wait_s=self.wait_s,
            kv_bytes=1 if self.kv_bytes is None else self.kv_bytes,
        )
        if self.max_queued_requests < 0:
            raise InputError(f"max_queued_requests={self.max_queued_requests}; give a number of at least 0")
        if self.rows < self.max_num_seqs:
            raise InputError(
                f"max_batched_tokens={self.max_batched_tokens} is below max_num_seqs={self.max_num_seqs}, and each "
                "sequence takes a row of a step; use a larger max_batched_tokens"
            )
        if self.rows > MOST_ROWS:
            raise InputError(f"{self.rows} rows are more than the {MOST_ROWS} that a step takes; use fewer")
        check_speculate(self.speculate)
        for bits in (self.min_bits, *self.widths, *([] if self.prefill_bits is None else [self.prefill_bits])):
            check_bits(bits)

    @property
    def rows(self) -> int:
        """Return the most rows of a step."""
        return max(ROWS, self.max_num_seqs) if self.max_batched_tokens is None else self.max_batched_tokens


def candidates(engine: Engine, limits: Limits) -> tuple[int, ...]:
    """Return the widths that the policy may choose, widest first: those of the limits that the engine holds."""
    lowest = min(limits.min_bits, engine.max_bits)
    widths = {bits for bits in limits.widths if lowest <= bits <= engine.max_bits}
    return tuple(sorted(widths or {engine.max_bits}, reverse=True))


def cache_bytes(engine: Engine, capacity: int) -> int:
    """Return the bytes of keys and values of a sequence of ``capacity`` tokens, in whole pages."""
    return _native.Cache(engine.model.native, capacity, engine.exact).bytes  # address space only, given back at once


def available_bytes(meminfo: Path = MEMINFO) -> int | None:
    """Return the memory that is available, None if the system does not say."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def resolve_kv_bytes(engine: Engine, limits: Limits, *, available: int | None) -> int:
    """Return the bytes for keys and values; InputError if they exceed the memory or hold no sequence.

    The default is a quarter of the memory available, but no more than max_num_seqs full contexts need.
    """
    least, most = cache_bytes(engine, 1), cache_bytes(engine, engine.context)
    if limits.kv_bytes is None:
        wanted = most * limits.max_num_seqs
        return wanted if available is None else max(least, min(wanted, available // SHARE_OF_MEMORY))
    if limits.kv_bytes < least:
        raise InputError(f"kv_bytes={limits.kv_bytes} does not hold one sequence; use at least {least}")
    if available is not None and limits.kv_bytes > available:
        raise InputError(f"kv_bytes={limits.kv_bytes} exceeds the {available} bytes of memory available; use less")
    return limits.kv_bytes


def check_prompt(ids: Sequence[int], *, context: int, vocab: int) -> None:
    """Raise InputError unless a prompt has 1 to ``context`` ids of the vocabulary."""
    if not 1 <= len(ids) <= context:
        raise InputError(f"the prompt has {len(ids)} tokens; give 1 to {context}, the context of the model")
    wrong = next((token for token in ids if not 0 <= token < vocab), None)
    if wrong is not None:
        raise InputError(f"the prompt has the token {wrong}; the model has tokens 0 to {vocab - 1}")
