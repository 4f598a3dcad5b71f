"""The vLLM plugin in vLLM itself: greedy text and log-probabilities are those of our own dense slice.

One process of vllm_run.py does all jobs of this file. Models with experts are in test_vllm_experts.py.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import matquant
from conftest import make_tokenizer
from engines.conftest import REFERENCE
from engines.heads import widen_heads
from engines.vllm_jobs import WIDE, ask, assert_same_text, run_vllm, text_job
from matquant.core.spec import Plan
from matquant.export import export
from matquant.format.read import Checkpoint, open_checkpoint

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
PLAN = {
    **{f"model.layers.0.self_attn.{name}_proj": 3 for name in "qkv"},
    **{f"model.layers.0.mlp.{name}_proj": 8 for name in ("gate", "up")},
    "model.layers.1.mlp.down_proj": 2,
}
SPLIT = {  # different widths in what vLLM stacks
    "model.layers.0.self_attn.q_proj": 8,
    "model.layers.0.self_attn.v_proj": 2,
    "model.layers.0.mlp.gate_proj": 3,
    "model.layers.1.mlp.up_proj": 6,
}
OTHERS: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: transformers.Qwen2Config(**WIDE),  # biases
    "phi3": lambda: transformers.Phi3Config(**WIDE),  # fused on disk
    "gemma2": lambda: transformers.Gemma2Config(**WIDE),
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"bits": bits}) for name in ("stories", "reference") for bits in (8, 6, 4, 3, 2)),
    *((name, {"bits": 4, "plan": PLAN}) for name in ("stories", "reference", "round", "extra")),
    *((name, {"bits": bits}) for name in ("round", "extra") for bits in (8, 2)),
    *((name, {"bits": 4, "plan": SPLIT}) for name in ("stories", "round")),
    ("top", {"bits": 3}),
    *((family, {"bits": 3}) for family in OTHERS),
]
EVERY: list[dict[str, Any]] = [*({"bits": bits} for bits in (8, 6, 3, 2)), {"bits": 4, "plan": SPLIT}]
# Checkpoints served from planes, by the operator's reference on a CPU: the first widths, and those switched to.
PLANES: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("stories", {"bits": 4}, EVERY),
    ("companded", {"bits": 4, "plan": SPLIT}, [{"bits": 3}, {"bits": 2}]),
    ("top", {"bits": 3, "max_bits": 3}, [{"bits": 2}]),
    ("fused", {"bits": 3}, [{"bits": 8}]),
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
    ("stories", {"kernels": "fast"}, "quantization_config has kernels='fast'; use one of auto, planes, dense"),
    ("stories", {"bits": 6, "max_bits": 4}, "is to have 6 bits, and max_bits=4 are in memory; use a larger max_bits"),
    (
        "round",
        {"bits": 4, "kernels": "planes"},
        "kernels='planes' cannot hold model.layers.0.self_attn.qkv_proj: rule 'round' rounds, which needs a bit more "
        "than a width has; GPU planes are read by 'prefix'; use kernels 'auto' or 'dense'",
    ),
    ("float", {"bits": 4}, "has no matquant_manifest.json; give a checkpoint made by matquant quantize"),
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
    quantise("companded", REFERENCE / "model", grid="companded", zero_point="midrange", group_size=64)
    export(found["stories"], root / "top", to="matquant", bits=3)
    found["top"] = root / "top"
    for family, config in OTHERS.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config()).save_pretrained(root / f"{family}-float")
        make_tokenizer().save_pretrained(root / f"{family}-float")
        quantise(family, root / f"{family}-float")
    quantise("fused", root / "phi3-float", group_size=None)
    return found


@pytest.fixture(scope="module")
def answers(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says to every case and mistake, by its JSON."""
    asked_of = [(name, asked, list[Any](), False) for name, asked in (*CASES, *((n, a) for n, a, _ in MISTAKES))]
    asked_of += [(name, {**asked, "kernels": "planes"}, later, False) for name, asked, later in PLANES]
    asked_of += [
        ("stories", {"bits": 4, "kernels": "planes"}, [{"bits": 2}], True),
        ("stories", {}, [{"bits": 2}], False),
    ]
    jobs = [text_job(models[name], asked, switch=later, compiled=done) for name, asked, later, done in asked_of]
    found = ask(jobs, tmp_path_factory.mktemp("plugins"))
    return {key(*case): answer for case, answer in zip(asked_of, found, strict=True)}


def key(name: str, asked: dict[str, Any], later: Sequence[Any] = (), compiled: bool = False) -> str:
    """The name of an answer."""
    return json.dumps([name, asked, list(later), compiled])


@pytest.mark.parametrize(("name", "asked"), CASES, ids=[f"{name}-{asked}" for name, asked in CASES])
def test_vllm_serves_our_slice(
    name: str, asked: dict[str, Any], models: dict[str, Path], answers: dict[str, Any]
) -> None:
    answer = answers[key(name, asked)]
    assert "error" not in answer, answer["error"]
    model = matquant.load(models[name], kernels="none", dtype=torch.float32, **asked)
    assert_same_text(answer, model, models[name])
    model.set_bits(asked["bits"] - 1)
    with pytest.raises(AssertionError, match="log-probabilities differ"):
        assert_same_text(answer, model, models[name])


@pytest.mark.parametrize(("name", "asked", "message"), MISTAKES)
def test_mistakes_are_refused(name: str, asked: dict[str, Any], message: str, answers: dict[str, Any]) -> None:
    assert message in answers[key(name, asked)]["error"]


