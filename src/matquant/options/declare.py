"""How an option is declared: once, as a field of a frozen dataclass.

The command line, the checks, the Python signature and the table in docs/options.md are made from these fields, so a new
option is one line. A field's type says what a Python caller may pass; ``option`` holds the rest.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from matquant.system.arguments import check_fields
from matquant.system.errors import InputError, check_positive

# Panels of ``matquant quantize --help``, in the order in which they are shown.
BASICS, OBJECTIVE, GRID = "Basics", "Objective", "Grid"
CALIBRATION, TRAINING = "Calibration", "Training"
GPTQ, OMNIQUANT, QAT = "Method gptq", "Method omniquant", "Method qat"
RUN = "Run"
PANELS = (BASICS, OBJECTIVE, GRID, CALIBRATION, TRAINING, GPTQ, OMNIQUANT, QAT, RUN)


@dataclass(frozen=True, kw_only=True)
class Declared:
    """An option's declaration, besides its name, type and default."""

    help: str  # one sentence for --help and the documentation
    panel: str  # where --help shows it
    metavar: str | None = None  # placeholder of its value in --help; None: by type
    flags: str | None = None  # such as "--bf16/--fp32", None: by name
    shown: str | None = None  # the default in words, None: the default itself
    parse: Callable[[str], Any] | None = None  # parses the command line's text; None: by type
    choices: tuple[str, ...] = ()  # the allowed values
    least: float | None = None  # smallest allowed number
    most: float = math.inf  # largest allowed number
    positive: bool = False  # must be above 0


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option as users see it."""

    name: str  # as Python callers write it
    type: Any  # such as ``int | None``
    default: Any
    declared: Declared

    @property
    def flags(self) -> str:
        """Return its flags on the command line."""
        return self.declared.flags or "--" + self.name.replace("_", "-")


def option(default: Any, help: str, *, panel: str, **more: Any) -> Any:
    """Return a dataclass field that declares an option; ``more`` are fields of Declared."""
    return dataclasses.field(default=default, metadata={"option": Declared(help=help, panel=panel, **more)})


def options_of(record: Any) -> dict[str, Option]:
    """Return the options that a dataclass declares, by name; none for None."""
    if record is None:
        return {}
    return {
        field.name: Option(name=field.name, type=field.type, default=field.default, declared=field.metadata["option"])
        for field in dataclasses.fields(record)
    }


def check_values(record: Any, values: Mapping[str, Any], *, owner: str) -> None:
    """Raise InputError for a name that ``record`` does not declare, or a value that its declaration rules out.

    owner: whose options these are, such as "method 'gptq'". InputTypeError for a value of a wrong type.
    """
    known = options_of(record)
    for name in values:
        if name not in known:
            raise InputError(f"{owner} has no option {name!r}; {_nearest(name, known)}")
    check_fields({name: found.type for name, found in known.items()}, values)
    for name, value in values.items():
        if value is not None:
            _check_value(name, value, known[name].declared)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    if not known:
        return "it takes none"
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {nearest[0]!r}? It has {', '.join(known)}" if nearest else f"it has {', '.join(known)}"


def _check_value(name: str, value: Any, declared: Declared) -> None:
    if declared.choices and value not in declared.choices:
        raise InputError(f"{name}={value!r} is not known; use one of {', '.join(declared.choices)}")
    if declared.positive:
        check_positive(**{name: value})
    if declared.least is not None and not (declared.least <= value <= declared.most and value < math.inf):
        wanted = f"of at least {declared.least:g}"
        if declared.most < math.inf:
            wanted = f"from {declared.least:g} to {declared.most:g}"
        raise InputError(f"{name}={value}; give a number {wanted}")


def by_panel(records: Mapping[str, Any]) -> Iterator[tuple[Option, str]]:
    """Yield every option of several records once, panel after panel, with its default in words.

    records: owner -> dataclass or None. An option that several methods share has one name, one meaning and one flag;
    its default is shown for each of them, such as "gptq 128, distill 60".
    """
    found: dict[str, dict[str, Option]] = {}
    for owner, record in records.items():
        for name, one in options_of(record).items():
            found.setdefault(name, {})[owner] = one
    for panel in PANELS:
        for owners in found.values():
            first = next(iter(owners.values()))
            if first.declared.panel == panel:
                yield first, default_in_words(owners)


def default_in_words(owners: Mapping[str, Option]) -> str:
    """Return an option's default in words, by owner where owners differ; "" for none and for a switch that is off."""
    words = {owner: _in_words(one) for owner, one in owners.items()}
    different = list(dict.fromkeys(words.values()))
    if len(different) == 1:
        return different[0]
    return ", ".join(
        f"{' and '.join(owner for owner, word in words.items() if word == one)} {one}" for one in different if one
    )


def _in_words(one: Option) -> str:
    if one.declared.shown is not None:
        return one.declared.shown
    if one.default is None or one.default is False or one.default == ():
        return ""
    return f"{one.default:g}" if isinstance(one.default, float) else str(one.default)
