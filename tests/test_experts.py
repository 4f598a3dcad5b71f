"""Experts in one tensor (gpt-oss, Llama 4, Granite MoE): a nested weight per expert and projection, and back again."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import conftest
import matquant
from cases import each
from matquant.core.experts import Experts, is_router
from matquant.core.nest import MASTER_BITS
from matquant.core.spec import Plan
from matquant.export import FORMATS, export
from matquant.format.read import open_checkpoint
from matquant.hf_torch.layers import decoder_layers, linear_views
from matquant.hf_torch.loading import load_float
from matquant.methods.parts.blocks import Block
from matquant.methods.parts.experts import few_notice
from matquant.methods.parts.hessians import collect_hessians
from matquant.methods.parts.share import deal
from matquant.report.facts import made_facts
from matquant.system.errors import InputError

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "format.md"
WHOLE = ["gpt_oss", "llama4", "granitemoe"]
STOCK = ["llama4"]  # stock transformers replaces its experts by linear layers
BLOCKS = {"gpt_oss": "mlp", "llama4": "feed_forward", "granitemoe": "block_sparse_moe"}
NAMES = {  # names of the two tensors in the model's files
    "gpt_oss": ("experts.gate_up_proj", "experts.down_proj"),
    "llama4": ("experts.gate_up_proj", "experts.down_proj"),
    "granitemoe": ("input_linear.weight", "output_linear.weight"),
}
NUMBER, INNER = 4, 48  # experts, intermediate features


def matrix(family: str, gate_up: torch.Tensor, down: torch.Tensor, expert: int, projection: str) -> torch.Tensor:
    """A projection of an expert as [N, K], by what the model's class says about its two tensors."""
    if projection == "down_proj":
        return down[expert] if family == "granitemoe" else down[expert].T
    up = projection == "up_proj"
    if family == "gpt_oss":
        return gate_up[expert][:, int(up) :: 2].T
    whole = gate_up[expert] if family == "granitemoe" else gate_up[expert].T
    return whole[INNER:] if up else whole[:INNER]


def experts_of(family: str) -> dict[str, tuple[int, int, str]]:
    return {
        f"model.layers.{layer}.{BLOCKS[family]}.experts.{expert}.{projection}": (layer, expert, projection)
        for layer in range(2)
        for expert in range(NUMBER)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }


