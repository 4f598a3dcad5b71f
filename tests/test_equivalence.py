"""Equivalent transformations: in float they change nothing, whatever the family, and a wrong row is noticed."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import FAMILIES
from matquant.hf import families
from matquant.hf.families import ARCHITECTURES, Equivalence, Family, supported
from matquant.hf_torch.layers import decoder_layers, select_linears
from matquant.hf_torch.layerwise import embed
from matquant.hf_torch.loading import load_float
from matquant.methods.parts import equivalence

TOKENS = torch.arange(3, 60).reshape(3, 19)
# Rows that hold per layer: with FFN linears quantised alone, and with all linears.
HOLDING = {
    "llama": (2, 4),
    "mistral": (2, 4),
    "gemma2": (2, 4),
    "gemma3": (2, 4),
    "qwen2": (2, 4),
    "qwen3": (2, 4),
    "phi3": (2, 4),
    "opt": (2, 4),
    "gpt_neox": (1, 3),
    "qwen3_moe": (0, 2),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def lively(directory: Path) -> Any:
    """A model whose norms and biases are not the ones and zeros of an untrained one."""
    model = load_float(directory, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def layers_of(model: Any, scope: str) -> list[tuple[str, dict[str, torch.Tensor], list[equivalence.Bound]]]:
    quantised = {view.parameter for view in select_linears(model, scope).values()}
    found = []
    for name, layer in decoder_layers(model):
        tensors = {f"{name}.{local}": parameter.detach() for local, parameter in layer.named_parameters()}
        rows = equivalence.candidates(name, tensors, config=model.config, quantised=quantised)
        found.append((name, tensors, rows))
    return found


def random_transform(row: equivalence.Bound, tensors: Mapping[str, torch.Tensor]) -> equivalence.Transform:
    empty = equivalence.start(row, tensors)
    log_scale, shift = torch.randn(2, len(empty.unit))
    return dataclasses.replace(empty, log_scale=log_scale, shift=None if empty.shift is None else shift)


def write(model: Any, changed: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in changed.items():
            model.get_parameter(name).copy_(tensor)


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    gap = (found - expected).abs().max() / expected.abs().max()
    if gap > 2e-5:
        raise AssertionError(f"logits differ by {gap:.2e} of their size")


@pytest.mark.parametrize("stored", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["ffn", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_transformations_leave_the_float_model_as_it_is(
    family: str, scope: str, stored: torch.dtype | None, family_model: Callable[[str], Path]
) -> None:
    model = lively(family_model(family))
    norms = [name for name, tensor in model.named_parameters() if "norm" in name and name.endswith("weight")]
    dtypes = {} if stored is None else dict.fromkeys(norms, stored)
    if stored is not None:  # a checkpoint of that dtype holds nothing else
        write(model, {name: model.get_parameter(name).to(stored).float() for name in norms})
    expected = logits(model)
    wrong = dict.fromkeys(HOLDING, 0)
    for _, tensors, rows in layers_of(model, scope):
        assert len(rows) == HOLDING[family][scope == "all"]
        transforms = [random_transform(row, tensors) for row in rows]
        changed = equivalence.fold(rows, transforms, tensors, dtypes=dtypes)
        for name, tensor in changed.items():
            assert name not in dtypes or torch.equal(tensor.to(stored).float(), tensor)
            wrong[family] += not torch.allclose(tensor, tensors[name], rtol=0.1)
        write(model, changed)
    assert_same_logits(logits(model), expected)
    assert wrong[family] > 0 or not HOLDING[family][scope == "all"], "nothing was transformed"
    if changed:
        name = next(iter(changed))
        write(model, {name: changed[name] * (1 + 0.05 * torch.randn_like(changed[name]))})
        with pytest.raises(AssertionError, match="differ"):
            assert_same_logits(logits(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_transformation_changes_no_bit(family: str, family_model: Callable[[str], Path]) -> None:
    model = lively(family_model(family)).bfloat16().float()
    expected = logits(model)
    for _, tensors, rows in layers_of(model, "all"):
        transforms = [equivalence.start(row, tensors) for row in rows]
        changed = equivalence.fold(rows, transforms, tensors, dtypes=dict.fromkeys(tensors, torch.bfloat16))
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in changed.items())
        write(model, changed)
    assert torch.equal(logits(model), expected)


def bind_first(model: Any, scope: str = "all") -> tuple[tuple[equivalence.Bound, ...], str]:
    """``bind`` on the model's first layer and its real input."""
    hidden, calls = embed(model, [TOKENS])
    name, layer = decoder_layers(model)[0]
    tensors = {f"{name}.{local}": parameter.detach() for local, parameter in layer.named_parameters()}

    def run(changed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own = {local: changed[f"{name}.{local}"] for local, _ in layer.named_parameters()}
        before = {local: parameter.detach().clone() for local, parameter in layer.named_parameters()}
        with torch.no_grad():
            for local, parameter in layer.named_parameters():
                parameter.copy_(own[local])
            added = calls[0](layer, hidden[0]) - hidden[0]
            for local, parameter in layer.named_parameters():
                parameter.copy_(before[local])
        return added

    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    quantised = {view.parameter for view in select_linears(model, scope).values()}
    return equivalence.bind(name, tensors, config=model.config, quantised=quantised, run=run)


def test_every_family_with_equivalences_is_tried() -> None:
    assert {FAMILIES[family]().model_type for family in HOLDING} == set(supported("equivalences"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_of_the_table_holds_on_a_real_layer(family: str, family_model: Callable[[str], Path]) -> None:
    rows, notice = bind_first(lively(family_model(family)))
    assert (len(rows), notice) == (HOLDING[family][1], "")


def test_a_wrong_row_is_dropped_and_said_so(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Equivalence(source="mlp.gate_proj", consumers=("mlp.down_proj",))  # the activation lets nothing through
    rows = (*(ARCHITECTURES["llama"].equivalences or ()), wrong)
    monkeypatch.setitem(ARCHITECTURES, "llama", Family(equivalences=rows))
    rows, notice = bind_first(lively(llama))
    assert len(rows) == 4
    assert notice == (
        "the equivalent transformations of model.layers.0.mlp.gate_proj "
        "do not hold for this llama model and are skipped"
    )


def test_an_unknown_family_is_clipped_only_and_said_so(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "ARCHITECTURES", {"opt": Family(equivalences=())})
    assert bind_first(lively(llama)) == (
        (),
        "llama has no equivalent transformations, only clipping is learned (known: opt)",
    )


@pytest.mark.parametrize(
    "changes",
    [{"do_layer_norm_before": False}, {"activation_function": "gelu"}, {"layer_norm_elementwise_affine": False}],
)
def test_variants_of_opt_lose_the_rows_that_do_not_hold(changes: dict[str, Any]) -> None:
    config = FAMILIES["opt"]()
    config.update(changes)
    torch.manual_seed(0)
    rows, notice = bind_first(transformers.AutoModelForCausalLM.from_config(config).eval())
    sources = {row.source.rpartition(".")[2] for row in rows}
    lost = {"fc1"} if "activation_function" in changes else {"self_attn_layer_norm", "final_layer_norm"}
    assert sources == {"self_attn_layer_norm", "v_proj", "final_layer_norm", "fc1"} - lost
    assert notice == ""


def test_a_norm_that_also_feeds_a_float_linear_is_left_alone(llama: Path) -> None:
    model = lively(llama)
    views = select_linears(model, "ffn", exclude=["gate_proj"])
    name, layer = decoder_layers(model)[0]
    tensors = {f"{name}.{local}": parameter.detach() for local, parameter in layer.named_parameters()}
    quantised = {view.parameter for view in views.values()}
    rows = equivalence.candidates(name, tensors, config=model.config, quantised=quantised)
    assert [row.source for row in rows] == [f"{name}.mlp.up_proj"]


def test_shifts_need_a_bias_on_both_sides(family_model: Callable[[str], Path]) -> None:
    for family, shifted in (("llama", 0), ("qwen2", 0), ("opt", 3), ("gpt_neox", 3)):
        _, _, rows = layers_of(lively(family_model(family)), "all")[0]
        assert sum(row.shift for row in rows) == shifted, family


def test_gradients_reach_scale_and_shift_through_rounded_norms(family_model: Callable[[str], Path]) -> None:
    _, tensors, rows = layers_of(lively(family_model("opt")), "all")[0]
    transforms = [random_transform(row, tensors) for row in rows]
    leaves = [leaf for t in transforms for leaf in (t.log_scale, t.shift) if leaf is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    totals = []
    for dtypes in ({}, dict.fromkeys(tensors, torch.bfloat16)):
        changed = equivalence.fold(rows, transforms, tensors, dtypes=dtypes)
        total = sum((tensor * torch.ones_like(tensor).cumsum(-1)).sum() for tensor in changed.values())
        totals.append(torch.autograd.grad(total, leaves))
    for exact, rounded in zip(*totals, strict=True):
        assert (exact - rounded).abs().max() < 0.02 * exact.abs().max()
