"""Read tensors of a safetensors file into memory instead of mapping them.

If a mapped file is truncated, accessing the lost part ends the process with SIGBUS. Tensors that were read are safe,
and take the process's memory.
"""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from matquant.system.errors import InputError

DTYPES: dict[str, Any] = {  # narrow to wide, in the order of the safetensors package
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "U16": np.uint16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "U32": np.uint32,
    "F32": np.float32,
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
}


def read_tensor(file: Path, dtype: Any, *, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read the array of ``dtype`` and ``shape`` from byte ``start`` on; InputError if the file ends too early."""
    wanted = np.dtype(dtype)
    array = np.empty(shape, wanted)
    with file.open("rb") as stream:
        stream.seek(start)
        got = stream.readinto(array.reshape(-1).view(np.uint8).data)
    if got != array.nbytes:
        raise InputError(f"{file} ended {array.nbytes - got} bytes too early while it was read; copy it again")
    return array