@pytest.mark.parametrize(("name", "asked", "later"), PLANES, ids=[name for name, *_ in PLANES])
def test_planes_are_switched_in_place(
    name: str, asked: dict[str, Any], later: list[dict[str, Any]], models: dict[str, Path], answers: dict[str, Any]
) -> None:
    answer = answers[key(name, {**asked, "kernels": "planes"}, later)]
    assert "error" not in answer, answer["error"]
    model = matquant.load(models[name], kernels="none", dtype=torch.float32)
    for widths, found in zip([asked, *later], [answer, *answer["switched"]], strict=True):
        model.set_bits(widths["bits"], plan=widths.get("plan"))
        assert_same_text(found, model, models[name])
        model.set_bits(widths["bits"] - 1)
        with pytest.raises(AssertionError, match="log-probabilities differ"):
            assert_same_text(found, model, models[name])


def test_a_compiled_model_switches_too(models: dict[str, Path], answers: dict[str, Any]) -> None:
    answer = answers[key("stories", {"bits": 4, "kernels": "planes"}, [{"bits": 2}], compiled=True)]
    assert "error" not in answer, answer["error"]
    model = matquant.load(models["stories"], kernels="none", dtype=torch.float32)
    for bits, found in ((4, answer), (2, answer["switched"][0])):
        model.set_bits(bits)
        assert_same_text(found, model, models["stories"])


def test_dense_weights_are_not_switched(answers: dict[str, Any]) -> None:
    (found,) = answers[key("stories", {}, [{"bits": 2}])]["switched"]
    assert found["error"] == (
        "the weights of model.layers.0.self_attn.qkv_proj are dense, so that their width is fixed; "
        "start vLLM again with these bits or this plan"
    )


PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHAPE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
RANKS: dict[str, tuple[str, dict[str, Any]]] = {
    "planes": ("companded", {"bits": 4, "kernels": "planes"}),
    "planes, plan": ("companded", {"bits": 4, "plan": SPLIT, "kernels": "planes"}),
    "planes, per channel": ("stories", {"bits": 3, "kernels": "planes"}),
    "planes of int4": ("companded", {"bits": 2, "kernels": "planes", "max_bits": 4}),
    "dense": ("companded", {"bits": 4, "plan": SPLIT}),
    "cut": ("wide", {"bits": 4, "kernels": "planes"}),
    "cut, dense": ("wide", {"bits": 4}),
}


@pytest.fixture(scope="module")
def ranks(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What two ranks compute together, of every case in RANKS."""
    folder = tmp_path_factory.mktemp("ranks")
    matquant.quantize(REFERENCE / "model", folder / "wide", method="rtn", scope="linears", group_size=256)
    found = {**models, "wide": folder / "wide"}
    configs = {name: open_checkpoint(found[model]).config for name, (model, _) in RANKS.items()}
    job = {
        "cases": {
            name: {"model": str(found[model]), "asked": {"quant_method": "matquant", **asked}}
            for name, (model, asked) in RANKS.items()
        },
        "shapes": {name: {part: config[part] for part in SHAPE} for name, config in configs.items()},
        "packed": PARTS,
    }
    (folder / "job.json").write_text(json.dumps(job))
    run_vllm("vllm_ranks.py", folder, folder=folder)
    return folder, json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("name", [name for name in RANKS if name != "cut"])
def test_two_ranks_are_the_whole_layer(name: str, models: dict[str, Path], ranks: tuple[Path, Any]) -> None:
    folder, result = ranks
    model, asked = RANKS[name]
    checkpoint = open_checkpoint(folder / "wide" if model == "wide" else models[model])
    bits = checkpoint.widths(Plan.over(asked["bits"], asked.get("plan")))
    tensors = load_file(folder / f"{name}.safetensors")
    for module, bytes_ in result[name].items():
        x, y = (torch.from_numpy(tensors[f"{module}.{part}"]).double() for part in "xy")
        parent, _, last = module.rpartition(".")
        paths = [f"model.layers.0.{parent}.{part}" for part in PARTS.get(last, [last])]
        dense = torch.from_numpy(np.concatenate([checkpoint.nested(path).read(bits[path]) for path in paths])).double()
        limit = x.abs() @ dense.abs().T * 16 * 2.0**-24
        assert bool(((y - x @ dense.T).abs() <= limit).all()), module
        other = torch.from_numpy(np.concatenate([checkpoint.nested(path).read(bits[path] - 1) for path in paths]))
        assert bool(((y - x @ other.double().T).abs() > limit).any(-1).all()), module
        if asked.get("kernels") == "planes":
            ways = 2 if last in PARTS else 1
            sizes = [checkpoint.shapes[path][0] // ways for path in paths]
            columns = x.shape[1] * ways // 2
            assert bytes_ == [memory(checkpoint, sizes, columns, max_bits=asked.get("max_bits", 8))] * 2


def memory(checkpoint: Checkpoint, sizes: Sequence[int], columns: int, *, max_bits: int) -> int:
    """Bytes of planes, scales and zero-points of a rank, and of what says how to read each width, and at which."""
    tables = 1 + sum(bits <= max_bits for bits in checkpoint.spec.slices)
    groups, all_columns = columns // (checkpoint.spec.group_size or columns), -(-columns // 256) * 256
    stacked = [[size] for size in sizes] if any(size % 64 for size in sizes[:-1]) else [sizes]
    total = 0
    for product in stacked:
        rows = -(-sum(product) // 64) * 64
        total += rows * all_columns * max_bits // 8 + 4 * tables * rows * groups
        total += 4 * 9 * 6 + 4 * (rows // 64 if len(product) > 1 else 1)
    return total


def test_a_cut_group_is_refused_or_dense(ranks: tuple[Path, Any]) -> None:
    _, result = ranks
    assert result["cut"]["error"] == (
        "kernels='planes' cannot hold model.layers.0.self_attn.o_proj: tensor parallelism leaves a rank 128 inputs, "
        "which cuts a group of 256; use kernels 'auto' or 'dense'"
    )
