"""Round to nearest: the smallest method, and the example for all others.

A method takes a float model, the views of its linears and a Grid, and returns nested tensors by path. It changes no
model and writes no file.
"""

from collections.abc import Iterator, Mapping

from matquant.models import Model, View
from matquant.tensor import NestedTensor
from matquant.train.fake import Grid, nest


def round_to_nearest(model: Model, views: Mapping[str, View], grid: Grid) -> Iterator[tuple[str, NestedTensor]]:
    """Encode every weight on its min-max grid (MatQuant Eq. 1), one at a time. No data, no training."""
    parameters = dict(model.named_parameters())
    for path, view in views.items():
        yield path, nest(view.of(parameters[view.parameter].detach()).float(), grid, name=path)
