"""compressed-tensors in stock transformers: the weights it computes with are the slice, bit for bit."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import conftest
from exports import nested_checkpoint
from matquant.core.grid import decode
from matquant.core.nest import slice_codes
from matquant.core.spec import Plan
from matquant.export import export
from matquant.export.containers import EXACT, MIDRANGE, read_affine
from matquant.format.read import Checkpoint, open_checkpoint
from matquant.hf_torch.layers import linear_views
from matquant.system.errors import InputError

TOKENS = torch.arange(3, 13)[None]
FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "opt", "gpt_neox", "qwen3_moe")


def seen(directory: Path) -> dict[str, np.ndarray]:
    """The weights of all linears, by path, as transformers has them after a forward pass."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        model(TOKENS)
    parameters = dict(model.named_parameters())
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    with torch.device("meta"):  # names and shapes
        model = AutoModelForCausalLM.from_config(config)
    views = linear_views(model)
    return {path: view.of(parameters[view.parameter].detach()).numpy() for path, view in views.items()}


def expected(checkpoint: Checkpoint, path: str, bits: int, zero_point: str) -> np.ndarray:
    tensor = checkpoint.nested(path)
    codes = slice_codes(tensor.codes, bits, rule=tensor.rule)
    found: np.ndarray = decode(codes, *read_affine(tensor, bits, zero_point=zero_point))
    return found


def assert_seen(source: Path, out: Path, plan: Mapping[str, int], zero_point: str = EXACT) -> None:
    checkpoint, found = open_checkpoint(source), seen(out)
    for path, bits in plan.items():
        np.testing.assert_array_equal(found[path], expected(checkpoint, path, bits, zero_point), err_msg=path)
        assert not np.array_equal(found[path], expected(checkpoint, path, bits - 1, zero_point)), (
            f"{path} of another width"
        )


@pytest.fixture(scope="module")
def checkpoint_of(family_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(family, options of quantize) -> the checkpoint, made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str, **options: Any) -> Path:
        out = root / "-".join([family, *map(str, options.values())])
        if not out.is_dir():
            conftest.quantize(family_model(family), out, method="rtn", scope="linears", **options)
        return out

    return get


# by default every family at 4 bits, and one with and one without experts at the others
@pytest.mark.parametrize(
    ("family", "bits"),
    [
        pytest.param(family, bits, marks=[] if bits == 4 or family in ("llama", "qwen3_moe") else pytest.mark.slow)
        for family in FAMILIES
        for bits in (8, 4, 3)
    ],
)
def test_uniform_slices_of_every_family(family: str, bits: int, checkpoint_of: Any, tmp_path: Path) -> None:
    source = checkpoint_of(family, rule="round", affine="none")
    export(source, tmp_path / "out", to="compressed-tensors", bits=bits)
    assert_seen(source, tmp_path / "out", dict.fromkeys(open_checkpoint(source).shapes, bits))


@pytest.mark.parametrize("rule", ["prefix", "round", "extra"])
@pytest.mark.parametrize("options", [{}, {"group_size": 16}])
def test_every_rule_with_zeros_in_the_middle(
    rule: str, options: dict[str, Any], checkpoint_of: Any, tmp_path: Path
) -> None:
    source = checkpoint_of("llama", rule=rule, symmetric=True, **options)
    for bits, width in {8: 8, 6: 6 + (rule != "round"), 2: 2 + (rule != "round")}.items():
        made = export(source, tmp_path / "out", to="compressed-tensors", bits=bits, zero_point=MIDRANGE, overwrite=True)
        assert made["containers"] == {f"int{width}": 14}
        assert_seen(source, tmp_path / "out", dict.fromkeys(open_checkpoint(source).shapes, bits), MIDRANGE)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "opt"])
