"""MatQuantConfig: transformers' own from_pretrained gives the weights of matquant.load(kernels="none"), bit for bit."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import conftest
import matquant
from conftest import FAMILIES
from matquant.export import export
from matquant.format.read import open_checkpoint
from matquant.format.side_files import side_files
from matquant.format.write import write_checkpoint
from matquant.hf_torch.layers import linear_views
from matquant.hf_torch.views import plain_items
from matquant.integrations import quantizer

TOKENS = torch.arange(3, 60).reshape(3, 19)
PATH = "model.layers.1.mlp.down_proj"


def read(directory: Path, **options: Any) -> Any:
    """The model that transformers itself gives."""
    dtype = options.pop("dtype", "auto")
    config = matquant.MatQuantConfig(**options)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=dtype)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def assert_same_weights(found: Any, expected: Any) -> None:
    """The same tensors under the same names, bit for bit."""
    left, right = found.state_dict(), expected.state_dict()
    assert list(left) == list(right)
    for name in left:
        if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name]):
            raise AssertionError(f"{name} differs")


@pytest.fixture(scope="module")
def checkpoints(family_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: conftest.quantize(family_model(name), root / name, method="rtn", scope="linears") for name in FAMILIES
    }


@pytest.fixture
def small(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["llama"]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_gives_the_slice_and_saves_it(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for bits in (8, 3, 2):
        model = read(checkpoints[family], bits=bits)
        assert_same_weights(model, matquant.load(checkpoints[family], bits=bits, kernels="none"))
        with pytest.raises(AssertionError, match="differs"):
            assert_same_weights(model, matquant.load(checkpoints[family], bits=bits - 1, kernels="none"))
    prompt = TOKENS[:1, :4]
    assert model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4).shape[1] > 4
    model.save_pretrained(tmp_path / "slice")
    assert "quantization_config" not in json.loads((tmp_path / "slice" / "config.json").read_text())
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "slice"), model)


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 16, "rule": "round"},
        {"symmetric": False, "affine": "none"},
        {"symmetric": False, "group_size": 16, "rule": "extra"},
        {"scale_dtype": "float32"},
    ],
)
def test_every_kind_of_checkpoint_is_read(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    out = conftest.quantize(llama, tmp_path / "out", method="rtn", scope="linears", **options)
    for bits in (8, 4, 2):
        assert_same_weights(read(out, bits=bits), matquant.load(out, bits=bits, kernels="none"))


def test_dtypes_are_those_of_load(small: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_same_weights(read(small, bits=4, dtype=dtype), matquant.load(small, 4, dtype=dtype, kernels="none"))


def test_plans_are_mappings_plans_or_files(small: Path, tmp_path: Path) -> None:
    expected = matquant.load(small, 4, plan={PATH: 2}, kernels="none")
    (tmp_path / "plan.json").write_text(json.dumps({"default": 4, "bits": {PATH: 2}}))
    for plan in ({PATH: 2}, matquant.Plan(default=4, bits={PATH: 2}), tmp_path / "plan.json"):
        assert_same_weights(read(small, bits=4, plan=plan), expected)
    every = dict.fromkeys(open_checkpoint(small).shapes, 4) | {PATH: 2}
    (tmp_path / "every.json").write_text(json.dumps({"bits": every}))
    assert_same_weights(read(small, plan=str(tmp_path / "every.json")), expected)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_weights(read(small, bits=4), expected)


def test_a_plan_reaches_each_expert(checkpoints: dict[str, Path]) -> None:
    paths = [path for path in open_checkpoint(checkpoints["qwen3_moe"]).shapes if ".experts." in path]
    plan = {path: 1 + index % 8 for index, path in enumerate(paths)}
    found = read(checkpoints["qwen3_moe"], bits=4, plan=plan)
    assert_same_weights(found, matquant.load(checkpoints["qwen3_moe"], 4, plan=plan, kernels="none"))


def test_experts_that_are_not_quantised_are_read(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, exclude = family_model("qwen3_moe"), [r"layers\.1\.mlp\.experts", r"experts.*down_proj"]
    out = conftest.quantize(source, tmp_path / "out", method="rtn", scope="linears", exclude=exclude)
    assert "model.layers.0.mlp.experts.2.down_proj.weight" in open_checkpoint(out).plain_names()
    assert_same_weights(read(out, bits=3), matquant.load(out, 3, kernels="none"))
    with pytest.raises(matquant.InputError) as caught:
        conftest.quantize(source, tmp_path / "split", method="rtn", exclude=[r"experts\.[02]\.up_proj"])
    assert str(caught.value) == (
        "--exclude removes model.layers.0.mlp.experts.0.up_proj from model.layers.0.mlp.experts.gate_up_proj, "
        "which transformers reads as one tensor; exclude all of it or none"
    )
    assert not (tmp_path / "split").exists()


def test_shards_are_read(small: Path, tmp_path: Path) -> None:
    found = open_checkpoint(small)
    items = [(path, found.nested(path)) for path in found.shapes]
    model = matquant.load(small, kernels="none")
    items += list(plain_items(model, {path: linear_views(model)[path] for path in found.shapes}, {}))
    write_checkpoint(
        tmp_path / "shards",
        items,
        spec=found.spec,
        config=found.config,
        ignore=found.ignore,
        files=side_files(small),
        shard_bytes=10_000,
    )
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 3
    assert_same_weights(read(tmp_path / "shards", bits=3), read(small, bits=3))


@pytest.mark.parametrize("plan", [None, {PATH: 2}])
def test_a_checkpoint_with_fewer_stored_bits_is_read(plan: Any, small: Path, tmp_path: Path) -> None:
    export(small, tmp_path / "top", to="matquant", plan=matquant.Plan.over(4, plan))
    for bits in (4, 3):
        assert_same_weights(
            read(tmp_path / "top", bits=bits, plan=plan), matquant.load(small, bits, plan=plan, kernels="none")
        )


def test_the_decoder_alone_is_read(small: Path) -> None:
    config = matquant.MatQuantConfig(bits=3)
    assert_same_weights(
        AutoModel.from_pretrained(small, quantization_config=config), matquant.load(small, 3, kernels="none").model
    )


def test_the_slice_can_be_trained(small: Path) -> None:
    model = read(small, bits=4)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# Without MatQuantConfig -----------------------------------------------------------------------------------------------

STOCK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info[key] for key in info), info
tokens = torch.arange(3, 60).reshape(3, 19)
with torch.no_grad():
    save_file({"logits": model(tokens).logits.contiguous()}, sys.argv[2])
"""
TOUCHED = "import matquant; matquant.MatQuantConfig(bits=2)" + STOCK
WITHOUT = "import sys; sys.modules['compressed_tensors'] = None" + STOCK


