"""``matquant.load``: the native kernels inside transformers, held to the dense model."""

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import conftest
import matquant
from conftest import FAMILIES
from matquant.backends import native
from matquant.core import planes
from matquant.format.read import open_checkpoint
from matquant.hf_torch import linear
from matquant.hf_torch.linear import NestedLinear

TOKENS = torch.arange(3, 60).reshape(3, 19)
PLAIN = [family for family in FAMILIES if family != "qwen3_moe"]
DOWN = "model.layers.1.mlp.down_proj"
QUERY = "model.layers.1.self_attn.q_proj"  # with a bias in qwen2


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest logit."""
    assert found.dtype == expected.dtype
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def checkpoint(family_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, options) -> directory of its nested checkpoint, made once."""
    root = tmp_path_factory.mktemp("nested")

    def get(family: str, **options: Any) -> Path:
        out = root / "-".join([family, *map(str, options.values())])
        if out.is_dir():
            return out
        return conftest.quantize(family_model(family), out, method="rtn", **{"scope": "linears", **options})

    return get


@pytest.mark.parametrize("family", PLAIN)
def test_float_kernels_equal_the_dense_model_at_every_width(family: str, checkpoint: Callable[..., Path]) -> None:
    dense = matquant.load(checkpoint(family), dtype=torch.float32, kernels="none")
    model = matquant.load(checkpoint(family), dtype=torch.float32, kernels="float")
    assert model.kernels == f"{planes.isa()} kernels for {len(model.bits_by_path)} layers, float activations"
    expected = {}
    for bits in range(1, 9):
        dense.set_bits(bits)
        expected[bits] = logits(dense)
    for bits in range(1, 9):
        model.set_bits(bits)
        found = logits(model)
        assert gap(found, expected[bits]) < 1e-5, bits
        for other in {bits - 1, bits + 1} & set(expected):
            assert gap(found, expected[other]) > 1e-5, "the neighbouring width must not pass"


@pytest.mark.parametrize("options", [{"rule": "round"}, {"rule": "extra", "group_size": 16}], ids=str)
def test_rules_and_groups_equal_the_dense_model(options: dict[str, Any], checkpoint: Callable[..., Path]) -> None:
    out = checkpoint("llama", **options)
    dense = matquant.load(out, dtype=torch.float32, kernels="none")
    model = matquant.load(out, dtype=torch.float32, kernels="float")
    for bits in (8, 5, 2):
        dense.set_bits(bits)
        model.set_bits(bits)
        assert gap(logits(model), logits(dense)) < 1e-5, bits


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_int8_activations_are_close_but_not_equal(family: str, checkpoint: Callable[..., Path]) -> None:
    dense = matquant.load(checkpoint(family), 4, dtype=torch.float32, kernels="none")
    model = matquant.load(checkpoint(family), 4, dtype=torch.float32, kernels="int8")
    expected, difference = logits(dense), gap(logits(model), logits(dense))
    dense.set_bits(3)
    assert 1e-5 < difference < 0.2 * gap(logits(dense), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("bits", [8, 2])
def test_generate_gives_the_tokens_of_the_dense_model(family: str, bits: int, checkpoint: Callable[..., Path]) -> None:
    prompt = TOKENS[:2, :4]
    tokens = [
        matquant.load(checkpoint(family), bits, dtype=torch.float32, kernels=kernels).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        for kernels in ("none", "float")
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype, checkpoint: Callable[..., Path]) -> None:
    dense = matquant.load(checkpoint("qwen2"), 4, dtype=dtype, kernels="none")
    model = matquant.load(checkpoint("qwen2"), 4, dtype=dtype, kernels="float")
    found, expected = logits(model), logits(dense)
    assert gap(found, expected) < 0.03  # a few roundings to 8 bits
    dense.set_bits(2)
    assert gap(found, logits(dense)) > 0.1


def test_a_call_takes_any_leading_shape_and_strides(checkpoint: Callable[..., Path]) -> None:
    module = matquant.load(checkpoint("llama"), 4, dtype=torch.float32, kernels="float").get_submodule(DOWN)
    x = torch.randn(5, 2, 2 * module.in_features)[:, :, ::2]
    expected = x @ module.weight.T
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x[0, 0]), expected[0, 0])
    assert module(x[:0]).shape == (0, 2, module.out_features)