def matrices(family: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """path -> the weight [N, K] of every expert in a model's files."""
    found = {}
    for path, (layer, expert, projection) in experts_of(family).items():
        block = f"model.layers.{layer}.{BLOCKS[family]}."
        pair = (state[block + name].float() for name in NAMES[family])
        found[path] = matrix(family, *pair, expert, projection)
    return found


def assert_equal_states(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        if not torch.equal(found[name], tensor):
            raise AssertionError(f"{name} differs")


@pytest.fixture(scope="module")
def checkpoints(family_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: conftest.quantize(family_model(name), root / name, method="rtn", scope="linears") for name in WHOLE}


@pytest.mark.parametrize("family", WHOLE)
def test_every_expert_and_projection_is_a_weight_of_its_own(
    family: str, checkpoints: dict[str, Path], family_model: Callable[[str], Path]
) -> None:
    checkpoint = open_checkpoint(checkpoints[family])
    weights = matrices(family, load_file(family_model(family) / "model.safetensors"))
    assert {path for path in checkpoint.shapes if ".experts." in path} == weights.keys()
    plain = checkpoint.plain_names()
    assert any("router" in name for name in plain), "the router stays float"
    assert not any(name.endswith(NAMES[family]) for name in plain)
    if family == "gpt_oss":
        assert "model.layers.0.mlp.experts.gate_up_proj_bias" in plain
    for path, weight in weights.items():
        nested = checkpoint.nested(path)
        step = np.broadcast_to(nested.scale, weight.shape)
        assert (np.abs(nested.read(MASTER_BITS) - weight.numpy()) <= 0.51 * step).all()
    first, other = next(iter(weights)), list(weights)[3]
    assert (np.abs(checkpoint.nested(first).read(MASTER_BITS) - weights[other].numpy()) > step.max()).any()
    assert checkpoint.spec.format == 6


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("llama4", marks=pytest.mark.slow), "granitemoe"])
def test_each_reader_gives_the_slice_in_the_models_own_form(
    family: str, checkpoints: dict[str, Path], family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """load, MatQuantConfig, and the dense and the split export, against the codes put in place by hand."""
    directory, original = checkpoints[family], load_file(family_model(family) / "model.safetensors")
    checkpoint = open_checkpoint(directory)
    bits = 3
    expected = {path: torch.from_numpy(checkpoint.nested(path).read(bits)) for path in experts_of(family)}
    export(directory, tmp_path / "dense", to="dense", bits=bits, overwrite=True)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in dense.items()} == {
        name: tensor.shape for name, tensor in original.items()
    }
    assert_equal_states(matrices(family, dense), expected)
    other = {path: torch.from_numpy(checkpoint.nested(path).read(bits - 1)) for path in experts_of(family)}
    with pytest.raises(AssertionError, match="differs"):
        assert_equal_states(matrices(family, dense), other)
    export(directory, tmp_path / "split", to="dense", bits=bits, split_experts=True, overwrite=True)
    split = load_file(tmp_path / "split" / "model.safetensors")
    assert_equal_states({path: split.pop(f"{path}.weight") for path in expected}, expected)
    assert_equal_states(split, {name: dense[name] for name in split})
    loaded = matquant.load(directory, bits, kernels="none").state_dict()
    assert_equal_states(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict(), loaded)
    config = matquant.MatQuantConfig(bits=bits)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)
    assert_equal_states(model.state_dict(), loaded)
    model.save_pretrained(tmp_path / "saved")
    assert_equal_states(load_file(tmp_path / "saved" / "model.safetensors"), dense)
    with pytest.raises(ValueError, match="no --split-experts for transformers"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "split")


@pytest.mark.parametrize("family", [family for family in WHOLE if family not in STOCK])  # the others: test_families.py
def test_stock_transformers_rejects_what_it_would_misread(family: str, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"load with matquant\.MatQuantConfig"):
        AutoModelForCausalLM.from_pretrained(checkpoints[family])


def test_the_page_about_the_format_is_right(checkpoints: dict[str, Path]) -> None:
    section = DOCUMENT.read_text().split("\n## Experts in one tensor: format 6\n")[1].split("\n## ")[0]
    record, rejected = (json.loads(text) for text in re.findall(r"```json\n(.*?)```", section, flags=re.DOTALL))
    config = json.loads((checkpoints["gpt_oss"] / "config.json").read_text())["quantization_config"]
    assert config["matquant"]["experts"] == record
    assert {key: value for key, value in config.items() if key not in ("ignore", "matquant")} == rejected
    for family, name in zip(WHOLE, ("gpt-oss", "Llama 4", "Granite MoE"), strict=True):
        found = open_checkpoint(checkpoints[family]).spec.experts
        assert found is not None
        names = "`, `".join(found.names[kind] for kind in ("gate_up_proj", "down_proj"))
        flags = " | ".join("yes" if flag else "no" for flag in (found.transposed, found.interleaved, found.stock))
        assert f"| {name} | `{names}` | {flags} |" in section


