"""The GPTQ layouts: what they hold is exact, read back by the format's description; what they cannot is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exports import nested_checkpoint, read_gptq, read_json, sliced, stored
from matquant.core.nest import slice_codes
from matquant.core.spec import Plan
from matquant.export import export
from matquant.export.containers import MIDRANGE, read_affine
from matquant.format.read import open_checkpoint
from matquant.system.errors import InputError

UP, ODD, TALL = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"
SHAPES = {UP: (32, 96), ODD: (64, 172), TALL: (172, 64)}
PREFIX_CENTRED = {8: 8, 4: 8, 3: 4, 2: 3}  # slice -> container: one bit more, and of the next width that there is


def moved(directory: Path, path: str, bits: int) -> np.ndarray:
    """The slice with its zeros in the middle, in float64."""
    tensor = open_checkpoint(directory).nested(path)
    scale, zero = (part.astype(np.float64) for part in read_affine(tensor, bits, zero_point=MIDRANGE))
    code = slice_codes(tensor.codes, bits, rule=tensor.rule).astype(np.float64)
    weight: np.ndarray = (code.reshape(len(code), scale.shape[1], -1) - zero[..., None]) * scale[..., None]
    return weight.reshape(code.shape)


def held_in(bits: int, path: str) -> int:
    """3-bit words must be full; else the next width holds the weight."""
    return 4 if bits == 3 and path != UP else bits


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("options", [{}, {"group_size": 4}, {"scale_dtype": "float32"}])
def test_slices_of_rule_round_are_exact(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    shapes = {UP: (32, 96), TALL: (172, 64)} if "group_size" in options else SHAPES
    group = {"group_size": 32} if "group_size" in options else {}
    source = nested_checkpoint(tmp_path / "in", shapes, rule="round", own=False, **{**options, **group})
    checkpoint = open_checkpoint(source)
    for bits in (8, 4, 3, 2):
        export(source, tmp_path / "out", to=layout, bits=bits, overwrite=True)
        tensors = stored(tmp_path / "out")
        for path in shapes:
            weight = read_gptq(tensors, path, held_in(bits, path), less=int(layout == "gptq"))
            expected = sliced(checkpoint, path, bits)
            if "scale_dtype" in options:  # one rounding to fp16
                np.testing.assert_allclose(weight, expected, rtol=2**-11)
            else:
                np.testing.assert_array_equal(weight, expected)
            assert not np.allclose(weight, sliced(checkpoint, path, bits - 1), rtol=2**-11)
        config = read_json(tmp_path / "out" / "quantize_config.json")
        assert config == read_json(tmp_path / "out" / "config.json")["quantization_config"]
        assert (config["group_size"], config["sym"]) == (32 if group else -1, layout == "gptq")
        assert config["checkpoint_format"] == config["format"] == layout
    assert tensors[f"{UP}.g_idx"].tolist() == (np.arange(96) // 32 if group else np.zeros(96)).tolist()


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_centred_slices_of_rule_prefix_take_a_bit_more(layout: str, tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", {UP: (32, 96)})
    for bits, width in PREFIX_CENTRED.items():
        made = export(source, tmp_path / "out", to=layout, bits=bits, zero_point="midrange", overwrite=True)
        assert made["containers"] == {f"{'int' if layout == 'gptq' else 'uint'}{width}": 1}
        weight = read_gptq(stored(tmp_path / "out"), UP, width, less=int(layout == "gptq"))
        np.testing.assert_array_equal(weight, moved(source, UP, bits))
        assert not np.array_equal(weight, moved(source, UP, bits - 1))


def test_integer_zeros_need_the_second_version(tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", {UP: (32, 96)}, symmetric=False, own=False, rule="round")
    export(source, tmp_path / "out", to="gptq_v2", bits=8)
    weight = read_gptq(stored(tmp_path / "out"), UP, 8, less=0)
    np.testing.assert_array_equal(weight, sliced(open_checkpoint(source), UP, 8))
    with pytest.raises(InputError) as caught:
        export(source, tmp_path / "other", to="gptq", bits=8)
    assert re.match(
        rf"--to gptq cannot hold {re.escape(UP)} at 8 bits, rule round, exactly \(1 of 1 weights\): zero-point \d+ "
        r"needs integers -?\d+ to \d+ in int8; use --to mlx or compressed-tensors or gptq_v2 or dense",
        str(caught.value),
    )
    with pytest.raises(
        InputError, match=r"zero-point [\d.]+ is not a multiple of 1/2; use --to gguf or mlx or dense, or --bits 7$"
    ):
        export(source, tmp_path / "other", to="gptq_v2", bits=4)
    assert not (tmp_path / "other").exists()


def test_a_zero_of_nothing_borrows_from_no_neighbour(tmp_path: Path) -> None:
    """In the second version a zero of 0 is stored as it is."""
    source = nested_checkpoint(tmp_path / "in", {UP: (512, 32)}, symmetric=False, own=False)
    assert (open_checkpoint(source).nested(UP).zero == 0).any()
    export(source, tmp_path / "out", to="gptq_v2", bits=8)
    weight = read_gptq(stored(tmp_path / "out"), UP, 8, less=0)
    np.testing.assert_array_equal(weight, sliced(open_checkpoint(source), UP, 8))


def test_a_plan_is_written_as_dynamic_rules(tmp_path: Path) -> None:
    shapes = {**SHAPES, "model.layers.1.mlp.gate_proj": (32, 96), "model.layers.2.mlp.gate_proj": (32, 96)}
    kept = ("lm_head", "model.layers.0.self_attn.q_proj")
    source = nested_checkpoint(tmp_path / "in", shapes, rule="round", own=False, ignore=kept)
    plan = Plan(default=4, bits={UP: 2, "model.layers.2.mlp.gate_proj": 8})
    made = export(source, tmp_path / "out", to="gptq", plan=plan)
    assert made["containers"] == {"int2": 1, "int4": 3, "int8": 1}
    config = read_json(tmp_path / "out" / "quantize_config.json")
    assert config["bits"] == 4
    rules = [(rule[:2], rule[2:], value) for rule, value in config["dynamic"].items()]
    found = {}
    for path in (*shapes, *kept, f"{UP}x"):
        found[path] = [(sign, value) for sign, pattern, value in rules if re.match(pattern, path)]
    assert found == {
        **{path: [] for path in (*shapes, f"{UP}x")},
        UP: [("+:", {"bits": 2})],
        "model.layers.2.mlp.gate_proj": [("+:", {"bits": 8})],
        **{path: [("-:", {})] for path in kept},
    }


def test_groups_that_gptqmodel_does_not_know(tmp_path: Path) -> None:
    source = nested_checkpoint(tmp_path / "in", {UP: (32, 96)}, rule="round", own=False, group_size=48)
    export(source, tmp_path / "out", to="gptq", bits=4)
    assert read_json(tmp_path / "out" / "quantize_config.json")["group_size"] == 16
    weight = read_gptq(stored(tmp_path / "out"), UP, 4, less=1)
    np.testing.assert_array_equal(weight, sliced(open_checkpoint(source), UP, 4))
    odd = nested_checkpoint(tmp_path / "odd", {UP: (32, 96)}, rule="round", own=False, group_size=24)
    with pytest.raises(InputError, match="groups of 24 are not multiples of 16; use --to compressed-tensors or dense"):
        export(odd, tmp_path / "other", to="gptq", bits=4)
    opt = nested_checkpoint(tmp_path / "opt", SHAPES, config={"model_type": "opt"})
    with pytest.raises(InputError, match="--to gptq does not support opt models, only llama, mistral"):
        export(opt, tmp_path / "other", to="gptq", bits=4)
