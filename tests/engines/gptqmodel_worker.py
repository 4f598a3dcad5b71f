"""Worker: GPTQModel with its torch kernel, bfloat16. ``python gptqmodel_worker.py FOLDER``."""

import json
import os
import sys
from pathlib import Path

os.environ.update({"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"})  # the first: it refuses to start on one

import torch
from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]
from safetensors.torch import save_file
from torch_loop import loop  # type: ignore[import-not-found]


def main(folder: Path) -> None:
    """Read the exports with its own loader."""
    job = json.loads((folder / "job.json").read_text())
    result = {}
    for name, directory in job["exports"].items():
        model = GPTQModel.load(directory, device="cpu", dtype=torch.bfloat16, backend=BACKEND.GPTQ_TORCH).model
        weights = {}
        for path, module in model.named_modules():
            if hasattr(module, "dequantize_weight"):
                weights[path] = module.dequantize_weight().T
            elif isinstance(module, torch.nn.Linear) and ".layers." in path:
                weights[path] = module.weight
        wide = {path: weight.detach().float().contiguous() for path, weight in weights.items()}
        save_file(wide, folder / f"{name}.safetensors")
        result[name] = loop(model, job)
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
