"""Worker: AutoRound in a separate environment. ``python with_autoround.py FOLDER`` reads FOLDER/job.json.

options: what AutoRound takes (iters, group_size, sym, enable_alg_ext). The calibration sequences have a mask
of ones: without it AutoRound masks every token equal to the pad token, here also the beginning of each document.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound  # type: ignore[import-not-found]
from packed import read_packed  # type: ignore[import-not-found]
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8  # AutoRound's default


def main(folder: Path) -> None:
    """Quantise, save in AutoRound's own format, read the weights back from there."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    ids_SL = torch.from_numpy(np.load(job["calibration"]))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in torch.split(ids_SL, BATCH)]
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    compressor = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job["model"]),
        bits=job["bits"],
        dataset=batches,
        nsamples=ids_SL.shape[0],
        seqlen=ids_SL.shape[1],
        batch_size=BATCH,
        device_map="cpu",
        **job["options"],
    )
    compressor.quantize_and_save(str(folder / "checkpoint"), format="auto_round")
    seconds = time.perf_counter() - began
    group_size = job["options"]["group_size"]
    weights, stored = read_packed(folder / "checkpoint", job["shapes"], bits=job["bits"], group_size=group_size)
    save_file(weights, folder / "weights.safetensors")
    (folder / "result.json").write_text(json.dumps({"bytes": stored, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
