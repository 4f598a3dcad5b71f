"""Element types as safetensors names them."""

from typing import Any

import ml_dtypes
import numpy as np

# dtypes that exports can write
FLOATS: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
CONFIG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # the same dtypes in config.json
ANY_FLOAT = ("F64", *FLOATS)  # dtypes that a model may be stored in
