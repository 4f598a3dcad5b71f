"""Combine what the processes of a run have: decisions, errors, sums and rows.

Each function is called by every process at the same place. With one process it returns its argument.

Rows are split as ``fully_shard`` splits them (``torch.chunk``): ceil(N / processes) for every process but the last
ones.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from matquant.system import ranks
from matquant.system.errors import InputError

T = TypeVar("T")
_sent = [0.0]  # bytes


def on_first(function: Callable[[], T]) -> T:
    """Call ``function`` in the first process only, and return its result in all; its InputError is raised in all."""
    if ranks.count() == 1:
        return function()
    outcome: list[tuple[T | None, InputError | None]] = [(None, None)]
    if ranks.leads():
        try:
            outcome = [(function(), None)]
        except InputError as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def together(function: Callable[[], T]) -> T:
    """Call ``function`` in every process and return its own result; if one raises InputError, all raise the first."""
    if ranks.count() == 1:
        return function()
    result, failure = None, None
    try:
        result = function()
    except InputError as error:
        failure = error
    for found in exchange(failure):
        if found is not None:
            raise found
    return result  # type: ignore[return-value]


def exchange(value: T) -> list[T]:
    """Return the values of all processes, in their order. Values are pickled, so they should be small."""
    if ranks.count() == 1:
        return [value]
    values: list[T] = [value] * ranks.count()
    dist.all_gather_object(values, value)
    return values


def check_same(value: Any, what: str) -> None:
    """Raise InputError, in all processes, unless ``value`` is the same in all. what: what it describes."""
    values = exchange(value)
    odd = next((rank for rank, found in enumerate(values) if found != values[0]), None)
    if odd is not None:
        raise InputError(
            f"process {odd} of {ranks.count()} and process 0 differ in {what}; give all processes the same files"
        )


def wait() -> None:
    """Wait until every process is here."""
    if ranks.count() > 1:
        dist.barrier()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Add the tensors of all processes, in place, and return the sum. Its last bits depend on their number."""
    if ranks.count() > 1:
        dist.all_reduce(tensor)
        _count(tensor, 2 * (ranks.count() - 1) / ranks.count())
    return tensor


def total_values(values: Mapping[str, float]) -> dict[str, float]:
    """Add named numbers of all processes, in float64."""
    if ranks.count() == 1:
        return dict(values)
    return dict(zip(values, total(torch.tensor(list(values.values()), dtype=torch.float64)).tolist(), strict=True))


def clip_gradients(tensors: Sequence[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale the gradients of this process's rows to a total norm over all processes of at most ``limit``.

    Returns the norm before, as ``torch.nn.utils.clip_grad_norm_`` does.
    """
    norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in tensors if tensor.grad is not None])
    if ranks.count() > 1:
        norm = total(norm.square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(tensors, limit, norm)
    return norm


def all_true(flag: torch.Tensor) -> torch.Tensor:
    """Return whether ``flag``, a boolean scalar, is true in every process; a boolean scalar."""
    if ranks.count() == 1:
        return flag
    lowest = flag.to(torch.int32)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return lowest.bool()


def own_rows(rows: int, *, rank: int | None = None) -> slice:
    """Return which of N rows belong to this process, or to that of ``rank``."""
    size = -(-rows // ranks.count())
    first = min(rows, size * (ranks.rank() if rank is None else rank))
    return slice(first, min(rows, first + size))


def held_rows(counts: Sequence[int]) -> slice:
    """Return which rows belong to this process. counts: how many each process holds, in their order."""
    first = sum(counts[: ranks.rank()])
    return slice(first, first + counts[ranks.rank()])


def own_part(count: int) -> slice:
    """Return which of ``count`` sequences or parts belong to this process."""
    return own_parts(count)[ranks.rank()]


def own_parts(count: int) -> list[slice]:
    """Return which of ``count`` sequences or parts belong to each process: as equal as possible, in order."""
    bounds = [count * place // ranks.count() for place in range(ranks.count() + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def gather_rows(own: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return the rows of all processes in their order, in every process. counts: how many rows each one has."""
    if ranks.count() == 1:
        return own
    most, values = max(counts), own.shape[1:].numel()
    each = values * own.element_size()
    padded = torch.zeros((most, each), dtype=torch.uint8, device=own.device)  # bytes: gloo lacks some dtypes
    padded[: len(own)] = own.contiguous().reshape(len(own), values).view(torch.uint8)
    found = torch.empty((ranks.count() * most, each), dtype=torch.uint8, device=own.device)
    dist.all_gather_single(found, padded)
    _count(padded, ranks.count() - 1)
    if sum(counts) < len(found):
        found = torch.cat([part[:count] for part, count in zip(torch.split(found, most), counts, strict=True)])
    return found.view(own.dtype).reshape(sum(counts), *own.shape[1:])


def from_rank(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """Overwrite ``tensor`` in every process with that of process ``rank``, and return it."""
    if ranks.count() > 1:
        dist.broadcast(tensor, src=rank)
        if rank == ranks.rank():
            _count(tensor, ranks.count() - 1)
    return tensor


def row_counts(rows: int) -> tuple[int, ...]:
    """Return how many of N rows each process has."""
    parts = (own_rows(rows, rank=rank) for rank in range(ranks.count()))
    return tuple(part.stop - part.start for part in parts)


def check_rows(rows: int, what: str) -> None:
    """Raise InputError if a process would get none of the rows. what: their owner, such as a module path."""
    if own_rows(rows, rank=ranks.count() - 1).start >= rows:
        raise InputError(
            f"{ranks.count()} processes leave one of them without any of the {rows} rows of {what}; "
            f"start at most {_most(rows)} processes"
        )


def _most(rows: int) -> int:
    """Return the largest number of processes, up to this run's, of which each gets some of the rows."""
    return next(n for n in range(ranks.count(), 0, -1) if -(-rows // n) * (n - 1) < rows)


def sent_bytes() -> float:
    """Return how many bytes of tensors this process has sent so far, by the usual ring algorithms."""
    return _sent[0]


def _count(tensor: torch.Tensor, times: float) -> None:
    _sent[0] += times * tensor.nbytes
