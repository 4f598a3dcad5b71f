"""Worker: stock transformers with compressed-tensors, float32. ``python compressed_tensors_worker.py FOLDER``."""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch_loop import loop  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM


def main(folder: Path) -> None:
    """Read the exports as anybody would."""
    assert importlib.util.find_spec("matquant") is None
    job = json.loads((folder / "job.json").read_text())
    result = {}
    for name, directory in job["exports"].items():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        result[name] = loop(model, job)  # the first forward pass unpacks the weights
        linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
        weights = {path: linear.weight.detach().clone() for path, linear in linears.items()}
        save_file(weights, folder / f"{name}.safetensors")
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
