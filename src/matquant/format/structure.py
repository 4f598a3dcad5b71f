"""Check that a checkpoint's files hold the tensors that its Spec promises, before reading any numbers.

Only headers and the tiny ``weight_shape`` tensors are read, so this takes milliseconds for any model size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.spec import DAMAGED, Spec
from matquant.format.layout import expected_tensors
from matquant.format.plane_files import kind_of, plane_tensors
from matquant.system.errors import InputError


def check_structure(
    where: Path, files: Mapping[str, str], handles: Mapping[str, Any], spec: Spec, *, planes: int | None = None
) -> dict[str, tuple[int, int]]:
    """Return path -> (N, K) of every quantised weight; InputError if one of its tensors is missing or wrong.

    planes: the first planes that the files hold instead of the codes; None: they hold the codes.
    """
    shapes: dict[str, tuple[int, int]] = {}
    parts = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")
    paths = {name.removesuffix(part) for name in files for part in parts if name.endswith(part)}
    if not isinstance(spec.stored_bits, int) and set(spec.stored_bits) != paths:
        other = sorted(set(spec.stored_bits) ^ paths)[0]
        raise InputError(
            f"{where} has stored_bits for weights that it does not hold, or lacks some: {other}; {DAMAGED}"
        )
    for path in sorted(paths):
        name = f"{path}.weight_shape"
        if name not in files:
            raise InputError(f"{where} lacks the tensor {name}; {DAMAGED}")
        stored = handles[files[name]].get_tensor(name)
        if stored.dtype != np.int64:
            dtype = handles[files[name]].get_slice(name).get_dtype()
            raise InputError(f"{name} has dtype {dtype}, {path} needs I64; {DAMAGED}")
        if stored.shape != (2,) or (stored < 1).any():
            raise InputError(f"{name} is {stored.tolist()}, not the size of a matrix; {DAMAGED}")
        rows, columns = (int(n) for n in stored)
        if columns % (spec.group_size or 1):
            raise InputError(
                f"{where} has group_size={spec.group_size}, "
                f"which does not divide in_features={columns} of {path}; {DAMAGED}"
            )
        expected = expected_tensors(path, rows, columns, spec)
        if planes is not None:
            del expected[f"{path}.weight_packed"]
            expected |= _expected_planes(path, (rows, columns), spec, planes)
        for name, wanted in expected.items():
            if name not in files:
                raise InputError(f"{where} lacks the tensor {name}; {DAMAGED}")
            entry = handles[files[name]].get_slice(name)
            if entry.get_dtype() not in wanted[1]:
                needed = " or ".join(dict.fromkeys(wanted[1]))
                raise InputError(f"{name} has dtype {entry.get_dtype()}, {path} needs {needed}; {DAMAGED}")
            if list(entry.get_shape()) != wanted[0]:
                raise InputError(
                    f"{name} has shape {list(entry.get_shape())}, "
                    f"{path} of {rows} x {columns} needs {wanted[0]}; {DAMAGED}"
                )
        shapes[path] = (rows, columns)
    if not shapes:
        raise InputError(f"{where} holds no quantised weight; {DAMAGED}")
    if spec.experts is not None:
        spec.experts.join(shapes)  # rejects experts that do not fit together
    return shapes


def _expected_planes(
    path: str, shape: tuple[int, int], spec: Spec, held: int
) -> dict[str, tuple[list[int], tuple[str, ...]]]:
    """Return tensor name -> (shape, possible dtypes) of the planes of a weight if the first ``held`` are there."""
    tensors = enumerate(plane_tensors(path, shape, spec).items())
    return {
        name: (list(wanted), ("U8",))
        for plane, (name, wanted) in tensors
        if plane < held or kind_of(path, plane, spec) == "rest"
    }
