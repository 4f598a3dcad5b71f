"""The plan search against the paper's strategies and uniform widths on held-out text (Figure 2).

    python experiments/plan.py run MODEL                  stories260K or reference
    python experiments/plan.py growth                     time and evaluations against layers and widths

``run`` makes the best nested checkpoint of experiments/quality.py once ($MATQUANT_CACHE, else ~/.cache/matquant) and
measures every plan on one resident copy: calibration on the training text, figures on the TEST tokens of
experiments/quality.py. Both write experiments/plan.json, from which experiments/results.py makes tables and pictures.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import typer

import matquant
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.measure.likelihood import log_perplexity
from matquant.planning.budget import Budget, bits_budget
from matquant.planning.run import SEARCH, make_plan
from matquant.planning.search import PAPER_WIDTHS
from matquant.planning.sensitivity import SIDECAR, Losses, open_losses
from matquant.planning.strategies import STRATEGIES
from quality import CELLS, CONTEXT, SETTINGS, float_log_perplexity, held_out, kept_at, make

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from origin import ROOT, origin

RECORD = ROOT / "experiments" / "plan.json"
BEST = {"stories260K": "qat+ joint even plans", "reference": "qat+ joint plans"}
BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0)
FREE = "search, not fused"
LESS = 1e-3  # bits per weight: a plan of that much less is smaller
EVOLUTION = 250 * 64  # evaluations of an evolutionary search
DEPTHS = (2, 4, 8, 16)
WIDTHS = (2, 3, 4, 6, 8)  # of the straight line, and of a search unless told
WIDTH_SETS = ((2, 4, 8), WIDTHS, (2, 3, 4, 5, 6, 7, 8))

app = typer.Typer(add_completion=False)


@app.command()
def run(model: str, cell: str = "", samples: int = 16, widths: str = ",".join(map(str, WIDTHS))) -> None:
    """All budgets of one model, from a fresh file of losses; ``cell`` of experiments/quality.py instead of the best."""
    torch.set_num_threads(1)
    searched = tuple(map(int, widths.split(",")))
    name = cell or BEST[model]
    directory = kept_at(model, name)
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        make(model, name, CELLS[name].rates[0], 0, directory)
    (directory / SIDECAR).unlink(missing_ok=True)
    stream = held_out(model)[0]
    reference = float_log_perplexity(model)
    with open_losses(directory, [SETTINGS[model].text], samples=samples, seq_len=CONTEXT) as losses:
        checkpoint = losses.checkpoint

        def measure(plan: Mapping[str, int]) -> dict[str, Any]:
            losses.model.set_bits(plan=plan)
            return {
                "bits_per_weight": bits_per_weight(checkpoint, plan),
                "held_out": log_perplexity(losses.model, stream, context=CONTEXT),
                "bits": "".join(map(str, plan.values())),
            }

        uniform = {str(bits): measure(dict.fromkeys(checkpoint.shapes, bits)) for bits in WIDTHS}

        def search(budget: Budget) -> dict[str, Any]:
            found = {}
            for name, fused in ((SEARCH, True), (FREE, False)):
                plan, facts = make_plan(checkpoint, budget, widths=searched, losses=losses, fused=fused)
                found[name] = {**measure(plan), **{key: facts[key] for key in ("loss", "evaluations", "seconds")}}
            return found

        budgets: dict[str, Any] = {}
        for bits in BUDGETS:
            budget = bits_budget(checkpoint, bits, widths=searched)
            budgets[str(bits)] = {"interpolated": interpolate(bits, uniform), **search(budget)}
            for strategy in STRATEGIES:
                plan, facts = make_plan(checkpoint, budget, strategy=strategy, widths=PAPER_WIDTHS, losses=losses)
                budgets[str(bits)][strategy] = {**measure(plan), "loss": facts["loss"]}
            print(bits, json.dumps(budgets[str(bits)], sort_keys=True), flush=True)
            record: dict[str, Any] = {
                "cell": name,
                "trained": checkpoint.spec.widths,
                "uniform": uniform,
                "budgets": budgets,
            }
            record |= {"float": reference, "samples": samples}
            _write(f"{model}, {name}", record)
        smaller = bits_budget(checkpoint, uniform["4"]["bits_per_weight"] - LESS, widths=searched)
        record["smaller_than_int4"] = search(smaller)
        _write(f"{model}, {name}", record)
    print(json.dumps(record, sort_keys=True))


def interpolate(bits: float, uniform: Mapping[str, Mapping[str, float]]) -> float:
    """Held-out log-perplexity interpolated from the uniform widths around ``bits``."""
    points = sorted((point["bits_per_weight"], point["held_out"]) for point in uniform.values())
    return float(np.interp(bits, [size for size, _ in points], [value for _, value in points]))


@app.command()
def growth() -> None:
    """A first search of random models: evaluations and seconds against depth and widths."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for layers in DEPTHS:
            directory = _random_checkpoint(Path(folder) / str(layers), layers)
            tokens = np.random.default_rng(0).integers(0, 256, size=(4, 65))
            for widths in WIDTH_SETS:
                (directory / SIDECAR).unlink(missing_ok=True)
                with Losses(open_checkpoint(directory), tokens) as losses:
                    budget = bits_budget(losses.checkpoint, 4.5, widths=widths)
                    losses.measure(dict.fromkeys(losses.paths, 3))  # the model is loaded
                    began, cpu_s = time.perf_counter(), time.process_time()
                    facts = make_plan(losses.checkpoint, budget, widths=widths, losses=losses)[1]
                    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
                row = {"layers": layers, "widths": len(widths), "evaluations": facts["evaluations"]}
                row |= {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_s, 2)}
                rows.append({**row, "evolution": EVOLUTION, "fewer": round(EVOLUTION / facts["evaluations"], 1)})
                print(json.dumps(rows[-1]), flush=True)
    _write("growth", {"rows": rows})
    print(json.dumps(rows))


def _random_checkpoint(directory: Path, layers: int) -> Path:
    source = SETTINGS["stories260K"].path
    config = transformers.AutoConfig.from_pretrained(source, num_hidden_layers=layers)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory / "float")
    for file in source.glob("token*"):
        shutil.copy(file, directory / "float")
    return matquant.quantize(directory / "float", directory / "out", method="rtn", group_size=None)


def _write(part: str, record: dict[str, Any]) -> None:
    kept = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    kept[part] = {**origin("torch", "transformers", "numpy"), **record}
    assert all(math.isfinite(value) for value in _numbers(kept))
    RECORD.write_text(json.dumps(kept, sort_keys=True, indent=1) + "\n")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, (dict, list, tuple)):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in _numbers(item)]
    return [value] if isinstance(value, float) else []


if __name__ == "__main__":
    app()
