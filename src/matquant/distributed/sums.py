"""Sum lists of tensors over pieces of the data, of all processes.

Floating-point sums depend on their order, and so on how many processes there are. Sums in any order are made in
float64: rounded to float32, about one number in 10^8 depends on the order. If none may, the order is fixed: a binary
tree over all pieces, in which neighbours are added first, and which depends only on the number of pieces. Each process
has consecutive pieces, adds the branches of the tree that it holds whole, and sends them to the others, which add them
further up. A process holds up to log2(pieces) + 1 partial sums, in float32.
"""

from collections.abc import Sequence

import torch

from matquant.distributed.collect import from_rank, total
from matquant.system import ranks

Node = tuple[int, int, list[torch.Tensor]]  # first piece, number of pieces (a power of two), their sums


class Sums:
    """The sum of a list of tensors over the pieces of all processes.

    ranges: the consecutive pieces of each process, in their order, for the fixed order; None: any order, in float64.
    """

    def __init__(self, ranges: Sequence[range] | None) -> None:
        self._ranges = ranges
        self._nodes: list[Node] = []
        self._next = 0 if ranges is None else ranges[ranks.rank()].start

    def add(self, tensors: list[torch.Tensor]) -> None:
        """Add one more piece of this process. The tensors are kept and may be overwritten."""
        if self._ranges is None and self._nodes:
            _added(self._nodes[0][2], tensors)
            return
        if self._ranges is None:
            tensors = [tensor.double() for tensor in tensors]
        _push(self._nodes, (self._next, 1, tensors))
        self._next += 1

    def total(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sum over all processes, in every process; 0 without any piece.

        like: tensors of the sums' shapes and dtypes.
        """
        if self._ranges is None:
            own = self._nodes[0][2] if self._nodes else [torch.zeros_like(t, dtype=torch.float64) for t in like]
            return [total(tensor).to(of.dtype) for tensor, of in zip(own, like, strict=True)]
        held = {first: tensors for first, _, tensors in self._nodes}
        nodes: list[Node] = []
        for rank, pieces in enumerate(self._ranges):
            for first, count in branches(pieces):
                own = held.pop(first) if rank == ranks.rank() else [torch.empty_like(tensor) for tensor in like]
                _push(nodes, (first, count, [from_rank(tensor, rank) for tensor in own]))
        if not nodes:
            return [torch.zeros_like(tensor) for tensor in like]
        return fold(nodes)


def branches(pieces: range) -> list[tuple[int, int]]:
    """Return (first piece, number of pieces) of the largest branches of the tree within consecutive pieces."""
    found, first = [], pieces.start
    while first < pieces.stop:
        count = first & -first or 1 << (pieces.stop - first).bit_length()
        while first + count > pieces.stop:
            count //= 2
        found.append((first, count))
        first += count
    return found


def fold(nodes: list[Node]) -> list[torch.Tensor]:
    """Return the sum of the branches that are left, of which no two are halves of one, from the last on."""
    while len(nodes) > 1:
        (first, count, left), (_, more, right) = nodes[-2:]
        nodes[-2:] = [(first, count + more, _added(left, right))]
    return nodes[0][2]


def _push(nodes: list[Node], node: Node) -> None:
    """Append a node, and join it with its left neighbours as far as they are two halves of a branch."""
    nodes.append(node)
    while len(nodes) > 1:
        (first, count, left), (_, more, right) = nodes[-2:]
        if count != more or first % (2 * count):
            return
        nodes[-2:] = [(first, 2 * count, _added(left, right))]


def _added(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    for mine, more in zip(left, right, strict=True):
        mine += more
    return left