def test_a_plan_gives_every_layer_its_width(family: str, checkpoint_of: Any, tmp_path: Path) -> None:
    source = checkpoint_of(family, rule="round", affine="none")
    paths = list(open_checkpoint(source).shapes)
    plan = {path: (2, 3, 4, 6, 8)[number % 5] for number, path in enumerate(paths)}
    export(source, tmp_path / "out", to="compressed-tensors", plan=Plan(default=None, bits=plan))
    assert_seen(source, tmp_path / "out", plan)


@pytest.mark.parametrize("options", [{}, {"group_size": 16}])
def test_asymmetric_zeros(options: dict[str, Any], checkpoint_of: Any, tmp_path: Path) -> None:
    source = checkpoint_of("llama", rule="round", symmetric=False, **options)
    export(source, tmp_path / "out", to="compressed-tensors", bits=8)
    assert_seen(source, tmp_path / "out", dict.fromkeys(open_checkpoint(source).shapes, 8))
    with pytest.raises(InputError, match="is not a multiple of 1/2; use --to dense, or --bits"):
        export(source, tmp_path / "other", to="compressed-tensors", bits=4)
    assert not (tmp_path / "other").exists()


def test_a_plan_with_zero_points_is_refused(tmp_path: Path) -> None:
    """transformers would read all of it with the type of the first group."""
    shapes = {"model.x": (8, 64), "model.y": (8, 64)}
    source = nested_checkpoint(tmp_path / "in", shapes, rule="round", symmetric=False, zero=64, own=False)
    with pytest.raises(InputError) as caught:
        export(source, tmp_path / "out", to="compressed-tensors", plan=Plan(default=8, bits={"model.y": 4}))
    assert str(caught.value) == (
        "--to compressed-tensors does not support uint8, uint4 together: transformers reads zero-points only if all "
        "layers have one type; use one width, or --to mlx or dense"
    )
    assert [item.name for item in tmp_path.iterdir()] == ["in"]


def test_a_plan_that_vllm_cannot_fuse_says_so(tmp_path: Path) -> None:
    """vLLM fuses q, k and v, and gate and up; transformers reads such a plan."""
    query, key, down = (f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.k", "mlp.down"))
    source = nested_checkpoint(tmp_path / "in", dict.fromkeys((query, key, down), (8, 64)), rule="round", own=False)
    said: dict[str, list[str]] = {"fused": [], "free": []}
    for name, bits in (("fused", {query: 4, key: 4}), ("free", {query: 4, down: 4})):
        plan = Plan(default=8, bits=bits)
        export(source, tmp_path / name, to="compressed-tensors", plan=plan, notice=said[name].append)
    told = (
        f"vLLM does not load this plan: it fuses {key} (int8) and {query} (int4); "
        "for vLLM make the plan with --fused, or serve the checkpoint itself"
    )
    assert said == {"fused": [], "free": [told]}


def test_experts_of_several_widths_are_refused(checkpoint_of: Any, tmp_path: Path) -> None:
    """transformers fuses them; attention may have another width."""
    source = checkpoint_of("qwen3_moe", rule="round", affine="none")
    paths = list(open_checkpoint(source).shapes)
    mixed = {path: 2 if "experts.0" in path else 4 for path in paths}
    with pytest.raises(InputError) as caught:
        export(source, tmp_path / "out", to="compressed-tensors", plan=Plan(default=None, bits=mixed))
    assert str(caught.value) == (
        "--to compressed-tensors does not support experts in int4, int2: transformers fuses experts and reads "
        "one type for all; use one width for all experts, or --to dense"
    )
    apart = {path: 4 if "experts" in path else 8 for path in paths}
    export(source, tmp_path / "out", to="compressed-tensors", plan=Plan(default=None, bits=apart))
    assert_seen(source, tmp_path / "out", apart)


def test_a_tied_head_stays_tied(family_model: Callable[[str], Path], checkpoint_of: Any, tmp_path: Path) -> None:
    source = checkpoint_of("gemma2", rule="round", affine="none")
    export(source, tmp_path / "out", to="compressed-tensors", bits=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