def test_patched_experts_that_stay_float_are_not_for_stock_tools(
    family_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Stock transformers would replace the experts, and not find the weights of the linear layers."""
    out = conftest.quantize(
        family_model("llama4"), tmp_path / "out", method="rtn", scope="linears", exclude=[r"\.experts\."]
    )
    with pytest.raises(ValueError, match=r"load with matquant\.MatQuantConfig"):
        AutoModelForCausalLM.from_pretrained(out)
    config = matquant.MatQuantConfig(bits=4)
    found = AutoModelForCausalLM.from_pretrained(out, quantization_config=config).state_dict()
    assert_equal_states(found, matquant.load(out, 4, kernels="none").state_dict())


def test_other_formats_hold_experts_or_say_which_do(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for family, works in (("gpt_oss", "dense or matquant"), ("llama4", "compressed-tensors or dense or matquant")):
        for to in FORMATS.keys() - set(works.split(" or ")):
            with pytest.raises(InputError) as caught:
                export(checkpoints[family], tmp_path / "out", to=to, bits=4)
            assert str(caught.value).endswith(f"; use --to {works}")
    with pytest.raises(InputError) as caught:
        export(checkpoints["llama4"], tmp_path / "out", to="matquant", bits=4, split_experts=True)
    assert str(caught.value) == (
        "--split-experts is for --to dense, of quantised experts that the model keeps in one tensor; leave it out"
    )
    assert not (tmp_path / "out").exists()
    export(checkpoints["granitemoe"], tmp_path / "top", to="matquant", bits=3)
    found = matquant.load(tmp_path / "top", 3, kernels="none").state_dict()
    assert_equal_states(found, matquant.load(checkpoints["granitemoe"], 3, kernels="none").state_dict())


def test_a_plan_for_a_router_or_an_expert_that_is_not_there_says_so(checkpoints: dict[str, Path]) -> None:
    widths = open_checkpoint(checkpoints["gpt_oss"]).widths
    layer = "model.layers.1.mlp"
    assert widths(Plan(default=4, bits={f"{layer}.experts.3.up_proj": 2}))[f"{layer}.experts.3.up_proj"] == 2
    for path, reason in (
        (f"{layer}.experts.4.up_proj", f"which is not there: {layer} has the experts 0 to 3"),
        (f"{layer}.router", "a router, which stays float; leave it out"),
        (f"{layer}.shared_expert_gate", "a router, which stays float; leave it out"),
        (f"{layer}.experts.3.up", "which the model does not quantise; nearest: 'model.layers.1.mlp.experts.3.up_proj'"),
    ):
        with pytest.raises(InputError) as caught:
            widths(Plan(default=4, bits={path: 2}))
        assert str(caught.value) == f"the plan names {path!r}, {reason}"


@each("name", ["router", "router.proj", "gate", "gate.wg", "shared_expert_gate"])
def test_a_linear_layer_in_a_router_is_a_router(name: str) -> None:
    assert is_router(f"model.layers.0.mlp.{name}")
    assert not is_router("model.layers.0.mlp.shared_expert.gate_proj")


def test_routers_stay_float_and_shared_experts_do_not(family_model: Callable[[str], Path], tmp_path: Path) -> None:
    out = conftest.quantize(family_model("qwen2_moe"), tmp_path / "out", method="rtn", scope="linears")
    checkpoint = open_checkpoint(out)
    assert "model.layers.0.mlp.shared_expert.up_proj" in checkpoint.shapes
    assert {f"model.layers.0.mlp.{name}.weight" for name in ("gate", "shared_expert_gate")} <= set(
        checkpoint.plain_names()
    )


def test_more_experts_per_token_than_there_are_is_an_error(
    family_model: Callable[[str], Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for source, use in ((family_model("granitemoe"), conftest.quantize), (checkpoints["granitemoe"], matquant.load)):
        copy = tmp_path / use.__name__
        copy.mkdir()
        for file in source.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 5}))
        with pytest.raises(InputError) as caught:
            use(copy, tmp_path / "out", method="rtn") if use is conftest.quantize else use(copy, check_hashes=False)
        assert f"{copy / 'config.json'} has num_experts_per_tok=5, but a layer has 4 experts" in str(caught.value)
    assert not (tmp_path / "out").exists()


# How the tensors are divided -----------------------------------------------------------------------------------------


@each("transposed", [False, True])
@each("interleaved", [False, True])
def test_the_places_of_a_tensor_cover_it_once(transposed: bool, interleaved: bool) -> None:
    layout = Experts(
        names={"gate_up_proj": "x", "down_proj": "y"}, transposed=transposed, interleaved=interleaved, stock=False
    )
    for kind, shape in (("gate_up_proj", (3, 10, 6)), ("down_proj", (3, 6, 5)), ("gate_up_proj", (1, 2, 2))):
        whole = np.arange(np.prod(shape)).reshape(shape)
        found = {}
        for key, (size, stride, offset) in layout.places(kind, shape).items():
            strides = tuple(8 * step for step in stride)
            found[key] = np.lib.stride_tricks.as_strided(whole.reshape(-1)[offset:], size, strides)
        assert sorted(np.concatenate([part.reshape(-1) for part in found.values()])) == list(whole.reshape(-1))
        joined = layout.join({f"b.experts.{key}": part.shape for key, part in found.items()})
        assert {name: tensor.shape for name, tensor in joined.items()} == {f"b.{layout.names[kind]}": shape}


def test_a_tensor_that_lacks_an_expert_is_damage(checkpoints: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(checkpoints["gpt_oss"])
    shapes = {path: shape for path, shape in checkpoint.shapes.items() if ".experts.2.gate_proj" not in path}
    with pytest.raises(InputError, match=r"mlp\.experts\.gate_up_proj is made of 7 weights that do not fit together"):
        dataclasses.replace(checkpoint, shapes=shapes).model_shapes()


def test_a_damaged_record_is_an_error() -> None:
    good = {"names": {"down_proj": "experts.down_proj"}, "transposed": True, "interleaved": False, "stock": True}
    assert dataclasses.asdict(Experts.from_json(good, where="config.json")) == good
    bad = ({}, [], {**good, "stock": 1}, {**good, "names": {"w1": "x"}}, {**good, "names": {"down_proj": 3}})
    for values in (*bad, {**good, "more": 1}):
        with pytest.raises(InputError, match=r'config\.json has experts=.*, which must be an object with "names"'):
            Experts.from_json(values, where="config.json")


# Calibration ---------------------------------------------------------------------------------------------------------


def inputs_of(
    family: str, block: Any, rows: np.ndarray, expert: int, *, everywhere: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens of an expert, or all, and what its first and its last projection get for them, in numpy."""
    router, tensors = block.router, {name: p.detach().numpy() for name, p in block.experts.named_parameters()}
    logits = rows @ router.weight.detach().numpy().T
    if family == "gpt_oss":
        logits = logits + router.bias.detach().numpy()
    order = np.argsort(-logits, axis=1)[:, : router.top_k]
    if family == "llama4":
        best = order[:, :1]
        rows = rows / (1 + np.exp(-np.take_along_axis(logits, best, axis=1)))
    tokens = np.arange(len(rows)) if everywhere else np.flatnonzero((order == expert).any(axis=1))
    chosen = rows[tokens]
    weight = tensors["gate_up_proj"][expert]
    inner = chosen @ (weight.T if family == "granitemoe" else weight)
    if family == "gpt_oss":
        inner = inner + tensors["gate_up_proj_bias"][expert]
        gate, up = np.minimum(inner[:, ::2], 7.0), np.clip(inner[:, 1::2], -7.0, 7.0)
        return tokens, chosen, (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    gate, up = inner[:, :INNER], inner[:, INNER:]
    return tokens, chosen, up * gate / (1 + np.exp(-gate))


@pytest.mark.parametrize("family", WHOLE)
def test_hessians_are_of_the_tokens_routed_or_with_too_few_of_all(
    family: str, family_model: Callable[[str], Path]
) -> None:
    model = load_float(family_model(family), dtype=torch.float32)
    (name, module), path = decoder_layers(model)[0], BLOCKS[family]
    views = {
        key: view for key, view in linear_views(model).items() if key.startswith(f"{name}.") and ".experts." in key
    }
    tokens = torch.randn(3, 40 if family == "llama4" else 25, 32, generator=torch.Generator().manual_seed(3))
    outputs = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(4))
    outputs *= torch.logspace(-1, 2, tokens.shape[1])[:, None]
    experts, share = getattr(module, path), deal(3, 2, steps=False, ordered=False)
    with torch.no_grad():
        if family == "gpt_oss":
            for bias in (experts.experts.gate_up_proj_bias, experts.router.bias):
                bias.normal_(generator=torch.Generator().manual_seed(1))
    block = Block(
        index=0,
        count=1,
        name=name,
        module=module,
        views=views,
        inputs={8: [tokens[:2], tokens[2:]]},
        share=share,
        call=lambda module, states: (getattr(module, path)(states), outputs[: len(states)])[1],
        config=model.config,
    )
    found = collect_hessians(block)
    rows = tokens.reshape(-1, 32).numpy()
    lengths = np.sqrt((torch.cat([outputs[:2], outputs[:1]]).reshape(-1, 32).numpy() ** 2).mean(axis=1))
    few, kinds = {}, set()
    for expert in range(NUMBER):
        given = [inputs_of(family, experts, rows, expert, everywhere=flag) for flag in (False, True)]
        count = len(given[0][0])
        for projection, part in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 2)):
            number, inputs = (given[count < given[0][part].shape[1]][at] for at in (0, part))
            inputs = inputs / lengths[number, None] ** 0.25
            key = f"{name}.{path}.experts.{expert}.{projection}"
            hessian = found.of[found.leaders[key]].numpy()
            np.testing.assert_allclose(hessian, inputs.T @ inputs, rtol=1e-3, atol=1e-4 * np.abs(hessian).max())
            kinds.add(count < given[0][part].shape[1])
            if count < given[0][part].shape[1]:
                few[f"{name}.{path}.experts.{expert}"] = count
    assert kinds == {False, True}, "both cases are there"
    assert (found.few, found.experts) == (few, NUMBER)


