"""The contract of ARCHITECTURES: every row is a family of transformers, and does what its parts claim, or says so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import conftest
import matquant
from conftest import FAMILIES, HEADS, MOE, OTHERS, SMALL, make_model
from matquant.export import FORMATS, export
from matquant.format.read import open_checkpoint
from matquant.hf.families import ARCHITECTURES, supported
from matquant.hf_torch.layerwise import embed
from matquant.hf_torch.loading import load_float
from matquant.planning.budget import by_width
from matquant.system.errors import InputError
from readers import FLOAT32, READERS, ROUNDINGS, assert_slice

MORE: dict[str, Callable[[], Any]] = {
    # llama.cpp scales Gemma 2's attention by the size of a head
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, **HEADS, query_pre_attn_scalar=8),
    "smollm3": lambda: transformers.SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=2),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SMALL, **MOE, shared_expert_intermediate_size=48),
    "xglm": lambda: transformers.XGLMConfig(
        **{"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "vocab_size": 300},
        **{"max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 1},
    ),
}
MODELS = {make().model_type: make for make in [*FAMILIES.values(), *OTHERS.values(), *MORE.values()]}  # MORE last
IDS = np.random.default_rng(0).integers(0, 256, 20).tolist()
pytestmark = pytest.mark.parametrize("family", ARCHITECTURES)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Row -> a tiny random model of the family, made once."""
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(OTHERS, family, MODELS[family])
            patch.delitem(FAMILIES, family, raising=False)
            return root / family if (root / family).is_dir() else make_model(family, root / family)

    return get


@pytest.fixture(scope="module")
def checkpoint_of(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Row -> its nested checkpoint, under the rule that most formats hold, made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        out = root / family
        if not out.is_dir():
            conftest.quantize(model_of(family), out, method="rtn", scope="linears", rule="round", affine="none")
        return out

    return get


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([IDS])).logits[0].numpy()
    return found


def assert_same_logits(found: np.ndarray, expected: np.ndarray) -> None:
    gap = np.abs(found - expected).max() / np.abs(expected).max()
    if not gap <= 1e-4:
        raise AssertionError(f"logits differ by {gap:.2e} of their size")


def test_a_row_is_a_family_that_loads_at_every_width(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = matquant.load(checkpoint_of(family), dtype=torch.float32)
    assert model.config.model_type == family
    whole = logits(model)
    model.set_bits(2)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(logits(model), whole)


def test_the_engine_decodes_what_it_claims(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of(family)
    if ARCHITECTURES[family].decode is None:
        with pytest.raises(InputError) as caught:
            matquant.Engine(directory)
        assert str(caught.value) == (
            f"{directory} is a {family} model, which the engine does not support; "
            f"it supports {', '.join(supported('decode'))}; use matquant.load for others"
        )
        return
    engine = matquant.Engine(directory, activations="float", threads=1)
    model = matquant.load(directory, dtype=torch.float32, kernels="none")
    for bits in (8, 4, 2):
        model.set_bits(bits)
        right, other = (
            engine.session(len(IDS)).extend(IDS, engine.widths(width), all_logits=True) for width in (bits, bits - 1)
        )
        assert_same_logits(right, logits(model))
        with pytest.raises(AssertionError, match="logits differ"):
            assert_same_logits(other, logits(model))


# the second version of GPTQ's layout stores other zero-points, which test_contract_formats.py reads
@pytest.mark.parametrize("to", [pytest.param(to, marks=pytest.mark.slow if to == "gptq_v2" else []) for to in FORMATS])
def test_it_is_exported_to_what_it_claims(
    family: str, to: str, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    row, directory = ARCHITECTURES[family], checkpoint_of(family)
    claims = {"gguf": row.gguf is not None, "mlx": row.mlx is not None, "gptq": row.gptq, "gptq_v2": row.gptq}
    experts = open_checkpoint(directory).spec.experts
    if experts is not None and claims.get(to, True):
        pytest.skip("tests/test_experts.py reads exports of experts that a model keeps in one tensor")
    out = tmp_path / f"out{FORMATS[to].suffix}"
    if not claims.get(to, True):
        part = to.removesuffix("_v2")
        with pytest.raises(InputError) as caught:
            export(directory, out, to=to, bits=4)
        assert str(caught.value).startswith(
            f"--to {to} does not support {family} models, only {', '.join(supported(part))}; use --to "
        )
        assert not list(tmp_path.iterdir())
        return
    export(directory, out, to=to, bits=4, dtype="float32" if to == "dense" else None)
    checkpoint = open_checkpoint(directory)
    for path in checkpoint.shapes:
        if to == "mlx" and checkpoint.shapes[path][1] % 32:
            continue  # no block of it holds such a weight, which stays dense
        weight = READERS[to](out, path, 4, checkpoint)
        assert_slice(weight, checkpoint, path, 4, ROUNDINGS.get(to, FLOAT32))
        with pytest.raises(AssertionError, match="is off by"):
            assert_slice(weight, checkpoint, path, 5, ROUNDINGS.get(to, FLOAT32))


def test_its_fused_linears_are_linears_of_one_block(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    paths = list(open_checkpoint(checkpoint_of(family)).shapes)
    groups = by_width(paths, fused=True)
    assert sorted(path for group in groups for path in group) == sorted(paths)
    for names in ARCHITECTURES[family].fused:
        parents = {path.rpartition(".")[0] for path in paths if path.rpartition(".")[2] == names[0]}
        assert parents, f"{family} has no {names[0]}"
        for parent in parents:
            assert any({f"{parent}.{name}" for name in names} <= set(group) for group in groups), parent


def test_its_layers_are_called_one_after_the_other_or_not_at_all(family: str, model_of: Callable[[str], Path]) -> None:
    model, tokens = load_float(model_of(family), dtype=torch.float32), torch.tensor([IDS])
    if ARCHITECTURES[family].per_sequence:
        with pytest.raises(InputError, match="its layers take arguments per sequence"):
            embed(model, [tokens])
        return
    (states,), calls = embed(model, [tokens])
    assert states.shape[:2] == tokens.shape
    assert len(calls) == model.config.num_hidden_layers


def test_the_master_is_a_stock_int8_model(family: str, checkpoint_of: Callable[[str], Path]) -> None:
    experts = open_checkpoint(checkpoint_of(family)).spec.experts
    if experts is not None and not experts.stock:  # nothing stock holds them: loading says what to do
        with pytest.raises(ValueError, match=r"load with matquant\.MatQuantConfig"):
            transformers.AutoModelForCausalLM.from_pretrained(checkpoint_of(family))
        return
    stock = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_of(family), dtype=torch.float32).eval()
    assert_same_logits(logits(stock), logits(matquant.load(checkpoint_of(family), dtype=torch.float32, kernels="none")))
