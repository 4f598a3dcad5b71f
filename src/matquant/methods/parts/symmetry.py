"""Choose a symmetric or an asymmetric 8-bit grid for round to nearest, unless the user chose one.

A symmetric grid may spend codes on a side of 0 that a group does not use, which matters at 4 bits. An asymmetric grid
covers exactly the group's range. It costs nothing at int2 to int5, which have per-width scales and zero-points, and
0.375 bits per weight at the other widths in groups of 64; fewer formats hold its 8-bit codes (docs/engines.md). So both
are tried on some rows of every weight, and the asymmetric grid is used if it is clearly better.

Ratio of the squared int4 errors, asymmetric over symmetric, groups of 64: Gaussian rows 0.80 to 0.88, the embedded
model 0.82, SmolLM2-135M as published in Q4_1 0.62. Methods that fit codes to data keep the symmetric grid.
"""

import dataclasses
from collections.abc import Mapping

from matquant.core.nest import OWN
from matquant.hf_torch import Model
from matquant.hf_torch.views import View
from matquant.methods.parts.fake import Grid, nest

BITS = 4  # compare errors at this width
CLEARLY = 0.75  # the ratio of squared errors below which the asymmetric grid is worth its cost
ROWS = 128  # rows of each weight to try


def choose_symmetry(model: Model, views: Mapping[str, View], grid: Grid) -> tuple[bool, str]:
    """Return whether to use a symmetric grid for these weights, and if not, the reason."""
    if grid.zeros != OWN or any(".experts." in path for path in views):
        return True, ""  # the only choice: transformers reads fused experts only without zero-points
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
