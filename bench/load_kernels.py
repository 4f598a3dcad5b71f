"""transformers' ``generate`` on dense weights against the native kernels: ``matquant.load(..., kernels=...)``.

    python bench/load_kernels.py CHECKPOINT [--dtype float32 --threads 1 --tokens 8 --rounds 4]
    python bench/load_kernels.py --random 1024,4096,8    # a random Llama of these sizes (hidden, intermediate, layers)

Correctness comes first: the logits of the float kernels must be those of the dense model. Then dense, ``float`` and
``int8`` take turns at every width, so that a change of load meets all of them; figures are medians of their ratios.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import matquant

WIDTHS = (8, 4, 2)
KERNELS = (None, "float", "int8")
PROMPT = torch.arange(5, 21)[None]
REFERENCE = Path(__file__).resolve().parents[1] / "examples" / "reference" / "model"


def quantise_random(hidden: int, intermediate: int, layers: int, *, out: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        vocab_size=4096,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(out / "float")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / "float" / name).write_bytes((REFERENCE / name).read_bytes())
    return matquant.quantize(out / "float", out / "nested", method="rtn", scope="all")


def token_ms(model: Any, tokens: int) -> float:
    """Milliseconds a token of greedy decoding, the prompt of 16 tokens included."""
    start = time.perf_counter()
    model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        **{"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0},
    )
    return (time.perf_counter() - start) / tokens * 1e3


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(PROMPT).logits
    return found


def measure(checkpoint: Path, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """width -> kernels -> ms a token (median) and how many times as fast as dense (median of the rounds)."""
    models = {str(kernels): matquant.load(checkpoint, dtype=dtype, kernels=kernels) for kernels in KERNELS}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for bits in WIDTHS:
        for model in models.values():
            model.set_bits(bits)
        expected = logits(models["None"])
        gap = ((logits(models["float"]) - expected).abs().max() / expected.abs().max()).item()
        assert gap < (1e-5 if dtype == torch.float32 else 0.05), f"float kernels differ by {gap:.1e} at {bits} bits"
        times = [{name: token_ms(model, tokens) for name, model in models.items()} for _ in range(rounds + 1)][1:]
        found[str(bits)] = {
            name: {
                "ms": statistics.median(line[name] for line in times),
                "faster": statistics.median(line["None"] / line[name] for line in times),
            }
            for name in models
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--random", metavar="HIDDEN,INTERMEDIATE,LAYERS")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default in (("threads", 1), ("tokens", 8), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    if (asked.checkpoint is None) == (asked.random is None):
        parser.error("give a checkpoint or --random")
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as directory:
        out = asked.checkpoint or quantise_random(*map(int, asked.random.split(",")), out=Path(directory))
        found = measure(out, getattr(torch, asked.dtype), asked.tokens, asked.rounds)
    table = Table("bits", "weights", "ms a token", "times as fast")
    for bits, line in found.items():
        for name, values in line.items():
            weights = "dense" if name == "None" else f"{name} kernels"
            table.add_row(bits, weights, f"{values['ms']:.1f}", f"{values['faster']:.2f}")
    Console().print(table)
    print(json.dumps({**vars(asked), "checkpoint": str(asked.checkpoint or ""), "widths": found}))


if __name__ == "__main__":
    main()
