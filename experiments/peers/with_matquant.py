"""Worker: a slice or a plan of a nested checkpoint. ``python with_matquant.py FOLDER`` reads FOLDER/job.json.

options: recipe names the checkpoint among those of ``make smollm2 RECIPE=...``. Every layer has the width ``bits``, or
with budget, in bits per weight of the decoder's layers alone, the width of a plan: that of ``matquant plan --no-fused
--evaluations 0`` with SAMPLES sequences of the calibration text and WIDTHS, and embedding and head fixed at int8. Only
the layers' weights are written, so embedding and head stay float as in every other row.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from matquant.core.nest import MASTER_BITS
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.format.sizes import plan_bytes
from matquant.hf.text import cut_windows
from matquant.planning.budget import Budget, bits_budget
from matquant.planning.run import make_plan
from matquant.planning.sensitivity import SEQ_LEN, Losses

NAME = "SmolLM2-135M-Instruct"  # as examples/smollm2/run.py calls its checkpoints
WIDTHS = (2, 3, 4, 5, 6, 8)
SAMPLES = 8


def main(folder: Path) -> None:
    """Choose every layer's width and write what the checkpoint reads there."""
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    began = time.perf_counter()
    checkpoint = open_checkpoint(Path(job["nested"]) / job["options"]["recipe"] / NAME)
    budget = job["options"].get("budget")
    plan: dict[str, int] = dict.fromkeys(job["shapes"], job["bits"])
    facts: dict[str, Any] = {}
    if budget is not None:
        plan, facts = _search(checkpoint, list(plan), budget, np.load(job["calibration"]))
    save_file({path: checkpoint.nested(path).read(bits) for path, bits in plan.items()}, folder / "weights.safetensors")
    result = {"bytes": {"nested": round(plan_bytes(checkpoint, plan))}, "seconds": time.perf_counter() - began}
    types = Counter(f"int{bits}" for bits in plan.values())
    (folder / "result.json").write_text(json.dumps({**result, "types": types, "plan": plan, "facts": facts}))


def _search(
    checkpoint: Checkpoint, paths: Sequence[str], bits_per_weight: float, ids_SL: np.ndarray
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the searched widths of ``paths`` and the facts of the search."""
    windows = cut_windows(ids_SL.ravel(), SEQ_LEN)[:SAMPLES]
    with Losses(checkpoint, windows) as losses:
        budget = layers_budget(checkpoint, paths, bits_per_weight)
        plan, facts = make_plan(checkpoint, budget, widths=WIDTHS, losses=losses, fused=False, evaluations=0)
    return {path: plan[path] for path in paths}, facts


def layers_budget(checkpoint: Checkpoint, paths: Sequence[str], bits_per_weight: float) -> Budget:
    """Return a budget of ``paths`` alone, with all other paths at 8 bits."""
    budget = bits_budget(checkpoint, bits_per_weight, widths=WIDTHS)
    others = dict.fromkeys(checkpoint.shapes.keys() - set(paths), MASTER_BITS)
    weights = sum(rows * columns for rows, columns in (checkpoint.shapes[path] for path in paths))
    asked = f"{bits_per_weight:g} bits per weight of the layers"
    limit = int(bits_per_weight * weights) + budget.cost(others)
    return replace(budget, limit=limit, asked=asked).fixing(others)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
