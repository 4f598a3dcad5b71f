"""Symmetric or asymmetric: which 8-bit grid round to nearest gives a model, where nobody has said.

A symmetric grid spends codes on a side of 0 that a group may not use; what is left of them at 4 bits is few. An
asymmetric one covers exactly the group's range. It costs nothing at the widths with a scale and zero-point of their own
(2 to 4), and at the others 0.375 bits per weight in groups of 64; fewer formats hold its 8-bit codes (docs/engines.md).
So both are tried on some rows of every weight, and the asymmetric one is taken where it is clearly better.

Ratio of the squared int4 errors, asymmetric over symmetric, groups of 64: Gaussian rows 0.80 to 0.88, the embedded
model 0.82, SmolLM2-135M as published in Q4_1 0.62. Methods that fit codes to data keep the symmetric grid.
"""

import dataclasses
from collections.abc import Mapping

from matquant.core.nest import OWN
from matquant.hf_torch.ties import Model
from matquant.hf_torch.views import View
from matquant.methods.parts.fake import Grid, nest

BITS = 4  # whose error is compared
CLEARLY = 0.75  # the ratio of squared errors from which the asymmetric grid is worth its price
ROWS = 128  # of each weight that are looked at


def choose_symmetry(model: Model, views: Mapping[str, View], grid: Grid) -> tuple[bool, str]:
    """Whether a symmetric grid suits these weights; if not, the reason, for people."""
    if grid.zeros != OWN or any(".experts." in path for path in views):
        return True, ""  # nothing else is possible: transformers reads fused experts without zero-points only
    parameters = dict(model.named_parameters())
    errors = {True: 0.0, False: 0.0}
    for path, view in views.items():
        weight = view.of(parameters[view.parameter].detach())
        rows = weight[:: max(1, weight.shape[0] // ROWS)].float()
        for symmetric in errors:
            tensor = nest(rows, dataclasses.replace(grid, symmetric=symmetric), name=path)
            errors[symmetric] += float((tensor.read(BITS) - rows).double().square().sum())
    ratio = errors[False] / errors[True] if errors[True] > 0 else 1.0
    if ratio > CLEARLY:
        return True, ""
    return False, (
        f"asymmetric grid chosen: its squared error at int{BITS} is {ratio:.2f} of the symmetric grid's; "
        "--symmetric overrides"
    )
