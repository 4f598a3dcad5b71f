"""Layers with experts in the native decode step: against transformers with the same slices, their invariances, errors.

Every family is also in the tables of tests/test_runtime.py.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import matquant
from conftest import HEADS, SMALL
from matquant import _native
from matquant.format.read import open_checkpoint
from matquant.format.write import write_checkpoint
from matquant.hf.architecture import read_architecture
from test_runtime import IDS, assert_same_logits, checkpoints, native_logits, one_by_one, transformers_logits

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Two threads keep what they write from gate and up to the input of down.
WHOLE = {"hidden_size": 128, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 256}
CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral, all experts": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=2),
    "qwen3_moe, one expert": lambda: transformers.Qwen3MoeConfig(
        **SMALL, **HEADS, **{**EXPERTS, "num_experts_per_tok": 1}, decoder_sparse_step=2
    ),
    "qwen2_moe, renormalised": lambda: transformers.Qwen2MoeConfig(
        **SMALL, **EXPERTS, shared_expert_intermediate_size=40, norm_topk_prob=True
    ),
    "qwen2_moe, whole shares": lambda: transformers.Qwen2MoeConfig(**{**SMALL, **EXPERTS, **WHOLE}),
}
PLAIN = "qwen2_moe, renormalised"


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return checkpoints(tmp_path_factory.mktemp("experts"), CONFIGS)


def rewritten(source: Path, out: Path, config: dict[str, Any] | None = None, skip: str = "", **tensors: Any) -> Path:
    """A copy of a checkpoint with other entries in config.json, without one tensor, or with other tensors."""
    opened = open_checkpoint(source)
    items = {path: opened.nested(path) for path in opened.shapes}
    items |= {name: opened.array(name) for name in opened.plain_names()} | tensors
    items.pop(skip, None)
    config = {**opened.config, **(config or {})}
    write_checkpoint(out, items.items(), spec=opened.spec, config=config, ignore=opened.ignore, files={})
    return out


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize(
    "case", [case if case == PLAIN else pytest.param(case, marks=pytest.mark.slow) for case in CONFIGS]
)
def test_logits_are_those_of_transformers(case: str, checkpoint_of: Callable[..., Path]) -> None:
    directory = checkpoint_of(case)
    engine = matquant.Engine(directory, activations="float", threads=1)
    model = matquant.load(directory, dtype=torch.float32, kernels="none")
    for bits in (8, 3):
        model.set_bits(bits)
        expected = transformers_logits(model, IDS)
        assert_same_logits(native_logits(engine, IDS, bits), expected, 1e-5)
        with pytest.raises(AssertionError, match="logits differ"):
            assert_same_logits(native_logits(engine, IDS, bits - 1), expected)


def test_each_expert_has_its_width(checkpoint_of: Callable[..., Path]) -> None:
    directory = checkpoint_of(PLAIN)
    plan = {f"model.layers.1.mlp.experts.{e}.{name}_proj": 8 for e in (1, 4) for name in ("gate", "up", "down")}
    engine = matquant.Engine(directory, activations="float", threads=1)
    expected = transformers_logits(matquant.load(directory, 2, plan=plan, dtype=torch.float32, kernels="none"), IDS)
    assert_same_logits(native_logits(engine, IDS, 2, plan), expected, 1e-5)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(native_logits(engine, IDS, 2), expected)


@pytest.mark.parametrize("exclude", ["experts", pytest.param("shared_expert", marks=pytest.mark.slow)])
def test_experts_that_are_not_quantised_are_read(exclude: str, checkpoint_of: Callable[..., Path]) -> None:
    directory = checkpoint_of(PLAIN, exclude=[exclude])
    engine = matquant.Engine(directory, activations="float", threads=1)
    model = matquant.load(directory, 3, dtype=torch.float32, kernels="none")
    assert_same_logits(native_logits(engine, IDS, 3), transformers_logits(model, IDS), 1e-5)
    np.testing.assert_array_equal(native_logits(engine, IDS, 3), one_by_one(engine, IDS, 3))


# ---------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("case", [PLAIN, "qwen2_moe, whole shares"])
@pytest.mark.parametrize("activations", ["int8", pytest.param("float", marks=pytest.mark.slow)])
def test_a_token_has_the_same_logits_in_any_prompt_batch_and_team(
    activations: str, case: str, checkpoint_of: Callable[..., Path]
) -> None:
    directory, ids = checkpoint_of(case), IDS[:12]
    alone = one_by_one(matquant.Engine(directory, activations=activations, threads=1), ids, 3)
    for threads in (1, 2, 3):
        engine = matquant.Engine(directory, activations=activations, threads=threads)
        np.testing.assert_array_equal(native_logits(engine, ids, 3), alone)
        np.testing.assert_array_equal(one_by_one(engine, ids, 3), alone)
    native, exact, widths = engine.model.native, activations == "float", engine.widths(3)
    caches = [_native.Cache(native, 16, exact) for _ in range(3)]
    workspace, logits = _native.Workspace(native, 3, 16, 2), np.empty((3, SMALL["vocab_size"]), np.float32)
    for position, token in enumerate(ids):  # the same sequence twice, and beside it another one
        _native.step(native, widths, exact, [token, 7, token], [position] * 3, caches, 0, logits, workspace)
        np.testing.assert_array_equal(logits[[0, 2]], alone[[position, position]])


def test_planes_of_experts_come_and_go(checkpoint_of: Callable[..., Path]) -> None:
    engine = matquant.Engine(checkpoint_of(PLAIN), threads=1)
    plan = {"model.layers.0.mlp.experts.5.up_proj": 8}
    before = native_logits(engine, IDS, 2, plan)
    narrow = native_logits(engine, IDS, 2)
    engine.evict(2)
    with pytest.raises(matquant.InputError, match=r"bits=8 for .*experts\.5\.up_proj exceeds max_bits=2"):
        engine.widths(2, plan)
    np.testing.assert_array_equal(native_logits(engine, IDS, 2), narrow)
    engine.add_planes()
    np.testing.assert_array_equal(native_logits(engine, IDS, 2, plan), before)


def test_a_draft_at_a_narrower_width_changes_nothing(checkpoint_of: Callable[..., Path]) -> None:
    engine = matquant.Engine(checkpoint_of(PLAIN), threads=1)
    alone = engine.generate("Once", bits=8, max_tokens=12)
    assert engine.generate("Once", bits=8, max_tokens=12, speculate=3) == alone


def test_a_token_reads_its_share_of_the_experts(checkpoint_of: Callable[..., Path]) -> None:
    model = matquant.Engine(checkpoint_of(PLAIN), threads=1).model
    experts = [path for path in model.paths if ".experts." in path]
    assert len(experts) == 2 * 6 * 3
    read = {bits: model.bytes_per_token(np.full(len(model.paths), bits, np.uint8)) for bits in (2, 4)}
    hidden, heads, vocab = 32, 32 * (32 + 16 + 16 + 32), 300 * 32
    codes = 2 * (heads + 2 * 3 * hidden * 24 + 3 * hidden * 40) + vocab  # two of six experts
    assert read[4] - read[2] == codes * 2 // 8


# ------------------------------------------------------------------------------------------------------- configurations

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 16},
    **{"vocab_size": 50, "max_position_embeddings": 64},
}
CLASSES = {
    "mixtral": transformers.MixtralConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}


@pytest.mark.parametrize("family", CLASSES)
def test_default_experts_are_those_of_transformers(family: str) -> None:
    config = CLASSES[family](**SIZES)
    found = read_architecture({"model_type": family, **SIZES}, where="here").experts
    assert found is not None
    assert found.count == getattr(config, "num_experts", None) or config.num_local_experts
    assert found.active == config.num_experts_per_tok
    assert found.intermediate == getattr(config, "moe_intermediate_size", config.intermediate_size)
    assert found.renormalise == getattr(config, "norm_topk_prob", True)
    assert found.shared == getattr(config, "shared_expert_intermediate_size", 0)


@pytest.mark.parametrize(
    "extra", [{}, {"decoder_sparse_step": 2}, {"mlp_only_layers": [1, 4]}, {"decoder_sparse_step": 3}], ids=str
)
def test_the_layers_with_experts_are_those_of_transformers(extra: dict[str, Any]) -> None:
    for family in ("qwen2_moe", "qwen3_moe"):
        values = {**SIZES, **EXPERTS, **extra}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CLASSES[family](**values))
        found = read_architecture({"model_type": family, **values}, where="here")
        expected = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
        assert [found.experts_at(layer) is not None for layer in range(6)] == expected


# --------------------------------------------------------------------------------------------------------------- errors


def test_more_experts_for_a_token_than_there_are(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    out = rewritten(checkpoint_of(PLAIN), tmp_path / "out", {"num_experts_per_tok": 7})
    with pytest.raises(matquant.InputError) as caught:
        matquant.Engine(out)
    assert str(caught.value) == (
        f"{out / 'config.json'} has num_experts_per_tok=7, but a layer has 6 experts to choose from; repair config.json"
    )
    with pytest.raises(matquant.InputError) as caught:
        read_architecture({"model_type": "qwen3_moe", **SIZES, "num_experts": 6}, where="here")
    assert str(caught.value) == "here has num_experts_per_tok=8, but a layer has 6 experts; repair config.json"


@pytest.mark.parametrize(
    ("config", "skip", "message"),
    [
        ({}, "model.layers.1.mlp.experts.3.up_proj", "lacks the tensor model.layers.1.mlp.experts.3.up_proj.weight"),
        ({}, "model.layers.0.mlp.gate.weight", "lacks the tensor model.layers.0.mlp.gate.weight"),
        ({"num_experts": 5}, "", "does not fit its config.json (model.layers.0.mlp.gate.weight is 6 x 32, "),
        ({"num_experts_per_tok": 0}, "", "has num_experts_per_tok=0 in config.json; it must be an integer above 0"),
    ],
    ids=str,
)
def test_experts_that_are_not_there(
    config: dict[str, Any], skip: str, message: str, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    out = rewritten(checkpoint_of(PLAIN), tmp_path / "out", config, skip)
    with pytest.raises(matquant.InputError) as caught:
        matquant.Engine(out)
    assert str(caught.value).startswith(f"{out} {message}")


def test_a_quantised_router(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    router = "model.layers.1.mlp.gate"
    other = open_checkpoint(checkpoint_of(PLAIN)).nested("model.layers.1.mlp.experts.0.gate_proj")
    codes = dataclasses.replace(
        other,
        codes=other.codes[:6],
        scale=other.scale[:6],
        zero=other.zero[:6],
        slices={bits: tuple(part[:6] for part in affine) for bits, affine in other.slices.items()},
    )
    out = rewritten(checkpoint_of(PLAIN), tmp_path / "out", skip=f"{router}.weight", **{router: codes})
    with pytest.raises(matquant.InputError) as caught:
        matquant.Engine(out)
    assert str(caught.value) == (
        f"{out} has a quantised router, {router}; routers stay float: quantise the model again"
    )


def test_a_plan_for_an_expert_that_is_not_there(checkpoint_of: Callable[..., Path]) -> None:
    engine = matquant.Engine(checkpoint_of(PLAIN), threads=1)
    with pytest.raises(matquant.InputError) as caught:
        engine.widths(4, {"model.layers.1.mlp.experts.6.up_proj": 8})
    assert str(caught.value) == (
        "the plan names 'model.layers.1.mlp.experts.6.up_proj', which is not there: "
        "model.layers.1.mlp has the experts 0 to 5"
    )


def test_the_native_layer_rejects_what_does_not_fit() -> None:
    model = _native.Model(
        **{"hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 20},
        **{"norm_eps": 1e-5, "attention_scale": 1.0, "embedding_scale": 1.0, "attention_cap": 0.0, "logit_cap": 0.0},
        gelu=False,
    )

    def dense(rows: int, columns: int) -> _native.Matrix:
        return _native.dense_matrix(np.zeros((rows, columns), np.float32), "float32", None, False)

    attention = [dense(32, 32), dense(16, 32), dense(16, 32), dense(32, 32)]
    gated = [dense(24, 32), dense(24, 32), dense(32, 24)]
    other = [dense(16, 32), dense(16, 32), dense(32, 16)]
    ones = np.ones(32, np.float32)
    norms = [ones, None, ones, None, None, None]
    good = [*attention, dense(2, 32), *gated, *gated]
    for matrices, options, message in (
        (good, {"experts": 2, "active": 3}, "the experts of a token are out of range"),
        (good, {"experts": 2, "active": 0}, "the experts of a token are out of range"),
        (good, {"experts": -1, "active": 1}, "the number of experts is out of range"),
        (good, {"experts": 3, "active": 1}, "a layer has the wrong number of matrices"),
        ([*attention, dense(3, 32), *gated, *gated], {"experts": 2, "active": 1}, "a matrix has the wrong shape"),
        ([*attention, dense(2, 32), *gated, *other], {"experts": 2, "active": 1}, "a matrix has the wrong shape"),
        ([*good, *other, dense(2, 32)], {"experts": 2, "active": 1, "shared": True}, "a matrix has the wrong shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model.add_layer(matrices, norms, 0, -1, **options)
    model.add_layer([*good, *other, dense(1, 32)], norms, 0, -1, experts=2, active=1, shared=True)


def test_a_null_clamp_is_that_of_the_family() -> None:
    config = transformers.GptOssConfig(**SMALL, **HEADS, num_local_experts=5, num_experts_per_tok=2).to_dict()
    found = read_architecture({**config, "swiglu_alpha": None, "swiglu_limit": None}, where=Path("DIR"))
    assert (found.gate_alpha, found.gate_limit) == (1.702, 7.0)
