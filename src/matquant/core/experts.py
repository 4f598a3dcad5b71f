"""Experts that a model's own files hold in one tensor: which part of it is the weight of which expert.

gpt-oss, Llama 4 and Granite MoE store a projection of all E experts as one tensor, [E, out, in] or [E, in, out], and
gate and up in one: all of gate first, or their features in turn. A checkpoint of ours quantises every expert's
projection as a matrix [N, K] at the path ``BLOCK.experts.NUMBER.PROJECTION``, and records in an ``Experts`` how the
model's tensors are put together again.
Shapes: E experts, N out features, K in features.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from matquant.system.errors import InputError

EXPERTS = "experts"  # transformers' name of the modules of fused experts
GATE_UP = "gate_up_proj"
TENSORS: Mapping[str, tuple[str, ...]] = {  # parameter of transformers' experts -> the projections that it holds
    GATE_UP: ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
ROUTERS = ("gate", "router")  # names of the modules that choose experts: linear layers in them stay float
SHARED = "shared_expert_gate"  # the linear layer that weighs a shared expert, with one out feature; stays float too
_PATH = re.compile(rf"(.+)\.{EXPERTS}\.(\d+)\.(\w+)")


def is_router(path: str) -> bool:
    """Return whether a linear layer chooses or weighs experts: such layers are never quantised."""
    parts = path.split(".")
    return parts[-1] == SHARED or any(part in ROUTERS for part in parts)


def expert_name(path: str) -> str | None:
    """Return the name of the expert that a path belongs to, ``BLOCK.experts.NUMBER``; None if it is no expert's."""
    found = _PATH.fullmatch(path)
    return None if found is None else path.removesuffix(f".{found[3]}")


def why_unknown(path: str, known: Iterable[str]) -> str | None:
    """Return why a path that the model does not quantise cannot be: it is a router, or an expert that is not there."""
    if is_router(path):
        return "a router, which stays float; leave it out"
    found = _PATH.fullmatch(path)
    if found is None:
        return None
    others = (_PATH.fullmatch(other) for other in known)
    numbers = {int(other[2]) for other in others if other is not None and (other[1], other[3]) == (found[1], found[3])}
    if not numbers or int(found[2]) in numbers:
        return None
    return f"which is not there: {found[1]} has the experts {min(numbers)} to {max(numbers)}"


class Place(NamedTuple):
    """Where a weight [N, K] lies in a contiguous tensor, in elements."""

    shape: tuple[int, int]  # N, K
    stride: tuple[int, int]  # from one out feature, and one in feature, to the next
    offset: int  # of the first element


@dataclass(frozen=True, kw_only=True)
class Experts:
    """How the model's own files hold the experts: the "experts" object of a Spec."""

    names: Mapping[str, str]  # key of TENSORS -> the tensor's name in the files, from the block that has the experts
    transposed: bool  # tensors are [E, in, out], not [E, out, in]
    interleaved: bool  # out features of gate and up take turns; otherwise gate comes first
    stock: bool  # stock compressed-tensors tools read the quantised experts

    @classmethod
    def from_json(cls, values: Any, *, where: str) -> Self:
        """Parse the record; InputError names what is wrong in ``where``."""
        flags = ("transposed", "interleaved", "stock")
        given = values if isinstance(values, dict) else {}
        names = given.get("names")
        named = isinstance(names, dict) and all(k in TENSORS and isinstance(name, str) for k, name in names.items())
        if not named or given.keys() != {"names", *flags} or not all(isinstance(given[flag], bool) for flag in flags):
            raise InputError(
                f'{where} has experts={values!r}, which must be an object with "names" and true or false for '
                f"{', '.join(flags)}; the checkpoint is damaged: write it again"
            )
        return cls(**values)

    def places(self, kind: str, shape: tuple[int, ...]) -> dict[str, Place]:
        """Return the place of each projection of every expert in a tensor of this shape [E, ..., ...].

        kind: a key of TENSORS. Keys are ``NUMBER.PROJECTION``.
        """
        count, rows, columns = shape
        outs, ins, row, column = (columns, rows, 1, columns) if self.transposed else (rows, columns, columns, 1)
        parts = TENSORS[kind]
        size, step, first = outs // len(parts), row, row * (outs // len(parts))
        if self.interleaved:
            step, first = row * len(parts), row
        return {
            f"{expert}.{part}": Place((size, ins), (step, column), expert * rows * columns + index * first)
            for expert in range(count)
            for index, part in enumerate(parts)
        }

    def tensor_of(self, path: str) -> tuple[str, str, str] | None:
        """Return (tensor in the model's files, its kind, NUMBER.PROJECTION) of a path; None if it is no expert's."""
        found = _PATH.fullmatch(path)
        kind = next((kind for kind in self.names if found is not None and found[3] in TENSORS[kind]), None)
        if found is None or kind is None:
            return None
        return f"{found[1]}.{self.names[kind]}", kind, f"{found[2]}.{found[3]}"

    def join(self, shapes: Mapping[str, tuple[int, int]]) -> "dict[str, Joined]":
        """Return the tensors of the model's files that hold these weights: tensor name -> Joined.

        shapes: path -> (N, K); paths that are no expert's are left out. InputError if a tensor lacks an expert.
        """
        members: dict[tuple[str, str], dict[str, str]] = {}
        for path in shapes:
            if (found := self.tensor_of(path)) is not None:
                members.setdefault(found[:2], {})[found[2]] = path
        joined = {}
        for (name, kind), paths in members.items():
            size, ins = shapes[next(iter(paths.values()))]
            outs, count = size * len(TENSORS[kind]), len(paths) // len(TENSORS[kind])
            shape = (count, ins, outs) if self.transposed else (count, outs, ins)
            places = self.places(kind, shape)
            if places.keys() != paths.keys() or any(places[k].shape != shapes[path] for k, path in paths.items()):
                other = min(places.keys() ^ paths.keys(), default=next(iter(paths)))
                raise InputError(
                    f"{name} is made of {len(paths)} weights that do not fit together, see expert {other}; "
                    "the checkpoint is damaged: write it again"
                )
            joined[name] = Joined(shape, {paths[key]: place for key, place in places.items()})
        return joined


class Joined(NamedTuple):
    """A tensor of the model's files: its shape, and where each weight lies in it."""

    shape: tuple[int, int, int]
    places: Mapping[str, Place]  # by path