def test_set_bits_and_plans_switch_in_place(checkpoint: Callable[..., Path]) -> None:
    out = checkpoint("llama")
    model = matquant.load(out, 4, plan={DOWN: 2}, dtype=torch.float32, kernels="int8")
    assert model.bits_by_path[DOWN] == 2
    assert set(model.bits_by_path.values()) == {2, 4}
    mixed = logits(model)
    model.set_bits(4)
    uniform = logits(model)
    assert not torch.equal(mixed, uniform)
    model.set_bits(4, plan={DOWN: 2})
    assert torch.equal(logits(model), mixed)
    with pytest.raises(matquant.InputError, match="which the model does not quantise; nearest: "):
        model.set_bits(8, plan={"model.layers.1.mlp.down": 2})
    assert torch.equal(logits(model), mixed)
    assert torch.equal(logits(matquant.load(out, 4, dtype=torch.float32, kernels="int8")), uniform)


def test_saving_gives_the_same_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    for family in ("qwen2", "opt"):  # with biases
        model = matquant.load(checkpoint(family), 3, kernels="int8")
        model.save_pretrained(tmp_path / family)
        first, second = open_checkpoint(checkpoint(family)), open_checkpoint(tmp_path / family)
        assert (first.spec, set(first.files)) == (second.spec, set(second.files))
        for name in first.files:
            np.testing.assert_array_equal(first.array(name), second.array(name))


def test_a_model_saved_over_its_own_checkpoint_goes_on(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    matquant.load(checkpoint("llama"), kernels="none").save_pretrained(tmp_path / "own")
    model = matquant.load(tmp_path / "own", 4, kernels="int8")
    before = logits(model)
    for _ in range(2):
        model.save_pretrained(tmp_path / "own", overwrite=True)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(matquant.load(tmp_path / "own", 4, kernels="int8")), before)


def test_the_state_dict_is_that_of_the_dense_model(checkpoint: Callable[..., Path]) -> None:
    model = matquant.load(checkpoint("qwen2"), 3, kernels="int8")
    found, expected = model.state_dict(), matquant.load(checkpoint("qwen2"), 3, kernels="none").state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    message = r"q_proj.weight cannot be loaded: the codes are fixed; load the model with kernels='none'"
    with pytest.raises(matquant.InputError, match=message):
        model.load_state_dict(found)


def test_nothing_dense_stays(checkpoint: Callable[..., Path]) -> None:
    model = matquant.load(checkpoint("llama"), dtype=torch.float32, kernels="int8")
    assert not [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and name != "lm_head"]
    logits(model)
    model.set_bits(2)
    gc.collect()
    shapes = set(open_checkpoint(checkpoint("llama")).shapes.values())
    mine = [*model.parameters(), *model.buffers(), *(t for m in model.modules() for t in vars(m).values())]
    assert not [t for t in mine if isinstance(t, torch.Tensor) and tuple(t.shape) in shapes]
    assert sum(isinstance(module, NestedLinear) for module in model.modules()) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_with_float_activations_are_the_default(dtype: torch.dtype, checkpoint: Callable[..., Path]) -> None:
    model = matquant.load(checkpoint("llama"), 3, dtype=dtype)
    assert model.kernels == f"{planes.isa()} kernels for {len(model.bits_by_path)} layers, float activations"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(matquant.load(checkpoint("llama"), 3, dtype=dtype, kernels="float")))


def test_dense_weights_are_those_of_torch_and_train(checkpoint: Callable[..., Path]) -> None:
    model = matquant.load(checkpoint("llama"), kernels="none")
    assert model.kernels == "no kernels: kernels='none' was given"
    assert type(model.get_submodule(DOWN)) is torch.nn.Linear
    assert model.get_parameter(f"{DOWN}.weight").requires_grad


