"""The records stored besides numbers: Spec (how a checkpoint was made and is read) and Plan (bits per module path).

Both are frozen, keyword-only, and read from JSON strictly: an unknown key raises and names the nearest known one.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from matquant.core.experts import Experts, why_unknown
from matquant.core.nest import FLOAT, GRIDS, MASTER_BITS, OWN, UNIFORM, ZEROS, check_bits, check_grid, check_rule
from matquant.system.arguments import check_given, check_types
from matquant.system.errors import InputError, InputTypeError
from matquant.system.files import read_json

FORMAT_VERSION = 6  # the newest that we read
SINCE = {
    "stored_bits": 2,
    "zeros": 3,
    "grid": 4,
    "head_bits": 5,
    "experts": 6,
}  # the format that introduced a key; a record is written in the oldest format that holds it
FLOAT_SINCE = 6  # the format that introduced grid "float"
DAMAGED = "the checkpoint is damaged: write it again"
SCALE_DTYPES = ("bfloat16", "float32")
ABOUT = ("strategy", "budget", "bits_per_weight", "bytes", "loss", "log_perplexity")  # facts in a plan's "about"


def _known_only(record: type, values: Mapping[str, Any], *, where: str, also: Sequence[str] = ()) -> dict[str, Any]:
    known = [*also, *(f.name for f in dataclasses.fields(record))]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise InputError(
                f"{where} has the unknown key {key!r} (format {values.get('format', 1)}); nearest: {nearest!r}"
            )
    return dict(values)


def _is_int(value: Any, low: int, high: float = float("inf")) -> bool:
    return type(value) is int and low <= value <= high


def _all_ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _is_stored(value: Any) -> bool:
    widths = value.values() if isinstance(value, dict) else [value]
    return all(_is_int(width, 2, MASTER_BITS) for width in widths)


# The allowed values of each key of a record: a test and its description.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rule": (lambda v: isinstance(v, str), "a string"),
    "widths": (_all_ints, "a list of integers"),
    "slices": (_all_ints, "a list of integers"),
    "group_size": (lambda v: v is None or _is_int(v, 1), "null or an integer above 0"),
    "symmetric": (lambda v: isinstance(v, bool), "true or false"),
    "scale_dtype": (lambda v: v in SCALE_DTYPES, " or ".join(SCALE_DTYPES)),
    "scope": (lambda v: isinstance(v, str), "a string"),
    "method": (lambda v: isinstance(v, str), "a string"),
    "objective": (lambda v: isinstance(v, str), "a string"),
    "weights": (lambda v: isinstance(v, list) and all(type(w) in (int, float) for w in v), "a list of numbers"),
    "baseline_bits": (lambda v: v is None or _is_int(v, 1, MASTER_BITS), "null or an integer 1..8"),
    "steps": (lambda v: _is_int(v, 0), "an integer of at least 0"),
    "seed": (lambda v: type(v) is int, "an integer"),
    "data_sha256": (lambda v: isinstance(v, str), "a string"),
    "stored_bits": (lambda v: _is_stored(v), "an integer 2..8, or an object with one for every path"),
    "zeros": (lambda v: v in ZEROS, " or ".join(ZEROS)),
    "grid": (lambda v: v in GRIDS, " or ".join(GRIDS)),
    "head_bits": (lambda v: v is None or _is_int(v, 1, MASTER_BITS), "null or an integer 1..8"),
}


def check_format(version: Any, *, where: object) -> None:
    """Raise InputError unless ``version`` is a format this package reads."""
    if not _is_int(version, 1, FORMAT_VERSION):
        raise InputError(
            f"{where} is in format {version!r}; this matquant reads formats up to {FORMAT_VERSION}: upgrade matquant"
        )


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How the codes of a checkpoint are read and how they were made: the "matquant" object of config.json.

    rule: slicing rule. widths: the widths trained (any of 1..8 can be read). slices: widths with a per-width scale and
    zero-point in matquant_slices.safetensors. group_size: None for one group per row. symmetric: the 8-bit zero-point
    is 128. scale_dtype: dtype of the 8-bit scales (bfloat16: exact in every engine; float32: the exact formulas).
    scope: which linear layers. method, objective, weights, baseline_bits, steps, seed, data_sha256: how it was made.
    method: lists the methods of its starting checkpoints too ("gptq, qat"); the other keys are the last method's.
    data_sha256: over the training tokens; empty without data. stored_bits: number of top bits stored of each code, for
    all paths or by path; the lower bits are 0. zeros: zero-points of the widths in ``slices``: "own" (stored), or
    "centre" for mid-range, (2^r - 1)/2, which is not stored. grid: the positions that codes stand for (nest.GRIDS).
    head_bits: the narrowest width at which embedding and head are read unless a plan names them; None: they are not
    quantised. experts: how the model's own files hold the experts, if they hold all of a layer in one tensor.
    """

    rule: str
    widths: tuple[int, ...]
    slices: tuple[int, ...] = ()
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    scope: str = "ffn"
    method: str = "rtn"
    objective: str = ""
    weights: tuple[float, ...] = ()
    baseline_bits: int | None = None
    steps: int = 0
    seed: int = 0
    data_sha256: str = ""
    stored_bits: int | Mapping[str, int] = MASTER_BITS
    zeros: str = OWN
    grid: str = UNIFORM
    head_bits: int | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        for key, (is_right, words) in _KINDS.items():
            value = getattr(self, key)
            if not is_right(list(value) if isinstance(value, tuple) else value):
                raise InputTypeError(f"{key}={value!r} of a Spec must be {words}")
        check_rule(self.rule)
        check_grid(self.grid, rule=self.rule, symmetric=self.symmetric)
        if self.grid != UNIFORM and self.stored_bits != MASTER_BITS:
            raise InputError(f"grid={self.grid!r} needs all 8 bits stored, found stored_bits={self.stored_bits!r}")
        for bits in (*self.widths, *self.slices):
            check_bits(bits)

    @property
    def format(self) -> int:
        """Return the version of the file format that this record needs."""
        given = {"stored_bits": self.stored_bits != MASTER_BITS, "zeros": self.zeros != OWN}
        given |= {"grid": self.grid != UNIFORM, "head_bits": self.head_bits is not None}
        given |= {"experts": self.experts is not None}
        newest = FLOAT_SINCE if self.grid == FLOAT else 1
        return max([newest, *(SINCE[key] for key, is_given in given.items() if is_given)])

    def stored(self, path: str) -> int:
        """Return how many top bits of the codes at ``path`` are stored."""
        return self.stored_bits if isinstance(self.stored_bits, int) else self.stored_bits[path]

    def to_json(self) -> dict[str, Any]:
        values = {"format": self.format, **dataclasses.asdict(self)}
        return {key: value for key, value in values.items() if SINCE.get(key, 1) <= self.format}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, where: str) -> Self:
        """Parse the "matquant" object of ``where``; InputError for a future format, unknown or missing keys."""
        check_format(values.get("format"), where=where)
        known = _known_only(cls, values, where=where, also=["format"])
        version = known.pop("format")
        for key, since in SINCE.items():
            if key in known and version < since:
                raise InputError(f"{where} has the key {key!r}, which format {version} does not have; {DAMAGED}")
        if known.get("grid") == FLOAT and version < FLOAT_SINCE:
            raise InputError(f"{where} has grid {FLOAT!r}, which format {version} does not have; {DAMAGED}")
        for name in ("rule", "widths"):
            if name not in known:
                raise InputError(f"{where} lacks {name!r}; {DAMAGED}")
        for key, (is_right, words) in _KINDS.items():
            if key in known and not is_right(known[key]):
                raise InputError(f"{where} has {key}={known[key]!r}, which must be {words}; {DAMAGED}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        if values.get("experts") is not None:
            values["experts"] = Experts.from_json(values["experts"], where=where)
        try:
            return cls(**values)
        except InputError as error:
            found = ", ".join(f"{key}={known.get(key)!r}" for key in ("rule", "widths", "slices"))
            raise InputError(f"{where} has {found}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bits per module path (Mix'n'Match): ``bits[path]``, or ``default`` for other paths (None: list all).

    about: how it was made (keys ABOUT), for people to read only.
    """

    default: int | None = MASTER_BITS
    bits: Mapping[str, int] = field(default_factory=dict)
    about: Mapping[str, str | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(plan=self.bits)
        for width in (*(() if self.default is None else (self.default,)), *self.bits.values()):
            check_bits(width)

    @classmethod
    def over(cls, bits: int, plan: "Mapping[str, int] | Plan | Path | str | None") -> "Plan":
        """Build a Plan: a uniform width with optional per-path overrides; a Plan or plan file is used as is."""
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, (Path, str)):
            return cls.read(plan)
        check_bits(bits)
        check_given(plan=plan)
        return cls(default=bits, bits=dict(plan or {}))

    def resolve(self, paths: Iterable[str], *, least: Mapping[str, int] | None = None) -> dict[str, int]:
        """Return the width of every path; InputError if the plan names an unknown path or misses one.

        least: path -> the least width that the default gives it; a width that the plan names for a path is used as is.
        A plan without a default need not list these paths.
        """
        least = least or {}
        known = dict.fromkeys(paths)
        unknown = [path for path in self.bits if path not in known]
        if unknown:
            reason = why_unknown(unknown[0], known)
            if reason is not None:
                raise InputError(f"the plan names {unknown[0]!r}, {reason}")
            nearest = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)
            raise InputError(
                f"the plan names {unknown[0]!r}, which the model does not quantise; nearest: {nearest[0]!r}"
            )
        missing = [path for path in known if path not in self.bits and path not in least]
        if self.default is None and missing:
            raise InputError(
                f"the plan has no default and misses {missing[0]!r} ({len(missing)} of {len(known)} paths); "
                'list every path, or give "default"'
            )
        usual = {path: max(self.default or 1, least.get(path, 1)) for path in known}
        return {path: self.bits.get(path, usual[path]) for path in known}

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``read`` reads, without empty keys."""
        values = {"default": self.default, "bits": dict(self.bits), "about": dict(self.about)}
        return {key: value for key, value in values.items() if value not in (None, {})}

    @classmethod
    def read(cls, file: Path | str) -> Self:
        """Read {"default": bits, "bits": {path: bits}, "about": {fact: value}} from a JSON file. All optional."""
        where, give = Path(file), '{"default": 4, "bits": {...}}'
        values = read_json(where, "--plan", give=give, missing='a JSON file {"default": 4, "bits": {path: bits}}')
        if not isinstance(values, dict) or not isinstance(values.get("bits", {}), dict):
            raise InputError(f'--plan {where} is not an object with "bits"; give {give}')
        known = {"default": None, **_known_only(cls, values, where=str(where))}
        if "default" in values:
            check_bits(values["default"])
        _check_about(known.get("about", {}), where=where)
        return cls(**known)


def _check_about(about: Any, *, where: Path) -> None:
    """Raise InputError unless ``about`` is an object of known facts, each a text or a number."""
    give = f'"about" may hold {", ".join(ABOUT)} as texts or numbers'
    if not isinstance(about, dict):
        raise InputError(f"--plan {where} has about={about!r}, which is not an object; {give}")
    for key, value in about.items():
        if key not in ABOUT or type(value) not in (str, int, float):
            raise InputError(f'--plan {where} has {key}={value!r} in its "about"; {give}')
