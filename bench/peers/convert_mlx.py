"""Worker: mlx_lm.convert in its own environment. ``python convert_mlx.py FOLDER`` reads FOLDER/job.json,

    {"model": float Hugging Face directory, "out": directory to write, "bits": 4, "group_size": 64}

and writes FOLDER/result.json, {"seconds": of the conversion without imports, "bytes": of the tensors written}. Only the
linears of the decoder layers are quantised, as in our exports; the rest is copied.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from mlx_lm.convert import convert  # type: ignore[import-not-found]


def in_layers(path: str, module: Any, config: Any = None) -> bool:
    """Whether a module is quantised."""
    return ".layers." in path and hasattr(module, "to_quantized")


def main(folder: Path) -> None:
    """Convert once."""
    job = json.loads((folder / "job.json").read_text())
    began = time.perf_counter()
    convert(
        job["model"],
        job["out"],
        quantize=True,
        q_bits=job["bits"],
        q_group_size=job["group_size"],
        quant_predicate=in_layers,
    )
    seconds = time.perf_counter() - began
    written = sum(file.stat().st_size for file in Path(job["out"]).glob("*.safetensors"))
    (folder / "result.json").write_text(json.dumps({"seconds": seconds, "bytes": written}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
