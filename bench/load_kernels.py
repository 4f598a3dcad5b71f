"""transformers' ``generate`` and prompts on dense weights against the native kernels of ``matquant.load``.

    python bench/load_kernels.py CHECKPOINT [--dtype float32 --threads 1 --tokens 8 --rounds 4]
    python bench/load_kernels.py --random 1024,4096,8    # a random Llama of these sizes (hidden, intermediate, layers)

Correctness comes first: the logits of the float kernels must be those of the dense model. Then dense, ``float`` and
``int8`` take turns at every width, so that a change of load meets all of them; figures are medians of their ratios.
A record per command goes to bench/load_kernels.json; --no-keep only prints it.
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
from matquant.core import planes
from origin import ROOT, origin

WIDTHS = (8, 4, 2)
KERNELS = ("none", "float", "int8")
PROMPT = torch.arange(5, 21)[None]
LONG = torch.arange(5, 517)[None]
REFERENCE = ROOT / "examples" / "reference" / "model"
RECORDS = ROOT / "bench" / "load_kernels.json"


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
    return matquant.quantize(out / "float", out / "nested", method="rtn", group_size=None)


def token_ms(model: Any, tokens: int) -> float:
    """Milliseconds a token of greedy decoding, the prompt of 16 tokens included."""
    start = time.perf_counter()
    model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        **{"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0},
    )
    return (time.perf_counter() - start) / tokens * 1e3


def prompt_ms(model: Any) -> float:
    """Milliseconds of one forward of a prompt of 512 tokens."""
    start = time.perf_counter()
    with torch.no_grad():
        model(LONG, use_cache=False)
    return (time.perf_counter() - start) * 1e3


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(PROMPT).logits
    return found


def measure(checkpoint: Path, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """width -> kernels -> ms a token and of a prompt (medians), and how many times as fast as dense (of the rounds)."""
    models = {kernels: matquant.load(checkpoint, dtype=dtype, kernels=kernels) for kernels in KERNELS}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for bits in WIDTHS:
        for model in models.values():
            model.set_bits(bits)
        expected = logits(models["none"])
        gap = ((logits(models["float"]) - expected).abs().max() / expected.abs().max()).item()
        assert gap < (1e-5 if dtype == torch.float32 else 0.05), f"float kernels differ by {gap:.1e} at {bits} bits"
        works = {"token": lambda model: token_ms(model, tokens), "prompt": prompt_ms}
        lines = [
            {(work, name): run(model) for work, run in works.items() for name, model in models.items()}
            for _ in range(rounds + 1)
        ][1:]
        found[str(bits)] = {name: {} for name in models}
        for work, name in lines[0]:
            ratios = [line[work, "none"] / line[work, name] for line in lines]
            found[str(bits)][name][f"{work}_ms"] = statistics.median(line[work, name] for line in lines)
            found[str(bits)][name][f"{work}_faster"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--random", metavar="HIDDEN,INTERMEDIATE,LAYERS")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    for name, default in (("threads", 1), ("tokens", 8), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True)
    asked = parser.parse_args()
    if (asked.checkpoint is None) == (asked.random is None):
        parser.error("give a checkpoint or --random")
    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as directory:
        out = asked.checkpoint or quantise_random(*map(int, asked.random.split(",")), out=Path(directory))
        found = measure(out, getattr(torch, asked.dtype), asked.tokens, asked.rounds)
    table = Table("bits", "weights", "ms a token", "times as fast", "ms a prompt of 512", "times as fast")
    for bits, line in found.items():
        for name, values in line.items():
            weights = "dense" if name == "none" else f"{name} kernels"
            figures = [f"{values[f'{work}_{what}']:.2f}" for work in ("token", "prompt") for what in ("ms", "faster")]
            table.add_row(bits, weights, *figures)
    Console().print(table)
    made = {**origin("torch", "transformers", "matquant"), "isa": planes.isa()}
    sizes = {"dtype": asked.dtype, "threads": asked.threads, "tokens": asked.tokens, "rounds": asked.rounds}
    record = {**made, **sizes, "model": asked.random or str(asked.checkpoint), "widths": found}
    if asked.keep:
        kept = json.loads(RECORDS.read_text()) if RECORDS.is_file() else {}
        RECORDS.write_text(
            json.dumps({**kept, f"{record['model']} {asked.dtype}": record}, indent=1, sort_keys=True) + "\n"
        )
    print(json.dumps(record, sort_keys=True))


if __name__ == "__main__":
    main()
