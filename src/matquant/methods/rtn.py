"""Round to nearest: the smallest method, and the example for new ones.

A method takes a Job and returns nested tensors by path, one at a time if it can. It writes no checkpoint, and changes
the model only where the job trains it.
"""

from collections.abc import Iterator

from matquant.core.tensor import NestedTensor
from matquant.methods.parts.fake import nest
from matquant.methods.parts.job import Job


def run(job: Job) -> Iterator[tuple[str, NestedTensor]]:
    """Encode every weight on its min-max grid (MatQuant Eq. 1). No data, no training, one weight in memory."""
    parameters = dict(job.model.named_parameters())

    def encoded() -> Iterator[tuple[str, NestedTensor]]:
        for number, (path, view) in enumerate(job.views.items(), 1):
            yield path, nest(view.of(parameters[view.parameter].detach()).float(), job.grid, name=path)
            job.report({"step": number, "steps": len(job.views), "unit": "weight", "loss": {}})

    return encoded()
