"""The paper's Figure 2: a width per layer, four strategies, against the uniform widths of the same checkpoint.

    python bench/mix.py MODEL [CELL]

Every number of layers at 2, 4 and 8 bits, ordered along the depth in four ways (MatQuant, App. B): pyramid (narrow at
both ends), reverse pyramid, increasing, decreasing. Writes bench/mix-MODEL.json and docs/mix-MODEL.png.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

import matquant
from matquant.format.read import open_checkpoint
from matquant.format.sizes import bits_per_weight
from matquant.hf_torch.layers import decoder_layers
from matquant.hf_torch.loading import load_float
from matquant.measure.likelihood import log_perplexity
from matquant.planning.strategies import STRATEGIES, mixes
from matquant.report.tables import plot_widths
from origin import ROOT, origin
from quality import CELLS, CONTEXT, SETTINGS, held_out

TOKENS = 40 * CONTEXT


def main(
    model: Annotated[str, typer.Argument(help="stories260K or reference.")],
    cell: Annotated[
        str, typer.Argument(help="The cell of bench/quality.py whose checkpoint is mixed.")
    ] = "gptq+ joint",
) -> None:
    """Evaluate all mixes of one checkpoint."""
    torch.set_num_threads(1)
    setting = SETTINGS[model]
    stream = held_out(model)[0][: TOKENS + 1]
    options = {**setting.training["gptq"], **CELLS[cell].options}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = matquant.quantize(setting.path, Path(folder) / "out", text=[setting.text], **options)
        checkpoint, served = open_checkpoint(out), matquant.load(out, dtype=torch.float32, kernels="none")
    layers = [name for name, _ in decoder_layers(served)]

    def measure(name: str, by_layer: Sequence[int]) -> None:
        plan = {
            path: width
            for layer, width in zip(layers, by_layer, strict=True)
            for path in checkpoint.shapes
            if path.startswith(f"{layer}.")
        }
        served.set_bits(8, plan=plan)
        bits, values = curves.setdefault(name, ([], []))
        bits.append(bits_per_weight(checkpoint, plan))
        values.append(log_perplexity(served, stream, context=CONTEXT))

    for width in (8, 4, 2):
        measure("uniform, trained", [width] * len(layers))
    for width in (6, 3):
        measure("uniform, interpolated", [width] * len(layers))
    for name in STRATEGIES:
        for by_layer in mixes(name, (2, 4, 8), layers=len(layers)).tolist():
            if len(set(by_layer)) > 1:
                measure(name, by_layer)
    reference = log_perplexity(load_float(setting.path, dtype=torch.float32), stream, context=CONTEXT)
    plot_widths(ROOT / "docs" / f"mix-{model}.png", frontiers(curves), reference=reference)
    record = {
        **origin(),
        "cell": cell,
        "model": model,
        "curves": curves,
    }
    (ROOT / "bench" / f"mix-{model}.json").write_text(json.dumps(record, sort_keys=True) + "\n")
    print(json.dumps(record, sort_keys=True))


def frontiers(curves: dict[str, tuple[list[float], list[float]]]) -> dict[str, tuple[list[float], list[float]]]:
    """Of each curve the points that no other of its own beats at fewer bits."""
    result = {}
    for name, (bits, values) in curves.items():
        best: list[tuple[float, float]] = []
        for size, value in sorted(zip(bits, values, strict=True)):
            if not best or value < best[-1][1]:
                best.append((size, value))
        result[name] = ([size for size, _ in best], [value for _, value in best])
    return result


if __name__ == "__main__":
    typer.run(main)
