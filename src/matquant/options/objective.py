"""The loss over widths: which widths are trained, against which targets (MatQuant Eq. 7).

The paper's notation, parsed: "8,4,2" is the ground-truth loss at three widths; "8,4,8->2" gives int2 only the
distillation target, the logits of the 8-bit slice; "8,4,2,8->4;2" adds that target to widths 4 and 2. "fp->2" distils
from the float model (our addition). Targets have stop-gradient; distillation is KL(teacher || student) on the logits; a
width with both losses takes their mean, the paper's "weighted equally". A single width is single-precision MatQuant
(S.P.).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matquant.core.nest import MASTER_BITS
from matquant.system.errors import InputError

FLOAT = 0  # the teacher "fp"
_TERM = re.compile(r"(?:(?P<teacher>fp|\d+)->)?(?P<widths>\d+(?:;\d+)*)")


@dataclass(frozen=True, kw_only=True)
class Width:
    """The loss of one width. teachers: the widths (or FLOAT) it is distilled from. weight: its lambda."""

    bits: int
    truth: bool
    teachers: tuple[int, ...]
    weight: float


def parse_objective(text: str, weights: Sequence[float] | None = None) -> tuple[Width, ...]:
    """Parse an objective into its widths, widest first, with their lambdas (given in the order widths are first named).

    ``weights`` None means 0.1, ..., 0.1, 1 (the paper's choice), the 1 on the narrowest width, or 1 for all where the
    float model teaches (measured: experiments/results.md). Raises InputError that points at the place that does not
    parse.
    """
    truth: list[int] = []
    teachers: dict[int, list[int]] = {}
    order: list[int] = []
    begin = 0
    for part in text.split(","):
        position = begin + len(part) - len(part.lstrip())
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise _error(text, position, f"cannot read {part.strip()!r}")
        widths = [int(width) for width in match["widths"].split(";")]
        for width in widths:
            if not 1 <= width <= MASTER_BITS:
                raise _error(text, position, f"width {width} is outside 1..8")
            if width not in order:
                order.append(width)
        if match["teacher"] is None:
            if len(widths) > 1 or widths[0] in truth:
                raise _error(text, position, f"{part.strip()!r} names no teacher, or names it twice")
            truth.append(widths[0])
        else:
            teacher = FLOAT if match["teacher"] == "fp" else int(match["teacher"])
            for width in widths:
                if teacher != FLOAT and teacher <= width:
                    raise _error(text, position, f"width {width} cannot learn from width {teacher}")
                if teacher in teachers.setdefault(width, []):
                    raise _error(text, position, f"width {width} learns from this teacher twice")
                teachers[width].append(teacher)
        begin += len(part) + 1
    _check(text, order, truth, teachers)
    even = any(FLOAT in sources for sources in teachers.values())
    lambdas = _lambdas(order, weights, even=even)
    return tuple(
        Width(bits=bits, truth=bits in truth, teachers=tuple(teachers.get(bits, ())), weight=lambdas[bits])
        for bits in sorted(order, reverse=True)
    )


def _check(text: str, order: list[int], truth: list[int], teachers: dict[int, list[int]]) -> None:
    if len(order) > 1 and MASTER_BITS not in order:
        raise InputError(
            f"objective {text!r} trains widths {', '.join(map(str, order))} but not 8, which the checkpoint stores; "
            "add 8, or name a single width for single precision (S.P.)"
        )
    for sources in teachers.values():
        for teacher in sources:
            if teacher not in (FLOAT, *truth) and teacher not in teachers:
                raise InputError(
                    f"objective {text!r} distils from width {teacher}, which it does not train; add {teacher}"
                )


def _lambdas(order: list[int], weights: Sequence[float] | None, *, even: bool) -> dict[int, float]:
    if weights is None:
        return {bits: 1.0 if even or bits == min(order) else 0.1 for bits in order}
    if len(weights) != len(order):
        raise InputError(
            f"{len(weights)} weights for the {len(order)} widths {', '.join(map(str, order))}; "
            "give one per width, in that order"
        )
    if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
        raise InputError(f"weights {', '.join(map(str, weights))} are not valid; use numbers of at least 0, not all 0")
    return dict(zip(order, weights, strict=True))


def _error(text: str, position: int, problem: str) -> InputError:
    return InputError(
        f"objective does not parse: {problem}\n    {text}\n    {' ' * position}^\n"
        'give widths and distillation terms such as "8,4,2" or "8,4,2,8->4;2" or "8,4,2,fp->2"'
    )