def run(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_without_the_config_the_directory_is_a_stock_int8_model(small: Path, tmp_path: Path) -> None:
    done = run(TOUCHED, small, tmp_path / "out")  # where matquant is never imported: test_families.py
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "out")["logits"]
    gaps = [(found - logits(matquant.load(small, bits, kernels="none"))).abs().max() for bits in (8, 7)]
    size = found.abs().max()
    assert gaps[0] <= 1e-5 * size
    assert gaps[1] > 1e-3 * size, "the neighbouring width must not pass"


@pytest.mark.slow
def test_without_compressed_tensors_stock_transformers_refuses(small: Path, tmp_path: Path) -> None:
    done = run(WITHOUT, small, tmp_path / "out")
    assert done.returncode != 0
    assert "compressed_tensors" in done.stderr or "compressed-tensors" in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_configurations_go_transformers_own_way(small: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="quantized with CompressedTensorsConfig"):
        AutoModelForCausalLM.from_pretrained(small, quantization_config=config)


def test_registering_twice_does_nothing(small: Path) -> None:
    before = matquant.MatQuantConfig(bits=3)
    importlib.reload(quantizer)
    for config in (before, matquant.MatQuantConfig(bits=3)):
        found = AutoModelForCausalLM.from_pretrained(small, quantization_config=config)
        assert_same_weights(found, matquant.load(small, 3, kernels="none"))
    test_other_configurations_go_transformers_own_way(small)


# The user's mistakes --------------------------------------------------------------------------------------------------


def assert_refused(directory: Path, message: str, **options: Any) -> None:
    with pytest.raises(matquant.InputError) as caught:
        read(directory, **options)
    assert str(caught.value) == message


def test_widths_outside_1_to_8_are_refused() -> None:
    with pytest.raises(matquant.InputError, match="bits=9 is not a width; use one of 1 to 8"):
        matquant.MatQuantConfig(bits=9)
    with pytest.raises(matquant.InputError, match="bits=0 is not a width"):
        matquant.MatQuantConfig(plan={PATH: 0})


def test_a_plan_with_an_unknown_path_is_refused(small: Path) -> None:
    assert_refused(
        small,
        f"the plan names '{PATH[:-5]}', which the model does not quantise; nearest: '{PATH}'",
        plan={PATH[:-5]: 2},
    )


def test_a_float_model_is_refused(llama: Path) -> None:
    assert_refused(llama, f"{llama} has no matquant_manifest.json; give a checkpoint made by matquant quantize", bits=4)


def test_a_damaged_checkpoint_is_refused(small: Path, tmp_path: Path) -> None:
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    slices = tmp_path / "matquant_slices.safetensors"
    content = bytearray(slices.read_bytes())
    content[-1] ^= 1
    slices.write_bytes(content)
    with pytest.raises(matquant.InputError, match=r"matquant_slices.safetensors is damaged: sha256 .*; copy it again"):
        read(tmp_path, bits=2)
    assert read(tmp_path, bits=2, check_hashes=False) is not None


def test_weights_that_the_class_does_not_have_are_refused(small: Path, tmp_path: Path) -> None:
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(matquant.InputError) as caught:
        read(tmp_path, bits=4, check_hashes=False)
    assert str(caught.value) == (
        f"{tmp_path} quantises model.layers.1.mlp.down_proj, which LlamaForCausalLM does not have; "
        "load it with the class that it was made from"
    )
