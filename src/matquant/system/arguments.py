"""Type checks of the arguments that Python callers pass, done before anything else.

An argument's name means the same everywhere, so one table holds the type of each. A wrong type raises a TypeError that
names the argument; the range of a value is checked by the function that knows it.
"""

import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from matquant.system.errors import InputError, InputTypeError

Kind = tuple[Callable[[Any], bool], str]  # a test, and its description


def _is(kind: Any) -> Callable[[Any], bool]:
    """Return a test for values of type ``kind``; True and False do not count as numbers."""
    return lambda value: isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _all(kind: Any) -> Callable[[Any], bool]:
    """Return a test for sequences of ``kind``; text and bytes do not count as sequences."""
    single = _is(kind)

    def holds(value: Any) -> bool:
        if isinstance(value, (str, bytes)) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
            return False
        items = value.tolist() if hasattr(value, "tolist") else value
        return isinstance(items, Sequence) and all(map(single, items))

    return holds


INTEGER: Kind = (_is(Integral), "an integer")
NUMBER: Kind = (_is(Real), "a number")
TEXT: Kind = (_is(str), "a text")
BOOLEAN: Kind = (_is(bool), "True or False")
PATH: Kind = (_is((str, os.PathLike)), "a path")
PATHS: Kind = (_all((str, os.PathLike)), "a list of paths, also for one of them")
TEXTS: Kind = (_all(str), "a list of texts, also for one of them")
INTEGERS: Kind = (_all(Integral), "a list of integers")
NUMBERS: Kind = (_all(Real), "a list of numbers")
ARRAY: Kind = (lambda value: hasattr(value, "dtype") and hasattr(value, "shape"), "an array")
PROMPT: Kind = (lambda value: isinstance(value, str) or _all(Integral)(value), "a text or a list of token ids")
WORD: Kind = (_is((str, Integral)), "a text or an integer")
MAPPING: Kind = (_is(Mapping), "a mapping, such as {path: bits}")

KINDS: dict[str, Kind] = {
    **dict.fromkeys(("path", "directory", "model", "out", "start"), PATH),
    **dict.fromkeys(
        (
            "max_tokens",
            "top_k",
            "seed",
            "capacity",
            "length",
            "context",
            "stride",
            "group_size",
            "baseline_bits",
            "head_bits",
        ),
        INTEGER,
    ),
    **dict.fromkeys(("temperature", "top_p", "min_p"), NUMBER),
    **dict.fromkeys(("check_hashes", "mmap", "overwrite", "resume", "symmetric", "portable", "all_logits"), BOOLEAN),
    **dict.fromkeys(
        (
            "activations",
            "recipe",
            "method",
            "objective",
            "rule",
            "scope",
            "affine",
            "zeros",
            "zero_point",
            "grid",
            "scale_dtype",
        ),
        TEXT,
    ),
    **dict.fromkeys(("stop", "exclude"), TEXTS),
    "text": PATHS,
    "weights": NUMBERS,
    "ids": INTEGERS,
    "bits": INTEGERS,  # where several are asked for; of one, nest.check_bits
    **dict.fromkeys(("speculate", "resident"), WORD),
    "prompt": PROMPT,
    "document": PROMPT,
    "plan": MAPPING,
    "codes": ARRAY,
    "stream": ARRAY,
    "widths": ARRAY,
}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ANNOTATIONS: dict[str, Kind] = {"int": INTEGER, "float": NUMBER, "bool": BOOLEAN, "str": TEXT}


def check_types(**given: Any) -> None:
    """InputTypeError naming the first argument that is not what KINDS says."""
    for name, value in given.items():
        _check(name, value, KINDS[name])


def check_given(**given: Any) -> None:
    """``check_types`` of those that are not None."""
    check_types(**{name: value for name, value in given.items() if value is not None})


def check_fields(annotations: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """InputTypeError naming the first of ``values`` that is not of its annotated type, such as "int | None"."""
    for name, value in values.items():
        annotated = annotations.get(name)
        first, _, rest = getattr(annotated, "__name__", str(annotated)).partition(" | ")
        if first in ANNOTATIONS and not (value is None and rest == "None"):
            _check(name, value, ANNOTATIONS[first])


def _check(name: str, value: Any, kind: Kind) -> None:
    holds, words = kind
    if not holds(value):
        shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
        raise InputTypeError(f"{name}={shown} is of type {type(value).__name__}; give {words}")


def read_numbers(text: str, kind: type, flag: str) -> list[Any]:
    """Parse numbers separated by commas; InputError naming ``flag``."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{flag} {text!r} is not a list of numbers; separate them with commas, such as 8,4,2"
        ) from None


def check_names(names: Sequence[str], known: Collection[str], *, flag: str, kind: str) -> None:
    """Raise InputError for no names, and for the first that is not known, with the nearest one."""
    if not names:
        raise InputError(f"{flag} names no {kind}; give one or more of {','.join(known)}")
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise InputError(f"{flag} {name!r} is not one of {', '.join(known)}; nearest: {nearest!r}")


def read_size(text: str, flag: str) -> int:
    """Parse "1.1GB", "900 MiB" or "123456B" into bytes; InputError naming ``flag``."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(\w+)", text.strip())
    if found is None or found[2] not in UNITS:
        raise InputError(f"{flag} {text!r} is not a size; give a number and one of {', '.join(UNITS)}, such as 1.1GB")
    return int(float(found[1]) * UNITS[found[2]])
