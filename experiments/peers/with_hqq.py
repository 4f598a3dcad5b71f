"""Worker: HQQ in its own environment. ``python with_hqq.py FOLDER`` reads FOLDER/job.json.

HQQ needs no text. options: group_size (null: one group per row) and axis of its quantisation config. Stored are the
packed codes and, in fp16, a scale and a zero per group; weight = (code - zero) * scale, read back in float32.
"""

import json
import sys
import time
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer  # type: ignore[import-not-found]
from safetensors import safe_open
from safetensors.torch import save_file


def main(folder: Path) -> None:
    """Quantise every linear and read its weights back."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    weights, stored, seconds = {}, dict.fromkeys(("codes", "scales", "zeros"), 0), 0.0
    config = BaseQuantizeConfig(nbits=job["bits"], **job["options"])
    with safe_open(job["weights"], framework="pt") as state:
        for path in job["shapes"]:
            weight_NK = state.get_tensor(f"{path}.weight")
            linear = torch.nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False)
            linear.weight.data = weight_NK
            began = time.perf_counter()
            quantised = HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
            seconds += time.perf_counter() - began
            parts = {"codes": quantised.W_q, "scales": quantised.meta["scale"], "zeros": quantised.meta["zero"]}
            for part, tensor in parts.items():
                stored[part] += tensor.numel() * tensor.element_size()
            wide = {"scale": parts["scales"].float(), "zero": parts["zeros"].float(), "compute_dtype": torch.float32}
            weights[path] = Quantizer.dequantize(parts["codes"], {**quantised.meta, **wide}).detach().contiguous()
    save_file(weights, folder / "weights.safetensors")
    (folder / "result.json").write_text(json.dumps({"bytes": stored, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
