"""The options of quantisation. Needs no torch, so mistakes are reported before anything heavy is imported.

METHODS is the table of methods: a row holds a method's options and defaults. Its code is the module of the same name in
methods/.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matquant.options import distill, gptq, omniquant, qat
from matquant.options.common import Common
from matquant.options.declare import Option, by_panel


def _accept(options: Mapping[str, Any]) -> None:
    """Accept any combination of options."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of METHODS."""

    summary: str  # one sentence for --help and the documentation
    settings: Any = None  # the dataclass that declares its options, None for a method without options and text
    check_options: Callable[[Mapping[str, Any]], None] = _accept  # rejects options that exclude each other
    stages: Callable[..., list[dict[str, Any]]] | None = None  # a cascade of other methods, given its options
    needs_corpus: bool = False  # needs more text than calibration text
    streamed: bool = False  # works layer by layer, the model stays on disk
    learns_affine: bool = True  # has gradients for per-width scales
    run: Callable[[Any], Any] | None = None  # Job -> nested tensors by path, None: run() of methods/NAME.py
    affine: str  # default of --affine
    objective: str = ""  # default of --objective
    lambdas: Callable[[int], float] | None = None  # its loss weight by width; None: the objective's


METHODS: dict[str, Method] = {
    "rtn": Method(
        summary="round to nearest; needs no text",
        affine="refit",
        learns_affine=False,
    ),
    "gptq": Method(
        summary="nested GPTQ, one calibrated pass",
        settings=gptq.Settings,
        check_options=gptq.check_options,
        streamed=True,
        learns_affine=False,
        affine="refit",
        objective="8,6,5,4,3,2",
        lambdas=gptq.default_lambda,
    ),
    "omniquant": Method(
        summary="learned clipping and transformations, layer by layer",
        settings=omniquant.Settings,
        streamed=True,
        affine="learned",
        objective="8,4,2",
    ),
    "qat": Method(
        summary="quantisation-aware training on a corpus",
        settings=qat.Schedule,
        check_options=qat.check_options,
        needs_corpus=True,
        affine="learned",
        objective="fp->8;4;2",
    ),
    "distill": Method(
        summary="tuned GPTQ, then two short phases of distillation",
        settings=distill.Settings,
        check_options=distill.check_options,
        stages=distill.stages,
        affine="learned",
    ),
}


def declared_options() -> list[tuple[Option, str]]:
    """Return every option of every method once, in the order of the help's panels, with its default in words."""
    return list(by_panel({"": Common, **{name: method.settings for name, method in METHODS.items()}}))
