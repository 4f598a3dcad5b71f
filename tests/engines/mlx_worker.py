"""Worker: mlx_lm on the CPU. ``python mlx_worker.py FOLDER``."""

import json
import sys
from pathlib import Path

import mlx.core as mx  # type: ignore[import-not-found]
import mlx.nn as nn  # type: ignore[import-not-found]
import numpy as np
from mlx_lm.generate import generate_step  # type: ignore[import-not-found]
from mlx_lm.utils import load_model  # type: ignore[import-not-found]


def main(folder: Path) -> None:
    """Read the exports with its own loader."""
    job = json.loads((folder / "job.json").read_text())
    windows = np.load(job["windows"])
    result = {}
    for name, directory in job["exports"].items():
        model, _ = load_model(Path(directory))
        mx.save_safetensors(str(folder / f"{name}.safetensors"), weights(model))
        steps = generate_step(mx.array(job["prompt"]), model, max_tokens=job["new_tokens"])
        tokens = [int(token) for token, _ in steps]
        losses = []
        for window in windows:
            logits = model(mx.array(window[None, :-1])).astype(mx.float32)
            losses.append(nn.losses.cross_entropy(logits[0], mx.array(window[1:]), reduction="mean").item())
        result[name] = {"tokens": tokens, "log_perplexity": sum(losses) / len(losses)}
    (folder / "result.json").write_text(json.dumps(result))


def weights(model: nn.Module) -> dict[str, mx.array]:
    """Of all linears in the layers, by path, float32, as mlx.core.dequantize gives them."""
    found = {}
    for path, module in model.named_modules():
        if ".layers." not in path:
            continue
        if isinstance(module, nn.QuantizedLinear):
            parts = (module.weight, module.scales, module.biases)
            found[path] = mx.dequantize(*parts, group_size=module.group_size, bits=module.bits).astype(mx.float32)
        elif isinstance(module, nn.Linear):
            found[path] = module.weight.astype(mx.float32)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
