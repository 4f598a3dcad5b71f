"""Deal the calibration sequences to processes, and rows of weights too.

A piece is what one forward pass runs: this process's sequences of a batch, or, without training steps, one sequence.
With ``ordered`` (--deterministic) it is always one, and sums over pieces have a fixed order (distributed/sums.py), so
that results do not depend on the number of processes: the shapes of all products, and the order of all sums, are then
the same for any number.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from matquant.core.tensor import NestedTensor
from matquant.distributed.collect import exchange, own_parts, total
from matquant.distributed.nested import gather_nested, join_rows
from matquant.distributed.sums import Sums
from matquant.system import ranks
from matquant.system.errors import InputError

ROW_PARTS = 32  # parts of a weight that are solved apart with --deterministic: as many processes can share them
LEAST_ROWS = 4  # of such a part
SOLVING_BYTES = 140  # memory per weight that GPTQ solves at once, at five widths: measured (docs/scale.md)


@dataclass(frozen=True, kw_only=True)
class Share:
    """The calibration sequences of this process.

    A batch is the data of a training step; methods that only sum over all data ignore batches.
    """

    pieces: tuple[tuple[int, ...], ...]  # sequences of each forward pass
    batches: tuple[tuple[tuple[int, float], ...], ...]  # of each batch: this process's pieces, and their share of it
    ranges: tuple[range, ...] | None = None  # of each process: its pieces, numbered over all; None: in any order
    batch_ranges: tuple[tuple[range, ...], ...] = ()  # the same within each batch

    @property
    def ordered(self) -> bool:
        return self.ranges is not None


def deal(samples: int, batch_size: int, *, steps: bool, ordered: bool) -> Share:
    """Deal ``samples`` sequences to this run's processes.

    steps: there are training steps, whose batches all processes share; otherwise each process has consecutive
    sequences. InputError if a process would have none.
    """
    size = min(batch_size, samples) if steps else samples
    if size < ranks.count():
        flag = "--batch-size" if steps and batch_size <= samples else "--samples"
        raise InputError(
            f"{flag} {size} leaves some of {ranks.count()} processes without a sequence; use at least {ranks.count()}"
        )
    if not steps:
        return _deal_all(samples, ordered=ordered)
    batches = [range(start, min(start + batch_size, samples)) for start in range(0, samples, batch_size)]
    # positions in a batch, so that a short last batch is dealt as the others are
    positions = [range(*part.indices(batch_size)) for part in own_parts(batch_size)]
    own = [[batch[place] for place in positions[ranks.rank()] if place < len(batch)] for batch in batches]
    if not ordered:
        pieces = [tuple(sequences) for sequences in own if sequences]
        numbers = iter(range(len(pieces)))
        shares = [
            ((next(numbers), len(sequences) / len(batch)),) if sequences else ()
            for sequences, batch in zip(own, batches, strict=True)
        ]
        return Share(pieces=tuple(pieces), batches=tuple(shares))
    return _deal_ordered(batches, positions)


def _deal_all(samples: int, *, ordered: bool) -> Share:
    """Deal single sequences: the shapes of all products are then the same for any number of processes."""
    parts = [range(samples)[part] for part in own_parts(samples)]
    pieces = tuple((sequence,) for sequence in parts[ranks.rank()])
    return Share(pieces=pieces, batches=(), ranges=tuple(parts) if ordered else None)


def _deal_ordered(batches: Sequence[range], positions: Sequence[range]) -> Share:
    """Deal single sequences in the order of their position in the batch: so each process has consecutive pieces."""
    held = [
        [(place, number) for place in places for number, batch in enumerate(batches) if place < len(batch)]
        for places in positions
    ]
    stops = [sum(map(len, held[: rank + 1])) for rank in range(len(held))]
    ranges = tuple(range(stop - len(part), stop) for stop, part in zip(stops, held, strict=True))
    own = held[ranks.rank()]
    return Share(
        pieces=tuple((batches[number][place],) for place, number in own),
        batches=tuple(
            tuple((piece, 1 / len(batch)) for piece, (_, of) in enumerate(own) if of == number)
            for number, batch in enumerate(batches)
        ),
        ranges=ranges,
        batch_ranges=tuple(
            tuple(range(min(part.start, len(batch)), min(part.stop, len(batch))) for part in positions)
            for batch in batches
        ),
    )


def sum_gradients(
    share: Share, batch: int, tensors: Sequence[torch.Tensor], backward: Callable[[int, float], None]
) -> None:
    """Call ``backward`` (piece, share of the batch) for this process's pieces of a batch, which adds to .grad of
    ``tensors``; afterwards .grad holds the sum over all processes."""
    if not share.ordered:
        for piece, part in share.batches[batch]:
            backward(piece, part)
        if ranks.count() > 1:
            for tensor in tensors:
                tensor.grad = total(_take_gradient(tensor))
        return
    sums = Sums(share.batch_ranges[batch])
    for piece, part in share.batches[batch]:
        backward(piece, part)
        sums.add([_take_gradient(tensor) for tensor in tensors])
    for tensor, gradient in zip(tensors, sums.total([tensor.detach() for tensor in tensors]), strict=True):
        tensor.grad = gradient


def mean_over_batches(share: Share, batches: Sequence[int], values: Sequence[float]) -> float:
    """Return the mean over ``batches``, of all processes, of a number that is a mean over a batch's sequences.

    values: the number of each of this process's pieces.
    """
    own = [[part * values[piece] for piece, part in share.batches[batch]] for batch in batches]
    sums: list[float] = [sum(itertools.chain(*parts)) for parts in zip(*exchange(own), strict=True)]
    return sum(sums) / len(batches)


def solve_rows(
    count: int, read: Callable[[slice], torch.Tensor], encode: Callable[[torch.Tensor], NestedTensor], *, rows: int
) -> NestedTensor:
    """Encode the ``count`` rows of a weight, which do not interact, ``rows`` at a time, and return them as one tensor.

    Each process reads and encodes some of these parts; see ``check_parts``. read: returns some rows [n, K].
    """
    held = [slice(rows * parts.start, min(rows * parts.stop, count)) for parts in own_parts(-(-count // rows))]
    solved = [encode(part.float()) for part in torch.split(read(held[ranks.rank()]), rows)]
    return gather_nested(join_rows(solved), [part.stop - part.start for part in held])


def check_parts(rows: Mapping[str, int], *, ordered: bool) -> None:
    """Raise InputError if a process would solve no part of a weight. rows: path -> rows of the weight."""
    for path, count in rows.items():
        parts = -(-count // part_rows(count, ordered=ordered, most=count))
        if parts < ranks.count():
            raise InputError(
                f"{ranks.count()} processes leave one of them without any of the {count} rows of {path}; "
                f"start at most {parts} processes"
            )


def part_rows(rows: int, *, ordered: bool, most: int) -> int:
    """Return how many of a weight's N rows to solve at once: equal parts of at most ``most``."""
    each = max(LEAST_ROWS, -(-rows // ROW_PARTS)) if ordered else -(-rows // ranks.count())
    each = min(each, rows)
    return -(-each // -(-each // most))


def most_weights(device: torch.device, *, head: bool = False) -> int:
    """Return how many weights to solve at once, which bounds memory to 0.6 GB on CPUs, and to 5 GB on GPUs, where each
    part costs a launch per column and operation; a quarter of that for the head, which is held whole."""
    return (2**25 if device.type == "cuda" else 2**22) // (4 if head else 1)


def pieces_of(tokens: torch.Tensor, share: Share) -> Iterator[torch.Tensor]:
    """Yield the token ids [B, T] of this process's pieces. tokens: of all sequences."""
    yield from (tokens[list(piece)] for piece in share.pieces)


def _take_gradient(tensor: torch.Tensor) -> torch.Tensor:
    gradient, tensor.grad = tensor.grad, None
    return torch.zeros_like(tensor, requires_grad=False) if gradient is None else gradient
