"""What can be chosen when a model is quantised, without torch: a mistake is named before anything heavy is imported.

One file a method, with its settings and their checks; METHODS is the table of methods, whose code is in train/.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matquant.options import gptq, omniquant, qat

AFFINES = ("none", "refit", "learned")
SCOPES = ("ffn", "attention", "all")


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method needs. settings: the record of its options, None for a method without data. streamed: works block
    by block, the model stays on disk. objective: its default; lambdas: its weight of a width, None for the
    objective's.
    """

    settings: Any = None
    check_options: Callable[[Mapping[str, Any]], None] = lambda options: None
    streamed: bool = False
    affine: str
    objective: str
    lambdas: Callable[[int], float] | None = None


METHODS: dict[str, Method] = {
    "rtn": Method(affine="refit", objective=""),
    "gptq": Method(
        settings=gptq.Settings,
        check_options=gptq.check_options,
        streamed=True,
        affine="refit",
        objective="8,6,4,3,2",
        lambdas=gptq.default_lambda,
    ),
    "omniquant": Method(
        settings=omniquant.Settings,
        check_options=omniquant.check_options,
        streamed=True,
        affine="learned",
        objective="8,4,2",
    ),
    "qat": Method(
        settings=qat.Schedule,
        check_options=qat.check_options,
        affine="learned",
        objective="fp->8;4;2",
    ),
}
