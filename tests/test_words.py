"""What the vLLM plugin is made of, without vLLM: one width of stored words, its overrides, and what is stacked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import conftest
from cases import each
from matquant.core.spec import Plan
from matquant.export import export
from matquant.format.read import open_checkpoint
from matquant.integrations.words import (
    check_loaded,
    check_widest,
    expert_paths,
    place_in_turn,
    read_kernels,
    read_overrides,
    read_words,
    stacked_paths,
)
from matquant.system.errors import InputError

QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize(
    "options",
    [{}, {"rule": "round", "group_size": 16}, {"rule": "extra", "symmetric": False}, {"scale_dtype": "float32"}],
)
def test_words_are_read_as_the_file_is(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    found = open_checkpoint(conftest.quantize(llama, tmp_path / "out", method="rtn", scope="linears", **options))
    for path in found.shapes:
        words = torch.from_numpy(found.array(f"{path}.weight_packed"))
        for bits in range(1, 9):
            expected = found.nested(path).read(bits)
            np.testing.assert_array_equal(read_words(found, path, words, bits).numpy(), expected)
            other = found.nested(path).read(bits % 8 + 1)
            assert not np.array_equal(read_words(found, path, words, bits).numpy(), other)


def test_blocks_and_dtypes_change_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = open_checkpoint(conftest.quantize(llama, tmp_path / "out", method="rtn", scope="linears", group_size=16))
    path = "model.layers.0.mlp.up_proj"  # 48 x 32
    words = torch.from_numpy(found.array(f"{path}.weight_packed"))
    expected = torch.from_numpy(found.nested(path).read(3))
    for at_once in (1, 32 * 5, 32 * 48, 10**6):
        monkeypatch.setattr("matquant.integrations.words.AT_ONCE", at_once)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(read_words(found, path, words, 3, dtype=dtype), expected.to(dtype))


def test_words_of_fewer_bits_are_read(llama: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(conftest.quantize(llama, tmp_path / "out", method="rtn", scope="linears"))
    export(whole.directory, tmp_path / "top", to="matquant", bits=4)
    found = open_checkpoint(tmp_path / "top")
    for path in found.shapes:
        words = torch.from_numpy(found.array(f"{path}.weight_packed"))
        np.testing.assert_array_equal(read_words(found, path, words, 3).numpy(), whole.nested(path).read(3))


def test_a_part_of_the_words_is_not_taken_for_all(llama: Path, tmp_path: Path) -> None:
    found = open_checkpoint(conftest.quantize(llama, tmp_path / "out", method="rtn", scope="linears"))
    path = next(iter(found.shapes))
    words = torch.from_numpy(found.array(f"{path}.weight_packed"))
    with pytest.raises(AssertionError, match="rows, given"):
        read_words(found, path, words[:-1], 4)


def test_stacked_weights_are_named_in_their_order() -> None:
    assert stacked_paths("model.layers.3.self_attn.qkv_proj", QKV) == [
        "model.layers.3.self_attn.q_proj",
        "model.layers.3.self_attn.k_proj",
        "model.layers.3.self_attn.v_proj",
    ]
    assert stacked_paths("model.layers.3.mlp.down_proj", QKV) == ["model.layers.3.mlp.down_proj"]
    assert stacked_paths("gate_up_proj", QKV) == ["gate_proj", "up_proj"]


def test_experts_are_named_by_their_numbers_and_matrices() -> None:
    mixtral = "model.layers.1.block_sparse_moe.experts"
    assert expert_paths(mixtral, ["w1", "w2", "w3"], 2) == {
        (expert, name): f"{mixtral}.{expert}.{name}" for expert in (0, 1) for name in ("w1", "w2", "w3")
    }
    qwen = expert_paths("mlp.experts", ["gate_proj", "down_proj", "up_proj"], 1)
    assert qwen == {
        (0, "w1"): "mlp.experts.0.gate_proj",
        (0, "w2"): "mlp.experts.0.down_proj",
        (0, "w3"): "mlp.experts.0.up_proj",
    }
    assert set(expert_paths("experts", ["up_proj", "down_proj", None], 3)) == {
        (e, w) for e in range(3) for w in ("w1", "w2")
    }


@each("ranks", [1, 2, 3])
def test_gate_and_up_take_turns_in_the_part_of_every_rank(ranks: int) -> None:
    """The same cuts of the whole tensors that vLLM makes of the files of gpt-oss."""
    inner, hidden = 7, 5
    size = -(-inner // ranks)
    gate, up, down = torch.randn(inner, hidden), torch.randn(inner, hidden), torch.randn(hidden, inner)
    whole = torch.stack([gate, up], dim=1).reshape(2 * inner, hidden)
    for rank in range(ranks):
        w13, w2 = torch.zeros(2 * size, hidden), torch.zeros(hidden, size)
        place_in_turn(gate, w13, shard="w1", rank=rank)
        place_in_turn(up, w13, shard="w3", rank=rank)
        place_in_turn(down, w2, shard="w2", rank=rank)
        rows, columns = whole[2 * rank * size : 2 * (rank + 1) * size], down[:, rank * size : (rank + 1) * size]
        assert torch.equal(w13[: len(rows)], rows)
        assert torch.equal(w2[:, : columns.shape[1]], columns)
        assert not w13[len(rows) :].any()


def test_a_matrix_that_never_arrives_is_an_error() -> None:
    check_loaded([], "RoutedExperts")
    with pytest.raises(InputError) as caught:
        check_loaded(["b", "a"], "RoutedExperts")
    assert str(caught.value) == (
        "vLLM built a RoutedExperts for a but never loaded it; serve a slice: matquant export --to dense"
    )


def test_overrides_are_bits_and_a_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"default": 3, "bits": {"a": 2}}))
    ours = {"quant_method": "matquant"}
    assert read_overrides(ours) == Plan(default=8)
    assert read_overrides({**ours, "bits": 4, "plan": {"a": 2}}) == Plan(default=4, bits={"a": 2})
    assert read_overrides({**ours, "plan": str(tmp_path / "plan.json")}) == Plan(default=3, bits={"a": 2})


@each(
    ("overrides", "message"),
    [
        ({"bits": 9}, "bits=9 is not a width; use one of 1 to 8"),
        ({"bits": "4"}, "bits='4' is not a width; use one of 1 to 8"),
        ({"bit": 4}, "quantization_config has the key 'bit', which matquant does not know; nearest: 'bits'"),
        ({"plan": 4}, "quantization_config has plan=4; give {path: bits} or the name of a plan file"),
        (
            {"plan": "no.json"},
            '--plan no.json: no such file; give a JSON file {"default": 4, "bits": {path: bits}}',
        ),
    ],
)
def test_other_overrides_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_overrides(overrides)
    assert str(caught.value) == message


@each(
    ("config", "message"),
    [
        ({"kernels": "fast"}, "quantization_config has kernels='fast'; use one of auto, planes, dense"),
        ({"max_bits": 9}, "quantization_config has max_bits=9; use a width, 1 to 8"),
        ({"max_bits": True}, "quantization_config has max_bits=True; use a width, 1 to 8"),
    ],
)
def test_kernels_that_do_not_exist_are_refused(config: dict[str, Any], message: str) -> None:
    assert read_kernels({}) == ("auto", 8)
    assert read_kernels({"kernels": "planes", "max_bits": 4, "bits": 2}) == ("planes", 4)
    with pytest.raises(InputError) as caught:
        read_kernels(config)
    assert str(caught.value) == message


def test_a_width_that_is_not_in_memory_is_refused() -> None:
    check_widest({"a": 4, "b": 2}, max_bits=4)
    with pytest.raises(InputError) as caught:
        check_widest({"a": 4, "b": 6}, max_bits=4)
    assert str(caught.value) == "b is to have 6 bits, and max_bits=4 are in memory; use a larger max_bits"
