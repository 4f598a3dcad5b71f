"""The native decode step against transformers with the same slices, family by family, and its invariances."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import conftest
import matquant
from cases import each
from conftest import SMALL, make_tokenizer
from matquant import _native
from matquant.format.read import open_checkpoint
from matquant.format.write import write_checkpoint
from matquant.hf.architecture import read_architecture
from matquant.hf.families import supported

HEADS = {"head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# Two threads keep what they write, from q, k, v to the input of o and from gate, up to that of down; four the latter.
WHOLE = {"num_attention_heads": 8, "head_dim": 32, "intermediate_size": 512, "hidden_size": 128}
ODD = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Windows are shorter than the 40 tokens of IDS.
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "llama, tied, biases": lambda: transformers.LlamaConfig(
        **SMALL, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama, odd sizes": lambda: transformers.LlamaConfig(**{**SMALL, **ODD, "vocab_size": 301}),
    "llama, whole shares": lambda: transformers.LlamaConfig(**{**SMALL, **WHOLE}, attention_bias=True, mlp_bias=True),
    "llama, llama3 rope": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama, linear rope": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=LINEAR),
    "llama, yarn rope": lambda: transformers.LlamaConfig(**SMALL, rope_parameters=YARN),
    "mistral, window": lambda: transformers.MistralConfig(**SMALL, sliding_window=7),
    "qwen2, window on a layer": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, **HEADS),
    "gemma2, window": lambda: transformers.Gemma2Config(**SMALL, **HEADS, sliding_window=7),
    "gemma3, window": lambda: transformers.Gemma3TextConfig(**SMALL, **HEADS, **MIXED, final_logit_softcapping=4.0),
    "smollm3, a layer without positions": lambda: transformers.SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "mixtral, window": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4, sliding_window=7),
    "qwen2_moe, window on a layer": lambda: transformers.Qwen2MoeConfig(
        **SMALL, **EXPERTS, num_experts=5, shared_expert_intermediate_size=40, use_sliding_window=True, sliding_window=7
    ),
    "gpt_oss, window on a layer": lambda: transformers.GptOssConfig(
        **SMALL, **HEADS, num_local_experts=5, num_experts_per_tok=2, sliding_window=7, swiglu_limit=1.5
    ),
    "qwen3_moe, a layer without experts": lambda: transformers.Qwen3MoeConfig(
        **SMALL, **HEADS, **EXPERTS, num_experts=5, norm_topk_prob=True, mlp_only_layers=[0]
    ),
}
IDS = np.random.default_rng(0).integers(0, 256, 40).tolist()


def make(config: Any, directory: Path) -> Path:
    """A tiny random model with a tokenizer. Biases and norm weights are random too: by default they would not show."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "norm" in name else 1.0))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def checkpoints(root: Path, configs: Mapping[str, Callable[[], Any]]) -> Callable[..., Path]:
    """Return (a key of ``configs``, options of quantize) -> the checkpoint, made once under ``root``."""

    def get(case: str, **options: Any) -> Path:
        name = "-".join([*case.replace(",", "").split(), *map(str, options.values())])
        if not (root / name).is_dir():
            if not (root / f"{name}.float").is_dir():
                make(configs[case](), root / f"{name}.float")
            conftest.quantize(root / f"{name}.float", root / name, method="rtn", **{"scope": "all", **options})
        return root / name

    return get


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return checkpoints(tmp_path_factory.mktemp("runtime"), CONFIGS)


@pytest.fixture(autouse=True)
def default_kernels() -> Iterator[None]:
    best = _native.isa()
    yield
    _native.use_isa(best)


def transformers_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([ids])).logits[0].float().numpy()
    return logits


def native_logits(engine: matquant.Engine, ids: list[int], bits: Any = None, plan: Any = None) -> np.ndarray:
    return engine.session(len(ids)).extend(ids, engine.widths(bits, plan), all_logits=True)


def one_by_one(engine: matquant.Engine, ids: list[int], bits: int) -> np.ndarray:
    session = engine.session(len(ids))
    return np.stack([session.extend([token], engine.widths(bits)).copy() for token in ids])