@pytest.mark.slow
def test_experts_with_few_tokens_are_named_in_the_log_and_counted_in_the_report(
    family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    notices: list[str] = []
    options = {"method": "gptq", "samples": 2, "seq_len": 32, "batch_size": 2, "objective": "8", "sweeps": 0}
    out = matquant.quantize(
        family_model("gpt_oss"),
        tmp_path / "out",
        text=[text_file],
        scope="ffn",
        affine="none",
        report=lambda record: notices.append(str(record.get("notice", ""))),
        **options,
    )
    records = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    few = {name: tokens for record in records for name, tokens in record.get("few_tokens", {}).items()}
    assert few
    assert max(few.values()) < INNER
    checkpoint = open_checkpoint(out)
    with (out / "training.jsonl").open("a") as log:
        log.write("[" * 100_000)  # a damaged line, too deep for a reader of JSON
    facts = dict(made_facts(checkpoint))
    assert facts["experts calibrated on the whole layer's tokens, having seen too few"] == str(len(few))
    named = "".join(notices)
    assert all(f"{name.rpartition('.')[2]} ({tokens})" in named for name, tokens in few.items())


def test_a_notice_names_few_experts() -> None:
    text = few_notice("model.layers.0", {f"model.layers.0.mlp.experts.{n}": n for n in range(100)}, 128)
    assert text == (
        "model.layers.0: 100 of 128 experts saw fewer tokens than they have input features: "
        "0 (0), 1 (1), 2 (2), 3 (3), 4 (4), 5 (5), 6 (6), 7 (7) and 92 more; "
        "they use the statistics of all tokens of the layer"
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"method": "gptq", "samples": 8, "seq_len": 32, "batch_size": 4}])
def test_deepseek_is_quantised_and_stays_a_stock_model(
    options: dict[str, Any], family_model: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    model = family_model("deepseek_v3")
    text = {"text": [text_file]} if options else {}
    out = conftest.quantize(model, tmp_path / "out", **{"method": "rtn", "scope": "linears", **options, **text})
    tokens = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    exact = load_float(model, dtype=torch.float32)
    with torch.no_grad():
        found, wanted = stock(tokens).logits, exact(tokens).logits
        served = matquant.load(out, bits=8, dtype=torch.float32, kernels="none")(tokens).logits
        narrow = matquant.load(out, bits=2, dtype=torch.float32, kernels="none")(tokens).logits
    assert torch.equal(found, served)
    assert (served - wanted).norm() < 0.2 * wanted.norm() < (narrow - wanted).norm()
    paths = open_checkpoint(out).shapes
    assert "model.layers.1.mlp.experts.3.down_proj" in paths
    assert "model.layers.1.mlp.shared_experts.up_proj" in paths
    assert "model.layers.1.self_attn.kv_b_proj" in paths
    assert not any(path.endswith("mlp.gate") for path in paths), "the router stays float"
