"""Evaluation on the native engine against float32 torch: speed, and the error of int8 activations.

    python bench/evaluate.py CHECKPOINT --text FILE [--seq-len 1024 --tokens 2048 --rounds 2 --bits 8,4,2 --threads 1]

Both engines take turns on the same sequences, so that a change of load meets both; seconds are of the processor, not of
the clock. Then both take all --error-tokens at every width: the difference of their log-perplexities is the error.
The last line is JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from matquant.core.planes import isa
from matquant.core.spec import Plan
from matquant.format.read import open_checkpoint
from matquant.hf.text import read_documents
from matquant.measure import with_engine, with_torch
from matquant.measure.windows import Windows, cut
from origin import origin


def scorer(model: Any, windows: Windows) -> Callable[[int], tuple[float, float]]:
    """Return a function: width -> log-perplexity, processor seconds."""

    def score(bits: int) -> tuple[float, float]:
        began = time.process_time()
        plans = {str(bits): Plan(default=bits)}
        ((_, found),) = model.measure(plans, windows, kept=None, report=lambda stage, done, total: None)
        return found["ppl"], time.process_time() - began

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", default="8,4,2")
    defaults = {"seq-len": 1024, "tokens": 2048, "error-tokens": 0, "rounds": 2, "threads": 1}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    torch.set_num_threads(asked.threads)
    checkpoint = open_checkpoint(asked.checkpoint)
    stream = with_engine.read_stream(asked.checkpoint, checkpoint, read_documents([asked.text]))
    np.testing.assert_array_equal(
        stream, with_torch.read_stream(asked.checkpoint, checkpoint, read_documents([asked.text]))
    )
    models: dict[str, Any] = {"torch": with_torch.TorchModel(asked.checkpoint, device="cpu", dtype=torch.float32)}
    models["native"] = with_engine.EngineModel(asked.checkpoint, device=None)
    widths = [int(width) for width in asked.bits.split(",")]
    timed = {name: scorer(m, cut(stream[: asked.tokens + 1], context=asked.seq_len)) for name, m in models.items()}
    rounds = [{name: timed[name](widths[0])[1] for name in models} for _ in range(asked.rounds)]
    ratio = statistics.median(line["torch"] / line["native"] for line in rounds)
    speed = {name: asked.tokens / statistics.median(line[name] for line in rounds) for name in models}
    whole = cut(stream[: (asked.error_tokens or asked.tokens) + 1], context=asked.seq_len)
    losses = {str(bits): {name: scorer(model, whole)(bits)[0] for name, model in models.items()} for bits in widths}
    table = Table("width", "torch", "native", "difference", title=f"log-perplexity, {whole.predicted:,} tokens")
    for bits, line in losses.items():
        values = (line["torch"], line["native"], line["native"] - line["torch"])
        table.add_row(f"int{bits}", *(f"{value:.4f}" for value in values))
    Console().print(table)
    print(f"tokens per second of processor time: {speed}; native is {ratio:.2f} times as fast")
    sizes = {"threads": asked.threads, "tokens": asked.tokens, "context": asked.seq_len, "rounds": asked.rounds}
    record = {**origin("torch", "transformers", "matquant"), "isa": isa(), **sizes, "tok_s": speed, "faster": ratio}
    print(json.dumps({**record, "log_perplexity": losses}, sort_keys=True))


if __name__ == "__main__":
    main()