def assert_same_logits(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    gap = np.abs(found - expected).max() / np.abs(expected).max()
    if not gap <= tolerance:
        raise AssertionError(f"logits differ by {gap:.2e} of their size")


# ------------------------------------------------------------------------------------------------------------ exactness


def test_every_family_that_is_decoded_is_tried() -> None:
    assert {make_config().model_type for make_config in CONFIGS.values()} == set(supported("decode"))


@pytest.mark.parametrize("case", CONFIGS)
def test_exact_logits_are_those_of_transformers_with_the_same_slices(
    case: str, checkpoint_of: Callable[..., Path]
) -> None:
    directory = checkpoint_of(case)
    engine = matquant.Engine(directory, activations="float", threads=1)
    model = matquant.load(directory, dtype=torch.float32, kernels="none")
    for bits in (8, 5, 4, 3, 2):
        model.set_bits(bits)
        expected = transformers_logits(model, IDS)
        assert_same_logits(native_logits(engine, IDS, bits), expected, 1e-5)
        with pytest.raises(AssertionError, match="logits differ"):
            assert_same_logits(native_logits(engine, IDS, bits - 1), expected)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_prompt_read_at_once_equals_one_token_at_a_time(case: str, checkpoint_of: Callable[..., Path]) -> None:
    for activations in ("int8", "float"):
        engine = matquant.Engine(checkpoint_of(case), activations=activations, threads=1)
        alone = one_by_one(engine, IDS, 3)
        np.testing.assert_array_equal(native_logits(engine, IDS, 3), alone)
        session = engine.session(len(IDS))  # only the last row of a prompt has logits
        np.testing.assert_array_equal(session.extend(IDS[:-2], engine.widths(3)), alone[-3])
        np.testing.assert_array_equal(session.extend(IDS[-2:], engine.widths(3)), alone[-1])


@pytest.mark.parametrize("scope", ["all", "ffn", "attention"])
@pytest.mark.parametrize("case", ["llama, whole shares", "llama, odd sizes", "gemma2, window"])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_one_token_at_a_time_is_the_same_for_any_number_of_threads(
    activations: str, case: str, scope: str, checkpoint_of: Callable[..., Path]
) -> None:
    directory, ids = checkpoint_of(case, scope=scope), IDS[:12]  # longer than the window
    alone = one_by_one(matquant.Engine(directory, activations=activations, threads=1), ids, 3)
    for threads in (2, 3, 4):
        engine = matquant.Engine(directory, activations=activations, threads=threads)
        np.testing.assert_array_equal(one_by_one(engine, ids, 3), alone)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "round"},
        {"rule": "extra"},
        {"grid": "companded"},
        {"grid": "companded", "group_size": 16, "affine": "none"},
        {"group_size": 16},
        {"symmetric": False, "group_size": 16},
        {"affine": "none", "scale_dtype": "float32"},
        {"scope": "ffn"},
        {"scope": "attention"},
    ],
    ids=str,
)
def test_rules_grids_groups_zeros_and_scopes_are_exact_too(
    options: dict[str, Any], checkpoint_of: Callable[..., Path]
) -> None:
    directory = checkpoint_of("llama", **options)
    engine = matquant.Engine(directory, activations="float", threads=1)
    model = matquant.load(directory, dtype=torch.float32, kernels="none")
    for bits in (8, 4, 2):
        model.set_bits(bits)
        assert_same_logits(native_logits(engine, IDS, bits), transformers_logits(model, IDS), 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_out_of_scope_are_read_in_the_dtype_they_are_stored_in(
    dtype: str, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint_of("llama")
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of("llama").with_name("llama.float"))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
    make_tokenizer().save_pretrained(tmp_path / "half")
    directory = conftest.quantize(tmp_path / "half", tmp_path / "out", method="rtn", scope="ffn")
    engine = matquant.Engine(directory, activations="float", threads=1)
    model = matquant.load(directory, 4, dtype=torch.float32, kernels="none")
    assert_same_logits(native_logits(engine, IDS, 4), transformers_logits(model, IDS), 1e-5)
    stored = sum(matrix.numel() * 2 for name, matrix in model.named_parameters() if "self_attn" in name)
    assert engine.model.plain_bytes == stored + model.lm_head.weight.numel() * 2


def test_a_plan_gives_each_matrix_its_width(checkpoint_of: Callable[..., Path]) -> None:
    directory = checkpoint_of("llama")
    plan = {"model.layers.0.self_attn.q_proj": 8, "model.layers.1.mlp.down_proj": 3}
    engine = matquant.Engine(directory, activations="float", threads=1)
    expected = transformers_logits(matquant.load(directory, 2, plan=plan, dtype=torch.float32, kernels="none"), IDS)
    assert_same_logits(native_logits(engine, IDS, 2, plan), expected, 1e-5)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_same_logits(native_logits(engine, IDS, 2), expected)


def test_the_embedded_model_is_exact(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parents[1] / "examples" / "reference" / "model"
    directory = conftest.quantize(source, tmp_path / "out", method="rtn")
    assert_model_is_exact(directory)


def test_stories260k_is_exact(data: Path, tmp_path: Path) -> None:
    directory = conftest.quantize(data / "models" / "stories260K", tmp_path / "out", method="rtn", scope="all")
    assert_model_is_exact(directory)


def assert_model_is_exact(directory: Path) -> None:
    ids = np.random.default_rng(1).integers(3, 500, 48).tolist()
    engine = matquant.Engine(directory, activations="float", threads=1)
    model = matquant.load(directory, dtype=torch.float32, kernels="none")
    for bits in (8, 2):
        model.set_bits(bits)
        assert_same_logits(native_logits(engine, ids, bits), transformers_logits(model, ids))


# ---------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("case", ["llama, odd sizes", "gemma2, window"])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_results_depend_neither_on_threads_nor_on_the_instruction_set(
    case: str, activations: str, checkpoint_of: Callable[..., Path]
) -> None:
    directory = checkpoint_of(case)
    results = []
    for isa in reversed(_native.isas()):  # the best one is in use afterwards
        _native.use_isa(isa)
        for threads in (1, 2, 3) if isa != "scalar" else (1,):
            engine = matquant.Engine(directory, activations=activations, threads=threads)
            results.append(native_logits(engine, IDS[:20], 3))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_products_of_many_tokens_give_the_bits_of_one(dtype: torch.dtype, tmp_path: Path) -> None:
    """Four rows and four tokens at a time on AVX-512: whole parts of 64 inputs, then 16, then 12; 19 tokens."""
    sizes = {"hidden_size": 156, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 78, "vocab_size": 301}
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**SMALL, **sizes})).to(dtype)
    model.save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    out = conftest.quantize(tmp_path / "float", tmp_path / "out", method="rtn", scope="ffn", group_size=None)
    for isa in reversed(_native.isas()):  # the best one is in use afterwards
        _native.use_isa(isa)
        engine = matquant.Engine(out, threads=1)
        together = native_logits(engine, IDS[:19], 8)
        np.testing.assert_array_equal(together, one_by_one(engine, IDS[:19], 8))
        scratch = np.full((25, 301), np.nan, dtype=np.float32)
        found = engine.session(19).extend(IDS[:19], engine.widths(8), into=scratch)
        np.testing.assert_array_equal(found, together)
        assert np.isnan(scratch[19:]).all()


