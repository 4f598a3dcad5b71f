"""vLLM's fused experts through the plugin: greedy text and log-probabilities are those of our own dense slice.

One process of vllm_run.py does all jobs but that of two ranks, which starts two processes more.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import matquant
from conftest import make_tokenizer
from engines.vllm_jobs import WIDE, ask, assert_same_text, run_vllm, text_job
from matquant.core.spec import Plan
from matquant.format.read import open_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
FEW = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**WIDE, **FEW, moe_intermediate_size=64),
    "mixtral": lambda: transformers.MixtralConfig(**WIDE, **LOCAL),  # w1, w2, w3
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **WIDE, **FEW, moe_intermediate_size=64, shared_expert_intermediate_size=64
    ),
    # all experts in one tensor; in gpt-oss with rows of gate and up in turn, of which vLLM's CPU build wants whole 32
    "granitemoe": lambda: transformers.GraniteMoeConfig(**WIDE, **LOCAL),
    "gpt_oss": lambda: transformers.GptOssConfig(**{**WIDE, "intermediate_size": 64}, **LOCAL),
}
PLAN = "plan"  # stands for a plan in which neighbouring matrices, and so every expert, have other widths
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("qwen3_moe", {"bits": bits}) for bits in (8, 2)),
    *((family, {"bits": 4, "plan": PLAN}) for family in FAMILIES),
    ("floats", {"bits": 3}),
    ("partly", {"bits": 3}),
]
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    (
        "qwen3_moe",
        {"bits": 4, "kernels": "planes"},
        "kernels='planes' cannot hold the experts in model.layers.0.mlp.experts; use kernels 'auto' or 'dense'",
    ),
    (
        "qwen3_moe",
        {"plan": {"model.layers.0.mlp.experts.7.up_proj": 2}},
        "which is not there: model.layers.0.mlp has the experts 0 to 3",
    ),
]


def widths(model: Path, asked: dict[str, Any], *, shift: int = 0) -> dict[str, Any]:
    """The overrides ``asked``, with PLAN replaced by a plan for this model; another ``shift`` gives other widths."""
    if asked.get("plan") != PLAN:
        return asked
    experts = [path for path in sorted(open_checkpoint(model).shapes) if ".experts." in path]
    return {**asked, "plan": {path: (2, 4, 8, 3, 6)[(number + shift) % 5] for number, path in enumerate(experts)}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every checkpoint of this file, by name: "floats" has float experts, "partly" gate and up of one layer."""
    root = tmp_path_factory.mktemp("experts")
    found: dict[str, Path] = {}

    def quantise(name: str, source: Path, **options: Any) -> None:
        found[name] = matquant.quantize(source, root / name, method="rtn", scope="linears", **options)

    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(root / f"{family}-float")
        make_tokenizer().save_pretrained(root / f"{family}-float")
        quantise(family, root / f"{family}-float")
    quantise("floats", root / "qwen3_moe-float", exclude=["experts"])
    quantise("partly", root / "qwen3_moe-float", exclude=[r"0\.mlp\.experts\.\d+\.(gate|up)_proj"])
    return found


@pytest.fixture(scope="module")
def answers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What vLLM says to every case, then to every mistake, then to a switch of dense experts."""
    jobs = [text_job(models[name], widths(models[name], asked)) for name, asked in CASES]
    jobs += [text_job(models[name], asked) for name, asked, _ in MISTAKES]
    jobs.append(text_job(models["qwen3_moe"], {"bits": 4}, switch=[{"bits": 2}]))
    return ask(jobs, tmp_path_factory.mktemp("plugins"))


def assert_only_this_width(answer: dict[str, Any], model: Path, asked: dict[str, Any]) -> None:
    """The answer is that of our slice, and not that of neighbouring widths, nor of a plan with widths moved on."""
    assert "error" not in answer, answer["error"]
    loaded = matquant.load(model, kernels="none", dtype=torch.float32, **widths(model, asked))
    assert_same_text(answer, loaded, model)
    other = widths(model, asked, shift=1) if "plan" in asked else {"bits": asked["bits"] - 1}
    loaded.set_bits(other["bits"], plan=other.get("plan"))
    with pytest.raises(AssertionError, match="log-probabilities differ"):
        assert_same_text(answer, loaded, model)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{name}-{asked}" for name, asked in CASES])
def test_vllm_serves_experts_of_our_slice(number: int, models: dict[str, Path], answers: list[dict[str, Any]]) -> None:
    name, asked = CASES[number]
    assert_only_this_width(answers[number], models[name], asked)


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_refused(number: int, answers: list[dict[str, Any]]) -> None:
    assert MISTAKES[number][2] in answers[len(CASES) + number]["error"]


def test_dense_experts_are_not_switched(answers: list[dict[str, Any]]) -> None:
    (found,) = answers[-1]["switched"]
    assert "are dense, so that their width is fixed" in found["error"]


def test_two_processes_share_the_experts(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # there may be fewer cores than processes
    model, asked = models["qwen3_moe"], {"bits": 4, "plan": PLAN}
    (answer,) = ask([text_job(model, widths(model, asked), options={"tensor_parallel_size": 2})], tmp_path)
    assert_only_this_width(answer, model, asked)


@pytest.fixture(scope="module")
def ranks(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """What each of two ranks loads of a layer: the folder of vllm_expert_ranks.py, the layer, and what was asked."""
    folder, model = tmp_path_factory.mktemp("ranks"), models["qwen3_moe"]
    asked, config = widths(model, {"bits": 4, "plan": PLAN}), open_checkpoint(model).config
    job = {
        "model": str(model),
        "asked": {"quant_method": "matquant", **asked},
        "prefix": "model.layers.1.mlp.experts",
        "experts": FEW["num_experts"],
        "hidden": config["hidden_size"],
        "inner": config["moe_intermediate_size"],
    }
    (folder / "job.json").write_text(json.dumps(job))
    run_vllm("vllm_expert_ranks.py", folder, folder=folder)
    return folder, job["prefix"], asked


@pytest.mark.parametrize("way", ["tensor", "expert"])
def test_each_rank_loads_its_part_of_the_slice_bit_for_bit(
    way: str, models: dict[str, Path], ranks: tuple[Path, str, dict[str, Any]]
) -> None:
    folder, prefix, asked = ranks
    checkpoint = open_checkpoint(models["qwen3_moe"])
    bits = checkpoint.widths(Plan.over(asked["bits"], asked["plan"]))
    weights = {path: torch.from_numpy(checkpoint.nested(path).read(width)) for path, width in bits.items()}
    for rank in range(2):
        found = load_file(folder / f"{way}-{rank}.safetensors")
        local = range(4) if way == "tensor" else range(2 * rank, 2 * rank + 2)
        for place, expert in enumerate(local):
            parts = {name: weights[f"{prefix}.{expert}.{name}_proj"].bfloat16() for name in ("gate", "up", "down")}
            if way == "tensor":
                cut = slice(32 * rank, 32 * rank + 32)
                parts = {name: part[:, cut] if name == "down" else part[cut] for name, part in parts.items()}
            assert torch.equal(found["w13"][place], torch.cat([parts["gate"], parts["up"]]))
            assert torch.equal(found["w2"][place], parts["down"])


def test_balanced_experts_are_refused(ranks: tuple[Path, str, dict[str, Any]]) -> None:
    assert json.loads((ranks[0] / "result.json").read_text())["error"] == (
        "vLLM is to balance the experts of model.layers.1.mlp.experts (enable_eplb), which copies them; "
        "the plugin does not support that: start vLLM without it"
    )
