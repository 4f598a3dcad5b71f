"""Worker: mlx_lm.convert in a separate environment. ``python convert_mlx.py MODEL OUT BITS GROUP_SIZE`` prints

    {"seconds": of the conversion without imports, "cpu_s": of the process, "versions": {...}}

MODEL is a float Hugging Face directory. Linear layers are quantised, the embedding is copied, as in the checkpoints of
bench/decode.py.
"""

import json
import resource
import sys
import time
from importlib.metadata import version
from typing import Any

import mlx.nn as nn  # type: ignore[import-not-found]
from mlx_lm.convert import convert  # type: ignore[import-not-found]


def is_linear(path: str, module: Any, config: Any = None) -> bool:
    """Whether a module is quantised."""
    return isinstance(module, nn.Linear)


def main(model: str, out: str, bits: str, group_size: str) -> None:
    """Convert once."""
    began = time.perf_counter()
    convert(model, out, quantize=True, q_bits=int(bits), q_group_size=int(group_size), quant_predicate=is_linear)
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    print(json.dumps({"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
