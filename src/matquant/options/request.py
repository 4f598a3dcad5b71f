"""Everything that ``quantize`` can reject before it loads a model, in one place and without torch.

The command line calls ``check_request`` before it imports the training world, and ``quantize`` calls it first.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matquant.core.nest import OWN, ZEROS, check_bits, check_grid, check_rule
from matquant.core.spec import SCALE_DTYPES
from matquant.format.side_files import side_files
from matquant.format.write import check_writable
from matquant.hf.source import check_source
from matquant.hf.text import read_documents
from matquant.options import AFFINES, METHODS, SCOPES, distill
from matquant.options.objective import Width, parse_objective
from matquant.system.arguments import check_fields, check_given, check_types
from matquant.system.errors import InputError
from matquant.system.interrupted import check_work, work_folder
from matquant.system.locks import check_place
from matquant.system.threads import check_threads

UNLEARNED = {  # what a method that learns no affines says of --affine learned
    "rtn": "method 'rtn' learns nothing; use --affine refit or none",
    "gptq": "method 'gptq' learns nothing by gradient; use --affine refit or none",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, with the method's defaults. widths: empty for a method without data; documents: the text."""

    target: Path
    work: Path
    objective: str = ""
    widths: tuple[Width, ...] = ()
    affine: str = ""
    documents: Sequence[str] = ()


def check_request(
    model: Path | str,
    out: Path | str,
    *,
    method: str,
    rule: str,
    scope: str,
    exclude: Sequence[str],
    group_size: int | None,
    zeros: str,
    grid: str,
    scale_dtype: str,
    resume: bool,
    overwrite: bool,
    symmetric: bool | None = None,
    objective: str | None = None,
    weights: Sequence[float] | None = None,
    affine: str | None = None,
    baseline_bits: int | None = None,
    start: Path | str | None = None,
    text: Sequence[Path | str] = (),
    threads: int | None = None,
    device: str | None = None,
    **options: Any,
) -> Request:
    """What ``quantize`` is to do; InputError for whatever can be known to be wrong before the model is loaded.

    The arguments are those of ``quantize``. Only torch knows the device, only the model the group sizes that fit.
    """
    check_types(
        **{"model": model, "out": out, "method": method, "rule": rule, "scope": scope, "exclude": exclude},
        **{
            "zeros": zeros,
            "grid": grid,
            "scale_dtype": scale_dtype,
            "text": text,
            "resume": resume,
            "overwrite": overwrite,
        },
    )
    check_given(objective=objective, weights=weights, group_size=group_size, affine=affine, start=start)
    check_given(symmetric=symmetric)
    check_threads(threads)
    if method not in (*METHODS, distill.NAME):
        raise InputError(f"method={method!r} is not known; use one of {', '.join((*METHODS, distill.NAME))}")
    target = check_place(out)
    request = Request(target=target, work=work_folder(target))
    if method == distill.NAME:
        fixed = {"objective": objective, "weights": weights, "affine": affine}
        _check_unset({**fixed, "baseline_bits": baseline_bits, "start": start}, None)
        _check_unset({"rule": rule}, "prefix")
        _check_unset({"symmetric": symmetric is not False}, True)
        distill.check_options(options)
        affine, needs_text = "learned", True
    else:
        chosen = METHODS[method]
        objective = chosen.objective if objective is None else objective
        affine, needs_text = affine or chosen.affine, chosen.settings is not None
        if baseline_bits is not None:
            check_bits(baseline_bits)
        widths = _widths(objective, weights, baseline_bits) if needs_text else ()
        if weights is None and chosen.lambdas is not None:
            widths = tuple(dataclasses.replace(width, weight=chosen.lambdas(width.bits)) for width in widths)
        request = dataclasses.replace(request, objective=objective, widths=widths, affine=affine)
    _check_choices(affine=affine, scale_dtype=scale_dtype, rule=rule, zeros=zeros, scope=scope)
    _check_zeros(zeros, affine=affine, rule=rule, symmetric=symmetric is not False)
    check_grid(grid, rule=rule, symmetric=symmetric is not False)
    _check_patterns(exclude)
    if method in METHODS:
        _check_method(method, options, affine=affine, start=start)
    if needs_text and not text:
        raise InputError(f"method {method!r} needs text to work with; give --text FILE, or --method rtn")
    check_writable(target, overwrite=overwrite)
    side_files(model)  # rejects pipes and links that leave the directory
    check_source(model)
    check_work(target, method=method, resume=resume, overwrite=overwrite)
    return dataclasses.replace(request, documents=read_documents(text)) if needs_text else request


def _check_method(method: str, options: Mapping[str, Any], *, affine: str, start: Path | str | None) -> None:
    """InputError for what a method does not have."""
    if METHODS[method].settings is not None:
        _check_options(method, options)
    if affine == "learned" and method in UNLEARNED:
        raise InputError(UNLEARNED[method])
    if start is not None and method != "qat":
        raise InputError(f"--start asked of method {method!r}, which starts from the float model; use --method qat")


def _check_unset(values: Mapping[str, Any], default: Any) -> None:
    for name, value in values.items():
        if value != default:
            raise InputError(
                f"{name}={value!r} asked of method {distill.NAME!r}, whose stages have their own; "
                "leave it out, or use --method qat"
            )


def _check_options(method: str, options: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(METHODS[method].settings)]
    for name in options:
        if name not in known:
            flags = ", ".join(known)
            raise InputError(f"method {method!r} has no option {name!r}; it has {flags}")
    check_fields({field.name: field.type for field in dataclasses.fields(METHODS[method].settings)}, options)
    METHODS[method].check_options(options)


def _widths(objective: str, weights: Sequence[float] | None, baseline_bits: int | None) -> tuple[Width, ...]:
    if baseline_bits is None:
        return parse_objective(objective, weights)
    own = parse_objective(objective, weights)
    if [width.bits for width in own] == [baseline_bits]:
        return own
    return (Width(bits=baseline_bits, truth=True, teachers=(), weight=1.0),)


def _check_choices(*, affine: str, scale_dtype: str, rule: str, zeros: str, scope: str) -> None:
    check_rule(rule)
    for name, value, known in (
        ("affine", affine, AFFINES),
        ("scale_dtype", scale_dtype, SCALE_DTYPES),
        ("zeros", zeros, ZEROS),
        ("scope", scope, SCOPES),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r} is not known; use one of {', '.join(known)}")


def _check_zeros(zeros: str, *, affine: str, rule: str, symmetric: bool) -> None:
    if zeros == OWN:
        return
    for name, found, wanted in (("rule", rule, "prefix"), ("symmetric", symmetric, True)):
        if found != wanted:
            raise InputError(
                f"zeros={zeros!r} asked with {name}={found!r}, whose codes do not lie evenly about 0; "
                f"use zeros {OWN!r}, or {name}={wanted!r}"
            )
    if affine == "none":
        raise InputError(f"zeros={zeros!r} asked with affine='none', by which no width has a zero; use affine 'refit'")


def _check_patterns(exclude: Sequence[str]) -> None:
    for pattern in exclude:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"--exclude {pattern!r} is not a regular expression ({error}); escape it") from None
