"""Everything that ``quantize`` can reject before it loads a model, in one place and without torch.

The command line calls ``check_request`` before it imports the training world, and ``quantize`` calls it first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matquant.calibration import calibration_text
from matquant.core.nest import CENTRE, FLOAT, OWN, check_bits, check_grid
from matquant.format.side_files import side_files
from matquant.format.write import check_writable
from matquant.hf.source import check_source
from matquant.hf.text import read_documents
from matquant.options import METHODS, Method
from matquant.options.common import AUTO, MIDRANGE, STORED, Common, check_patterns
from matquant.options.declare import check_values
from matquant.options.objective import Width, parse_objective
from matquant.options.recipes import Choice, choose
from matquant.system.arguments import check_given, check_types
from matquant.system.errors import InputError, InputTypeError
from matquant.system.interrupted import check_work, work_folder
from matquant.system.locks import check_place
from matquant.system.threads import check_threads

ZEROS = {STORED: OWN, MIDRANGE: CENTRE}  # --zero-point -> the checkpoint's name for it
FIXED = {  # options that the stages of a cascade set themselves, and the only value allowed
    "objective": None,
    "weights": None,
    "affine": None,
    "baseline_bits": None,
    "start": None,
    "rule": "prefix",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked request, with the method's defaults filled in."""

    choice: Choice
    target: Path  # the directory to write
    work: Path  # where an interrupted run keeps its finished work
    affine: str = ""
    objective: str = ""
    widths: tuple[Width, ...] = ()  # empty for a method without text
    documents: Sequence[str] = ()  # the text

    @property
    def common(self) -> Common:
        return self.choice.common

    @property
    def method(self) -> Method:
        return METHODS[self.choice.method]

    @property
    def zeros(self) -> str:
        return ZEROS[self.common.zero_point]


def check_request(
    model: Path | str, out: Path | str, *, recipe: str | None = None, method: str | None = None, **given: Any
) -> Request:
    """Check a request for ``quantize``; InputError for every mistake that shows before the model is loaded.

    The arguments are those of ``quantize``. The device needs torch and the group size needs the model: both are checked
    later.
    """
    check_types(model=model, out=out)
    check_given(recipe=recipe, method=method)
    _check_common_types(given)
    choice = choose(given, recipe=recipe, method=method)
    target = check_place(out)
    common = choice.common
    request = Request(choice=choice, target=target, work=work_folder(target))
    check_work(target, method=choice.method, resume=common.resume, overwrite=common.overwrite)
    request = _check_cascade(request) if request.method.stages else _check_method(request)
    _check_grid(request)
    _check_options(request)
    documents = _read_text(request)
    check_writable(target, overwrite=common.overwrite)
    side_files(model)  # rejects pipes and links that leave the directory
    check_source(model)
    return dataclasses.replace(request, documents=documents() if documents else ())


def _check_common_types(given: Mapping[str, Any]) -> None:
    """Check the options that every method takes: InputTypeError for a wrong type, InputError for an unknown name."""
    known = {field.name for field in dataclasses.fields(Common)}
    values = {name: value for name, value in given.items() if name in known}
    size = values.pop("group_size", None)
    if size is not None and size != AUTO and (isinstance(size, bool) or not isinstance(size, int)):
        raise InputTypeError(
            f"group_size={size!r} is of type {type(size).__name__}; use an integer, None (one group per row) or 'auto'"
        )
    check_threads(values.pop("threads", None))
    values.pop("device", None)  # checked by torch
    check_given(**values)
    check_values(Common, {**values, **({"group_size": size} if isinstance(size, int) else {})}, owner="quantize")


def _check_cascade(request: Request) -> Request:
    """Check a cascade, whose stages set their own objectives and scales."""
    common, name = request.common, request.choice.method
    for option, only in FIXED.items():
        if getattr(common, option) != only:
            raise InputError(_fixed(option, getattr(common, option), name))
    if common.symmetric is False:
        raise InputError(_fixed("symmetric", False, name))
    return dataclasses.replace(request, affine=request.method.affine)


def _fixed(option: str, value: Any, name: str) -> str:
    return (
        f"{option}={value!r} does not work with method {name!r}, whose stages set it themselves; "
        "drop it, or use --method qat"
    )


def _check_method(request: Request) -> Request:
    """Derive the widths and per-width scales of a method that runs once."""
    common, method = request.common, request.method
    if method.settings is None and (common.objective is not None or common.weights is not None):
        raise InputError(
            f"--objective and --weights have no effect with method {request.choice.method!r}, which trains nothing; "
            "drop them, or use --method gptq"
        )
    objective = method.objective if common.objective is None else common.objective
    affine = common.affine or method.affine
    if common.baseline_bits is not None:
        check_bits(common.baseline_bits)
    widths = _widths(objective, common) if method.settings is not None else ()
    if common.weights is None and method.lambdas is not None:
        widths = tuple(dataclasses.replace(width, weight=method.lambdas(width.bits)) for width in widths)
    if affine == "learned" and not method.learns_affine:
        raise InputError(
            f"--affine learned needs a method that trains, found method {request.choice.method!r}; "
            "use --affine refit or none"
        )
    if common.start is not None and request.choice.method != "qat":
        raise InputError(
            f"--start does not work with method {request.choice.method!r}, which starts from the float model; "
            "use --method qat"
        )
    return dataclasses.replace(request, objective=objective, widths=widths, affine=affine)


def _check_grid(request: Request) -> None:
    common, symmetric = request.common, request.common.symmetric is not False
    _check_zero_point(common.zero_point, affine=request.affine, rule=common.rule, symmetric=symmetric)
    check_grid(common.grid, rule=common.rule, symmetric=symmetric)
    if common.grid == FLOAT and request.method.learns_affine:
        raise InputError(
            f"--grid float works with methods rtn and gptq, found method {request.choice.method!r}, which would train "
            "its power-of-two scales; use --method gptq, or --grid companded"
        )
    check_patterns(common.exclude)


def _check_options(request: Request) -> None:
    method, options = request.method, request.choice.options
    check_values(method.settings, options, owner=f"method {request.choice.method!r}")
    method.check_options(options)


def _read_text(request: Request) -> Any:
    """Return the function that reads the documents, None for a method without text."""
    if request.method.settings is None:
        return None
    if request.common.text:
        return lambda: read_documents(request.common.text)
    if request.method.needs_corpus and request.common.start is None:
        raise InputError(
            f"method {request.choice.method!r} needs a training corpus; give --text FILE, or use --recipe balanced"
        )
    return calibration_text


def _widths(objective: str, common: Common) -> tuple[Width, ...]:
    own = parse_objective(objective, common.weights)
    bits = common.baseline_bits
    if bits is None or [width.bits for width in own] == [bits]:
        return own
    return (Width(bits=bits, truth=True, teachers=(), weight=1.0),)


def _check_zero_point(zero_point: str, *, affine: str, rule: str, symmetric: bool) -> None:
    if zero_point == STORED:
        return
    for name, found, wanted in (("rule", rule, "prefix"), ("symmetric", symmetric, True)):
        if found != wanted:
            raise InputError(
                f"zero_point={zero_point!r} does not work with {name}={found!r}, whose codes are not symmetric; "
                f"use zero_point={STORED!r}, or {name}={wanted!r}"
            )
    if affine == "none":
        raise InputError(f"zero_point={zero_point!r} needs per-width scales, found affine='none'; use affine='refit'")
