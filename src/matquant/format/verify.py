"""Check the numbers of a checkpoint, not only its hashes: scales are positive and finite, floats are not NaN."""

from pathlib import Path

import numpy as np

from matquant.core.dtypes import ANY_FLOAT
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.system.errors import InputError


def verify_checkpoint(directory: Path | str) -> Checkpoint:
    """Check every hash, shape and scale; return the checkpoint, or raise InputError."""
    checkpoint = open_checkpoint(directory, partial=True)
    check_scales(checkpoint)
    return checkpoint


def check_scales(checkpoint: Checkpoint) -> None:
    """Raise InputError naming the path of a scale or zero-point that is not a positive number."""
    for path in checkpoint.shapes:
        tensor = checkpoint.nested(path)
        for scale, zero in ((tensor.scale, tensor.zero), *tensor.slices.values()):
            if not (np.isfinite(scale).all() and np.isfinite(zero).all() and (scale > 0).all()):
                raise InputError(
                    f"{path} has a scale or zero-point that is not a positive number; write the checkpoint again"
                )


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise InputError naming an unquantised tensor that holds NaN or infinity."""
    for name in checkpoint.plain_names():
        if checkpoint.stored_dtype(name) in ANY_FLOAT and not np.isfinite(checkpoint.array(name)).all():
            raise InputError(
                f"{name} of {checkpoint.directory} holds NaN or infinity; repair the float model and quantise it again"
            )