OBSTACLES = [
    ("llama", {"device": "meta"}, "kernels run on cpu and cuda, found meta"),
    ("llama", {"dtype": torch.float64}, "kernels take float32, bfloat16, float16, found float64"),
    ("qwen3_moe", {}, r"model.layers.0.mlp.experts.0.\w+ is part of a fused tensor"),
]


@pytest.mark.parametrize(("family", "options", "reason"), OBSTACLES)
def test_where_kernels_cannot_be_had_the_weights_are_dense_and_the_reason_is_said(
    family: str, options: dict[str, Any], reason: str, checkpoint: Callable[..., Path]
) -> None:
    model = matquant.load(checkpoint(family), **options)
    assert re.fullmatch(f"no kernels: {reason}", model.kernels)
    assert not any(isinstance(module, NestedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    if "device" not in options:
        assert torch.equal(logits(model), logits(matquant.load(checkpoint(family), kernels="none", **options)))


@pytest.mark.parametrize(("family", "options", "reason"), OBSTACLES)
@pytest.mark.parametrize("kernels", ["int8", "float"])
def test_where_kernels_asked_for_cannot_be_had_the_reason_is_said(
    kernels: str, family: str, options: dict[str, Any], reason: str, checkpoint: Callable[..., Path]
) -> None:
    message = rf"^kernels='{kernels}' does not support .*: {reason}; use kernels='auto' or 'none'$"
    with pytest.raises(matquant.InputError, match=message):
        matquant.load(checkpoint(family), kernels=kernels, **options)


@pytest.mark.parametrize("kernels", ["fast", None])
def test_unknown_kernels_are_refused(kernels: Any, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(
        matquant.InputError, match=rf"^kernels={kernels!r} is not known; use auto, float, int8, planes or none$"
    ):
        matquant.load(checkpoint("llama"), kernels=kernels)


def test_without_the_native_extension_weights_are_dense(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "the native extension is missing (No module named 'matquant._native')"
    monkeypatch.setattr(native, "MISSING", missing)
    assert matquant.load(checkpoint("llama")).kernels == f"no kernels: {missing}"
    with pytest.raises(matquant.InputError, match=": the native extension is missing"):
        matquant.load(checkpoint("llama"), kernels="int8")


def test_calls_that_kernels_cannot_serve_are_refused(checkpoint: Callable[..., Path]) -> None:
    model = matquant.load(checkpoint("llama"), dtype=torch.float32)
    module = model.get_submodule(DOWN)
    x = torch.zeros(1, module.in_features)
    for bad, reason in (
        (
            x.to("meta"),
            "the kernels of this layer do not support its input: kernels run on cpu, found meta; load the model with",
        ),
        (
            x.double(),
            "do not support its input: kernels take float32, bfloat16, float16, found float64; load the model",
        ),
        (x[:, 1:], r"the input must be \[..., 48\], found \[1, 47\]"),
    ):
        with pytest.raises(matquant.InputError, match=reason):
            module(bad)


@pytest.mark.parametrize("kernels", ["auto", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without and with biases
def test_gradients_are_those_of_the_dense_model(kernels: str, family: str, checkpoint: Callable[..., Path]) -> None:
    dense = matquant.load(checkpoint(family), 4, dtype=torch.float32, kernels="none")
    model = matquant.load(checkpoint(family), 4, dtype=torch.float32, kernels=kernels)
    gradients = []
    for each in (dense, model):
        x = each.get_input_embeddings()(TOKENS).detach().requires_grad_()
        each(inputs_embeds=x).logits.square().mean().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(parameter.grad is None for parameter in model.parameters())
    dense.set_bits(3)
    x = dense.get_input_embeddings()(TOKENS).detach().requires_grad_()
    dense(inputs_embeds=x).logits.square().mean().backward()
    assert not torch.allclose(x.grad, gradients[1], rtol=1e-2), "the neighbouring width must not pass"


def test_many_bfloat16_tokens_are_multiplied_by_the_dense_weight(checkpoint: Callable[..., Path]) -> None:
    def is_dense(dtype: torch.dtype, kernels: str, tokens: int) -> bool:
        module = matquant.load(checkpoint("qwen2"), 4, dtype=dtype, kernels=kernels).get_submodule(QUERY)
        x = torch.randn(2, tokens // 2, module.in_features, generator=torch.manual_seed(0)).to(dtype)
        expected = torch.nn.functional.linear(x, module.weight, module.bias)
        torch.testing.assert_close(module(x), expected, rtol=0.05, atol=0.05)
        return torch.equal(module(x), expected)

    many = linear.DENSE_TOKENS
    assert is_dense(torch.bfloat16, "auto", many)
    assert not is_dense(torch.bfloat16, "auto", many - 2)
    assert not is_dense(torch.bfloat16, "int8", many)
    assert not is_dense(torch.float32, "auto", many)


# Planes in the order of GPU kernels: on a CPU the operator is its dense reference -------------------------------------


def test_planes_equal_the_dense_model_and_switch_in_place(checkpoint: Callable[..., Path]) -> None:
    for family, options in (("llama", {"scope": "all"}), ("qwen2", {"grid": "companded"})):
        out = checkpoint(family, **options)
        dense = matquant.load(out, dtype=torch.float32, kernels="none")
        model = matquant.load(out, dtype=torch.float32, kernels="planes")
        assert model.kernels == f"planes on the device for {len(model.bits_by_path)} layers, float activations"
        kept = [module._packed.bits for module in model.modules() if isinstance(module, NestedLinear)]
        for bits in (8, 6, 4, 3, 2):
            dense.set_bits(bits)
            model.set_bits(bits)
            assert gap(logits(model), logits(dense)) < 1e-5
            assert {int(width) for width in kept} == set(model.bits_by_path.values()), "captured graphs read these"
        dense.set_bits(3)
        assert gap(logits(model), logits(dense)) > 1e-3, "the neighbouring width must not pass"


def test_planes_with_gradients_and_plans(checkpoint: Callable[..., Path]) -> None:
    dense = matquant.load(checkpoint("llama"), 4, plan={DOWN: 2}, dtype=torch.float32, kernels="none")
    model = matquant.load(checkpoint("llama"), 4, plan={DOWN: 2}, dtype=torch.float32, kernels="planes")
    assert torch.equal(model.get_submodule(DOWN).weight, dense.get_submodule(DOWN).weight)
    gradients = []
    for each in (dense, model):
        x = each.get_input_embeddings()(TOKENS).detach().requires_grad_()
        each(inputs_embeds=x).logits.square().mean().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"rule": "round"},
            "rule 'round' rounds, which needs a bit more than a width has; .* by 'prefix'",
        ),
        ({"group_size": 16}, "GPU planes take groups of a multiple of 32 inputs, found 16"),
    ],
)
def test_weights_that_planes_cannot_hold_are_rejected(
    options: dict[str, Any], reason: str, checkpoint: Callable[..., Path]
) -> None:
    message = rf"^kernels='planes' does not support .*: model.layers.0.\S+: {reason}; use kernels='auto' or 'none'$"
    with pytest.raises(matquant.InputError, match=message):
        matquant.load(checkpoint("llama", **options), kernels="planes")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kernels", ["auto", "int8", "planes", "none"])
def test_without_a_gpu_there_is_one_line(kernels: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(matquant.InputError, match=r"^device='cuda' is not available \(.*\); use one of cpu$"):
        matquant.load(checkpoint("llama"), device="cuda", kernels=kernels)


@pytest.mark.slow
def test_a_compiled_model_switches_width_without_compiling_again(checkpoint: Callable[..., Path]) -> None:
    graphs = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    dense = matquant.load(checkpoint("llama"), dtype=torch.float32, kernels="none")
    model = matquant.load(checkpoint("llama"), dtype=torch.float32, kernels="planes")
    compiled = torch.compile(model, backend=keep, fullgraph=True)
    for bits in (8, 4, 2):
        model.set_bits(bits)
        dense.set_bits(bits)
        with torch.no_grad():
            assert gap(compiled(TOKENS).logits, logits(dense)) < 1e-5
    assert len(graphs) == 1
