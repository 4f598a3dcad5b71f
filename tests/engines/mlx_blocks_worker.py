"""Worker: mlx.core.dequantize on stored tensors alone. ``python mlx_blocks_worker.py FOLDER``.

Reads the exports of FOLDER/job.json, {"exports": {name: directory}}, and writes FOLDER/NAME.safetensors.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx  # type: ignore[import-not-found]


def main(folder: Path) -> None:
    """Dequantise every weight as config.json says."""
    job = json.loads((folder / "job.json").read_text())
    for name, directory in job["exports"].items():
        tensors = mx.load(str(Path(directory) / "model.safetensors"))
        config = json.loads((Path(directory) / "config.json").read_text())["quantization"]
        usual = {key: config[key] for key in ("group_size", "bits", "mode")}
        found = {}
        for path in (key.removesuffix(".scales") for key in tensors if key.endswith(".scales")):
            parts = (tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases"))
            found[path] = mx.dequantize(*parts, **config.get(path, usual)).astype(mx.float32)
        mx.save_safetensors(str(folder / f"{name}.safetensors"), found)
    (folder / "result.json").write_text(json.dumps({name: {} for name in job["exports"]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
