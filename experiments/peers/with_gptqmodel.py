"""Worker: GPTQModel in its own environment. ``python with_gptqmodel.py FOLDER`` reads FOLDER/job.json.

options: what its QuantizeConfig takes (group_size, sym, format); the rest are its defaults. The model is loaded in the
type GPTQModel chooses for it, float16 or bfloat16, or with dtype in that one: processors that convert bfloat16 in
software take several times as long with it.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]
from packed import read_packed  # type: ignore[import-not-found]
from safetensors.numpy import save_file

BATCH = 4


def main(folder: Path) -> None:
    """Quantise, save in GPTQModel's own format, read the weights back from there."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    ids_SL = torch.from_numpy(np.load(job["calibration"]))
    rows = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in ids_SL]
    chosen = {key: value for key, value in job["options"].items() if key != "dtype"}
    dtype = getattr(torch, job["options"].get("dtype", ""), "auto")
    began = time.perf_counter()
    model = GPTQModel.load(job["model"], QuantizeConfig(bits=job["bits"], **chosen), device="cpu", dtype=dtype)
    model.quantize(rows, batch_size=BATCH)
    model.save(str(folder / "checkpoint"))
    seconds = time.perf_counter() - began
    zero_offset = 0 if job["options"].get("format") == "gptq_v2" else 1
    weights, stored = read_packed(
        folder / "checkpoint",
        job["shapes"],
        bits=job["bits"],
        group_size=job["options"]["group_size"],
        zero_offset=zero_offset,
    )
    save_file(weights, folder / "weights.safetensors")
    (folder / "result.json").write_text(json.dumps({"bytes": stored, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