@pytest.mark.parametrize("count", [2, 3, 9])
def test_sequences_decoded_together_give_what_each_gives_alone(count: int, checkpoint_of: Callable[..., Path]) -> None:
    engine = matquant.Engine(checkpoint_of("qwen3"), threads=1)
    prompts = [IDS[i : i + 3 + i] for i in range(count)]
    widths = engine.widths(4)
    alone = []
    for ids in prompts:
        session = engine.session(len(ids) + 1)
        session.extend(ids, widths)
        alone.append(session.extend([7], widths).copy())
    caches, workspace = [], _native.Workspace(engine.model.native, count, 64, 1)
    logits = np.empty((count, SMALL["vocab_size"]), dtype=np.float32)
    step = (engine.model.native, widths, False)
    for ids in prompts:
        caches.append(_native.Cache(engine.model.native, 64, False))
        for position, token in enumerate(ids):
            _native.step(*step, [token], [position], caches[-1:], 1, logits[:0], workspace)
    _native.step(*step, [7] * count, [len(ids) for ids in prompts], caches, 0, logits, workspace)
    np.testing.assert_array_equal(logits, np.stack(alone))


def test_the_profile_adds_up_to_the_time_of_the_step(checkpoint_of: Callable[..., Path]) -> None:
    engine = matquant.Engine(checkpoint_of("llama"), threads=1)
    session = engine.session(40)
    session.extend(IDS, engine.widths(8))
    assert set(session.workspace.seconds().values()) == {0.0}
    session.rewind(0)
    session.workspace.profile = True
    session.extend(IDS, engine.widths(8))
    parts = session.workspace.seconds()
    assert set(parts) == {"norm", "quantise", "qkv", "attention", "o", "gate_up", "activation", "down", "head", "wait"}
    assert parts.pop("wait") == 0  # a thread alone
    assert all(0 < seconds < 10 for seconds in parts.values())


