"""Peak memory of the methods that work block by block, as a model gets deeper.

    python bench/blocks.py [--layers 4 --layers 8 --layers 16] [--method gptq]

Each depth is a random Llama 2048 wide (ffn 8192, 32 heads, 8 of keys and values, bf16), made once, in a process of its
own whose peak resident memory (Linux VmHWM) is read at the end. Writes bench/blocks.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

from origin import ROOT, origin

TOKENIZER = ROOT / "examples" / "reference" / "model"
TEXT = ROOT / "examples" / "reference" / "text" / "train.txt"
RECORD = ROOT / "bench" / "blocks.json"
GIB = 2**30

WORKER = """
import json, sys, time, torch
from pathlib import Path
from matquant.methods.quantize import quantize
model, out, method, options = sys.argv[1:5]
torch.set_num_threads(1)
began = time.perf_counter()
quantize(model, out, method=method, text=[sys.argv[5]], **json.loads(options))
status = Path("/proc/self/status").read_text()
peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps({"peak_bytes": peak, "seconds": time.perf_counter() - began}))
"""


def main(
    layers: Annotated[list[int] | None, typer.Option(help="Depths to measure.")] = None,
    method: Annotated[str, typer.Option(help="gptq or omniquant.")] = "gptq",
    scope: Annotated[str, typer.Option(help="ffn, attention or linears.")] = "linears",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    seq_len: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
) -> None:
    """Measure and print."""
    options: dict[str, object] = {
        "samples": samples,
        "seq_len": seq_len,
        "objective": "8,4",
        "scope": scope,
        "group_size": None,
    }
    if method == "omniquant":
        options["steps"] = 2
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for depth in layers or (4, 8, 16):
            model = _make_model(Path(folder) / "model", depth)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            out = Path(folder) / "out"
            command = [sys.executable, "-c", WORKER, str(model), str(out), method, json.dumps(options), str(TEXT)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[depth] = json.loads(done.stdout.splitlines()[-1]) | {"model_bytes": size}
            subprocess.run(["rm", "-rf", str(model), str(out)], check=True)
            print(
                f"{depth:3} layers: model {size / GIB:.2f} GiB, peak {results[depth]['peak_bytes'] / GIB:.2f} GiB, "
                f"{results[depth]['seconds']:.0f} s",
                flush=True,
            )
    record = {
        **origin(),
        "method": method,
        "options": options,
        "layers": results,
    }
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(f"wrote {RECORD.relative_to(ROOT)}")


def _make_model(directory: Path, depth: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=depth,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=4096,
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    began = time.perf_counter()
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory, max_shard_size="1GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TOKENIZER / name).read_bytes())
    print(f"made {depth} layers in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return directory


if __name__ == "__main__":
    typer.run(main)
