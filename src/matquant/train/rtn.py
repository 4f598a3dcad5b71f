"""Round to nearest: the smallest method, and the example for all others.

A method takes a Job and returns nested tensors by path, one at a time if it can. It writes no checkpoint, and changes
nothing in the model but what the job asks it to train.
"""

from collections.abc import Iterator

from matquant.errors import InputError
from matquant.tensor import NestedTensor
from matquant.train.fake import nest
from matquant.train.job import Job


def round_to_nearest(job: Job) -> Iterator[tuple[str, NestedTensor]]:
    """Encode every weight on its min-max grid (MatQuant Eq. 1). No data, no training, one weight in memory."""
    if job.grid.affine == "learned":
        raise InputError("method 'rtn' learns nothing; use --affine refit or none")
    parameters = dict(job.model.named_parameters())
    return (
        (path, nest(view.of(parameters[view.parameter].detach()).float(), job.grid, name=path))
        for path, view in job.views.items()
    )