def test_the_native_step_refuses_what_would_write_outside(checkpoint_of: Callable[..., Path]) -> None:
    native = matquant.Engine(checkpoint_of("llama"), max_bits=4, threads=1).model.native
    cache, workspace = _native.Cache(native, 16, False), _native.Workspace(native, 2, 16, 1)
    logits = np.empty((2, 300), dtype=np.float32)
    good: dict[str, Any] = {
        "bits": np.full(16, 4, np.uint8),
        "tokens": [1, 2],
        "positions": [0, 1],
        "caches": [cache],
        "first_logit": 0,
        "logits": logits,
    }
    bad: list[tuple[str, Any, str]] = [
        ("bits", np.full(16, 8, np.uint8), "a width is not held in memory"),
        ("bits", np.full(15, 4, np.uint8), "one width per matrix"),
        ("tokens", [1, 300], "not in the vocabulary"),
        ("tokens", [1, -1], "not in the vocabulary"),
        ("tokens", [1, 2, 3], "more tokens than the workspace"),
        ("positions", [0, 16], "beyond the cache"),
        ("caches", [cache] * 3, "one cache for all or per token"),
        ("caches", [_native.Cache(native, 32, False)], "beyond the cache"),
        ("first_logit", 3, "the logits have the wrong shape"),
        ("logits", logits[:1], "the logits have the wrong shape"),
    ]
    for name, value, message in bad:
        with pytest.raises(ValueError, match=message):
            _native.step(model=native, exact=False, workspace=workspace, **{**good, name: value})
    _native.step(model=native, exact=False, workspace=workspace, **good)


# ------------------------------------------------------------------------------------------------------------- families

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}
CLASSES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "smollm3": transformers.SmolLM3Config,
    "mixtral": transformers.MixtralConfig,
    "gpt_oss": transformers.GptOssConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}
FEW = {"num_experts_per_tok": 1, "moe_intermediate_size": 8}
FEW_EXPERTS: dict[str, dict[str, Any]] = {  # the default ones take gigabytes; tests/test_routing.py reads them
    "mixtral": {"num_local_experts": 2},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2_moe": {**FEW, "num_experts": 2, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**FEW, "num_local_experts": 2},
}
OLD_STYLE: list[tuple[str, dict[str, Any]]] = [
    *((family, FEW_EXPERTS.get(family, {})) for family in supported("decode")),
    ("qwen2_moe", {**FEW_EXPERTS["qwen2_moe"], "use_sliding_window": True, "max_window_layers": 3}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": {key: v for key, v in LLAMA3.items() if key != "rope_theta"}}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, "rope_theta": 1e6}),
    ("mistral", {"sliding_window": None, "head_dim": 32}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 5e3}),
    ("gemma3_text", {"sliding_window_pattern": 2}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 9, "no_rope_layer_interval": 3}),
]


@each(("family", "extra"), OLD_STYLE)
def test_what_an_old_config_leaves_out_means_what_transformers_says(family: str, extra: dict[str, Any]) -> None:
    found = read_architecture({"model_type": family, **SIZES, **extra}, where="here")
    config = CLASSES[family](**SIZES, **extra)
    default = {"pad_token_id": None} if family == "smollm3" else {}
    with torch.device("meta"):  # the shapes are asked for, not the numbers
        model = AutoModelForCausalLM.from_config(CLASSES[family](**SIZES, **extra, **default))
    rotary = type(model.model.rotary_emb)(config=model.config)
    assert found.kv_heads == config.num_key_value_heads
    assert found.head_dim == model.model.layers[0].self_attn.head_dim
    assert found.norm_eps == config.rms_norm_eps
    assert found.tied == config.tie_word_embeddings
    assert found.attention_scale == pytest.approx(model.model.layers[0].self_attn.scaling)
    attention = [layer.self_attn for layer in model.model.layers]
    whole = (getattr(config, "sliding_window", None) or 0,) * 8  # their layers do not say
    windows = (
        whole if family in ("mistral", "mixtral") else tuple(getattr(a, "sliding_window", None) or 0 for a in attention)
    )
    assert found.windows == windows
    assert [index >= 0 for index in found.ropes] == [bool(getattr(a, "use_rope", True)) for a in attention]
    for layer, index in enumerate(found.ropes):
        name = f"{config.layer_types[layer]}_inv_freq" if family == "gemma3_text" else "inv_freq"
        if index >= 0:
            np.testing.assert_allclose(found.frequencies[index], getattr(rotary, name).numpy(), rtol=1e-6)


