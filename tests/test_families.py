"""Every family: one checkpoint, read at any width by us and at 8 bits by a transformers that never saw us."""

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM

import conftest
import matquant
from conftest import FAMILIES, make_tokenizer
from matquant.format.read import open_checkpoint
from matquant.hf_torch import experts
from matquant.hf_torch.layers import linear_views, select_linears
from matquant.hf_torch.loading import load_float

TOKENS = torch.arange(3, 60).reshape(3, 19)
STOCK = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
tokens = torch.arange(3, 60).reshape(3, 19)
out = {}
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        out[directory] = model(tokens).logits.contiguous()
assert not any(name.split(".")[0] == "matquant" for name in sys.modules)
save_file(out, sys.argv[1])
"""


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to fp32 rounding of a forward pass of a few layers."""
    gap = (found - expected).abs().max() / expected.abs().max()
    if gap > 1e-5:
        raise AssertionError(f"logits differ by {gap:.2e} of their size")


@functools.lru_cache(maxsize=1)
def files_of(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a checkpoint and of its slices, read once."""
    return load_file(directory / "model.safetensors"), load_file(directory / "matquant_slices.safetensors")


def oracle_weight(path: str, directory: Path, bits: int) -> np.ndarray:
    """The ``bits``-bit weight straight from the files, in plain numpy."""
    tensors, slices = files_of(directory)
    _, columns = tensors[f"{path}.weight_shape"].tolist()
    codes = tensors[f"{path}.weight_packed"].numpy().view(np.uint8)[:, :columns].astype(np.int64)
    scale = tensors[f"{path}.weight_scale"].float().numpy()
    step = 2 ** (8 - bits)
    if f"{path}.{bits}.scale" in slices:
        own = slices[f"{path}.{bits}.scale"].float().numpy(), slices[f"{path}.{bits}.zero"].float().numpy()
        return own[0] * (codes // step - own[1])
    return scale * (codes // step * step + (step - 1) / 2 - 128)


GRIDS: dict[str, dict[str, Any]] = {
    "groups": {"group_size": 16},
    "zero points": {"symmetric": False},
    "groups with zero points": {"symmetric": False, "group_size": 16},
}
STORIES = "stories260K"
HYBRID = "granite_hybrid"  # infinity in its configuration
PATCHED = "llama4"  # stock transformers replaces its experts, which its files store in one tensor, by linear layers
SEEING = "gemma3_vision"  # a vision tower of as many layers as the decoder, and other names in the file


@pytest.fixture(scope="module")
def checkpoints(
    family_model: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every family, a model of another's making, and llama on other grids."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {name: family_model(name) for name in [*FAMILIES, SEEING, HYBRID, PATCHED]} | {
        STORIES: data / "models" / STORIES
    }
    asked = {name: (model, {}) for name, model in models.items()}
    asked |= {name: (models["llama"], options) for name, options in GRIDS.items()}
    return {
        name: conftest.quantize(model, root / name, method="rtn", scope="linears", **options)
        for name, (model, options) in asked.items()
    }


@pytest.fixture(scope="module")
def stock_logits(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Logits of every checkpoint from a process that never imports matquant."""
    file = tmp_path_factory.mktemp("stock") / "logits.safetensors"
    directories = [str(directory) for directory in checkpoints.values()]
    subprocess.run([sys.executable, "-c", STOCK, str(file), *directories], check=True, capture_output=True)
    found = load_file(file)
    return {name: found[str(directory)] for name, directory in checkpoints.items()}


@pytest.mark.parametrize("name", [*FAMILIES, SEEING, HYBRID, PATCHED, STORIES, *GRIDS])
def test_stock_transformers_reads_the_int8_model(
    name: str, checkpoints: dict[str, Path], stock_logits: dict[str, torch.Tensor]
) -> None:
    model = matquant.load(checkpoints[name], dtype=torch.float32, kernels="none")
    assert_same_logits(stock_logits[name], logits(model))
    model.set_bits(7)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(stock_logits[name], logits(model))


LIKE_LLAMA = ("mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox")  # in how their weights are stored


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow if f in LIKE_LLAMA else []) for f in (*FAMILIES, SEEING)],
)
def test_every_width_is_the_slice_of_the_file(family: str, checkpoints: dict[str, Path]) -> None:
    model = matquant.load(checkpoints[family], bits=2, kernels="none")
    parameters, views = dict(model.named_parameters()), linear_views(model)
    for bits in (2, 8, 3, 5, 4, 6, 7):
        model.set_bits(bits)
        for path, view in views.items():
            found = view.of(parameters[view.parameter].detach()).numpy()
            np.testing.assert_allclose(found, oracle_weight(path, checkpoints[family], bits), rtol=1e-6, atol=1e-9)
            other = oracle_weight(path, checkpoints[family], bits - 1)
            assert not np.allclose(found, other, rtol=1e-6, atol=1e-9), "the neighbouring width must not pass"


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linears_of_the_layers_are_quantised_and_nothing_else(family: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(checkpoints[family])
    plain = [name for name in checkpoint.plain_names() if len(checkpoint.array(name).shape) > 1]
    assert all("embed" in name or "head" in name or name.endswith("mlp.gate.weight") for name in plain), plain
    assert all(".layers." in path for path in checkpoint.shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_a_loaded_model_gives_the_same_checkpoint(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = matquant.load(checkpoints[family], bits=3, kernels="none")
    model.save_pretrained(tmp_path / "again")
    first, second = open_checkpoint(checkpoints[family]), open_checkpoint(tmp_path / "again")
    assert first.spec == second.spec
    assert set(first.files) == set(second.files)
    for name in first.files:
        np.testing.assert_array_equal(first.array(name), second.array(name))
    again = matquant.load(tmp_path / "again", bits=3, kernels="none")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_works_at_every_width(family: str, checkpoints: dict[str, Path]) -> None:
    model = matquant.load(checkpoints[family], kernels="none")
    prompt = TOKENS[:1, :4]
    outputs = set()
    for bits in (8, 4, 2):
        model.set_bits(bits)
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        assert ids.shape[1] <= 10
        outputs.add(tuple(ids[0].tolist()))
    assert len(outputs) > 1


def test_a_plan_sets_each_path_and_switching_back_restores(checkpoints: dict[str, Path]) -> None:
    path = "model.layers.1.mlp.down_proj"
    model = matquant.load(checkpoints["llama"], 4, plan={path: 2}, kernels="none")
    assert model.bits_by_path[path] == 2
    assert set(model.bits_by_path.values()) == {2, 4}
    mixed = logits(model)
    model.set_bits(4)
    uniform = logits(matquant.load(checkpoints["llama"], 4, kernels="none"))
    assert torch.equal(logits(model), uniform)
    assert not torch.equal(mixed, uniform)


def test_a_plan_with_an_unknown_path_names_the_nearest(checkpoints: dict[str, Path]) -> None:
    message = (
        r"the plan names 'model.layers.1.mlp.down', which the model does not quantise; "
        r"nearest: 'model.layers.1.mlp.down_proj'"
    )
    with pytest.raises(matquant.InputError, match=message):
        matquant.load(checkpoints["llama"], plan={"model.layers.1.mlp.down": 2}, kernels="none")


def test_of_a_model_that_sees_the_decoder_is_quantised_as_it_is_alone(
    family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    seeing, alone = load_float(family_model(SEEING)), tmp_path / "alone"
    decoder = Gemma3ForCausalLM(seeing.config.text_config)
    state = {name.replace("language_model.", ""): tensor for name, tensor in seeing.state_dict().items()}
    decoder.load_state_dict({name: state[name] for name in decoder.state_dict()})
    decoder.save_pretrained(alone)
    make_tokenizer().save_pretrained(alone)
    codes = []
    for model in (family_model(SEEING), alone):
        made = conftest.quantize(
            model,
            tmp_path / f"{model.name} out",
            method="gptq",
            samples=8,
            seq_len=32,
            scope="linears",
            text=[text_file],
        )
        checkpoint = open_checkpoint(made)
        codes.append(
            {path.removeprefix("language_model."): checkpoint.nested(path).codes for path in checkpoint.shapes}
        )
    assert set(codes[0]) == set(codes[1])
    for path, expected in codes[1].items():
        np.testing.assert_array_equal(codes[0][path], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_scopes_split_the_linears_in_two(family: str, family_model: Callable[[str], Path]) -> None:
    model = load_float(family_model(family))
    ffn, attention = select_linears(model, "ffn"), select_linears(model, "attention")
    assert set(ffn) | set(attention) == set(select_linears(model, "linears"))
    assert not set(ffn) & set(attention)
    assert len(attention) == {"phi3": 4, "gpt_neox": 4}.get(family, 8)
    assert len(ffn) == {"phi3": 4, "opt": 4, "gpt_neox": 4, "qwen3_moe": 24}.get(family, 6)


def test_asymmetric_fused_experts_are_refused(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = family_model("qwen3_moe")
    with pytest.raises(matquant.InputError) as caught:
        conftest.quantize(model, tmp_path / "out", method="rtn", symmetric=False)
    assert str(caught.value) == (
        "--asymmetric does not work with model.layers.0.mlp.experts.0.gate_proj, a fused expert, "
        "which stock transformers cannot read with zero-points; drop --asymmetric, or use --exclude experts"
    )
    assert not (tmp_path / "out").exists()
    options = {"method": "rtn", "scope": "linears", "symmetric": False}
    out = conftest.quantize(model, tmp_path / "out", exclude=["experts"], **options)
    assert not any("experts" in path for path in open_checkpoint(out).shapes)


def test_experts_in_a_form_that_is_not_known_are_to_be_excluded(
    family_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "rtn", "scope": "linears"}
    monkeypatch.setattr(experts, "TENSORS", {})
    with pytest.raises(matquant.InputError) as caught:
        conftest.quantize(family_model("gpt_oss"), tmp_path / "out", **options)
    assert str(caught.value) == (
        "model.layers.0.mlp.experts.gate_up_proj holds all experts in a form that is not supported; "
        "use --exclude experts"
    )
    out = conftest.quantize(family_model("gpt_oss"), tmp_path / "out", exclude=["experts"], **options)
    assert len(open_checkpoint(out).shapes) == 8  # q, k, v and o of two layers
    expected = load_float(family_model("gpt_oss")).state_dict()
    for name, tensor in matquant.load(out, kernels="none").state_dict().items():
        gap, whole = (tensor - expected[name]).abs().max(), expected[name].abs().max()
        assert 0 < gap < whole / 127 if "attn" in name and name.endswith("proj.weight") else gap == 0, name


def test_a_stored_scale_of_float32_is_eq_1_to_the_letter(llama: Path, tmp_path: Path) -> None:
    out = conftest.quantize(llama, tmp_path / "out", method="rtn", scale_dtype="float32", affine="none")
    checkpoint = open_checkpoint(out)
    path = "model.layers.0.mlp.up_proj"
    weight = load_float(llama).get_parameter(f"{path}.weight").detach().numpy()
    expected = np.float32(2) * np.abs(weight).max(axis=1, keepdims=True) / np.float32(255)
    np.testing.assert_allclose(checkpoint.nested(path).scale, expected, rtol=1e-7)
    assert dataclasses.asdict(checkpoint.spec)["scale_dtype"] == "float32"