@each(
    ("change", "message"),
    [
        ({"model_type": "opt"}, "is a opt model, which the engine does not support; it supports llama, mistral, "),
        ({"hidden_size": None}, "has hidden_size=None in config.json; it must be an integer above 0"),
        ({"num_key_value_heads": 3}, "has 32 heads, 3 key/value heads and head_dim 16; heads must be a multiple"),
        ({"layer_types": ["full_attention"]}, "has 1 layer_types for 8 layers; repair config.json"),
        ({"hidden_act": "gelu"}, "has the activation 'gelu'; the engine supports silu, swish, gelu_pytorch_tanh"),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor=0.5, which the engine does not support"),
        ({"rope_scaling": {"type": "dynamic"}}, "has rotary positions of type 'dynamic', partial_rotary_factor 1.0"),
        ({"rope_scaling": {"type": "linear"}}, "has linear rotary positions without 'factor'; repair config.json"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(matquant.InputError) as caught:
        read_architecture({"model_type": "llama", **SIZES, **change}, where="here")
    assert str(caught.value).startswith(f"here {message}")


def test_a_tensor_that_would_go_unused_is_refused(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint_of("qwen3"))
    items = [(path, opened.nested(path)) for path in opened.shapes]
    items += [(name, opened.array(name)) for name in opened.plain_names()]
    config = {**opened.config, "model_type": "llama"}
    write_checkpoint(tmp_path / "out", items, spec=opened.spec, config=config, ignore=opened.ignore, files={})
    with pytest.raises(matquant.InputError) as caught:
        matquant.Engine(tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'out'} has model.layers.0.self_attn.k_norm.weight, which the engine's llama does not use; "
        "use matquant.load"
    )


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(name: str, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint_of("llama", scope="linears"))
    items = [(path, opened.nested(path)) for path in opened.shapes]
    items += [(other, opened.array(other)) for other in opened.plain_names() if other != name]
    write_checkpoint(tmp_path / "out", items, spec=opened.spec, config=opened.config, ignore=(), files={})
    with pytest.raises(matquant.InputError) as caught:
        matquant.Engine(tmp_path / "out")
    assert str(caught.value) == f"{tmp_path / 'out'} lacks the tensor {name}; write the checkpoint again"


def test_a_config_of_other_sizes_is_refused(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_checkpoint(checkpoint_of("llama"))
    items = [(path, opened.nested(path)) for path in opened.shapes]
    items += [(name, opened.array(name)) for name in opened.plain_names()]
    for key, value, reason in (
        ("num_key_value_heads", 4, "model.layers.0.self_attn.k_proj.weight is 16 x 32, config.json needs 32 x 32"),
        ("vocab_size", 299, "model.embed_tokens.weight is 300 x 32, config.json needs 299 x 32"),
        ("head_dim", 16, "model.layers.0.self_attn.q_proj.weight is 32 x 32, config.json needs 64 x 32"),
    ):
        config, out = {**opened.config, key: value}, tmp_path / key
        write_checkpoint(out, items, spec=opened.spec, config=config, ignore=(), files={})
        with pytest.raises(matquant.InputError) as caught:
            matquant.Engine(out)
        assert str(caught.value) == f"{out} does not fit its config.json ({reason}); write the checkpoint again"


def test_damage_is_found_before_anything_is_decoded(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint_of("llama").iterdir():
        os.link(file, copy / file.name)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    with pytest.raises(matquant.InputError, match=r"config\.json"):
        matquant.Engine(copy)
    matquant.Engine(copy, check_hashes=False)
