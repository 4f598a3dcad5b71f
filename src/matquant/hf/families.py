"""Model families: ARCHITECTURES, one row per ``model_type`` of config.json.

The decode step, the exporters, the equivalences of OmniQuant and the planner each read a part of the same row. If a
part is None, the family is not supported there, and the error says so. A family without a row can still be quantised,
loaded in transformers, and exported to the formats that keep transformers' names.

Sources: transformers 5.23 (configuration and modeling file of each family), llama.cpp (convert_hf_to_gguf.py), mlx_lm
0.32 (models/), GPTQModel 7.6.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How a family names its experts, in the module ``block`` under the layer, and chooses among them.

    Experts are ``experts.0`` and so on; a shared one is ``shared_expert`` with its own gate.
    """

    block: str = "mlp"
    router: str = "gate"
    # gate, up and down of an expert
    gated: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    # the key of config.json with the size inside an expert
    size_key: str = "moe_intermediate_size"
    # the key of config.json that makes the weights of a token's experts add up to 1; "": they do
    renormalise_key: str = "norm_topk_prob"
    # the key of config.json with the size inside the shared expert; "": there is none
    shared_key: str = ""
    # whether biases are tensors of all experts, those of gate and up in turn
    joined_biases: bool = False


@dataclass(frozen=True, kw_only=True)
class Decode:
    """How the native decode step (native/decoder/model.hpp) runs a family.

    Biases are applied where the checkpoint has them.
    """

    # the decode step's name of a norm -> the checkpoint's name under the layer
    norms: Mapping[str, str]
    # added to a stored norm weight
    norm_offset: float = 0.0
    # the key of config.json that names the activation
    activation_key: str = "hidden_act"
    # whether embeddings are multiplied by sqrt(hidden size)
    scale_embedding: bool = False
    # the key of config.json that enables sliding windows; "": always enabled
    window_switch: str = ""
    # without layer_types in config.json, all layers but every n-th have a window; 1: all layers, 0: none
    window_period: int = 0
    # the tensor of a score per head that takes part in the softmax and has no value; "": none
    sinks: str = ""
    # whether gates are clamped (native/kernels/floats.hpp, clamped_times), with swiglu_alpha and swiglu_limit
    clamped: bool = False
    # for families with experts
    routing: Routing | None = None
    # whether layers may lack rotary positions
    no_rope: bool = False
    # whether layers with a window have separate rotary frequencies
    local_rope: bool = False
    # defaults of keys missing from config.json
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """A tensor and the linear layers that read it, which can be rescaled against each other
    (methods/parts/equivalence.py).

    Module names are relative to the decoder layer.
    """

    # the norm or linear layer whose output channels are divided
    source: str
    # the linear layers that read them; nothing else may
    consumers: tuple[str, ...]
    # position of the channels in a source linear layer: a key of LAYOUTS in methods/parts/equivalence.py
    layout: str = "each"
    # whether the norm multiplies by 1 + weight
    one_plus: bool = False
    # whether a shift passes unchanged from source to consumers
    shift: bool = False
    # an entry of config.json and the value that this equivalence requires
    needs: tuple[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """A family in llama.cpp."""

    # llama.cpp's name of the architecture
    name: str
    # whether rotary pairs are adjacent in queries and keys, and llama3's frequencies are a tensor
    interleaved: bool = False
    # suffixes of the supported biases; None: all
    biases: tuple[str, ...] | None = ("q_proj.bias", "k_proj.bias", "v_proj.bias")
    # whether it is Gemma 2: tanh GELU, soft caps, a tied head, and a window in every second layer
    gemma: bool = False
    # number of layers of the model whose attention is scaled by hidden size / heads; 0: none
    scaled_by_hidden: int = 0


@dataclass(frozen=True, kw_only=True)
class Mlx:
    """A family in mlx_lm."""

    # suffixes of the supported biases
    biases: tuple[str, ...] = ()
    # whether it is Gemma 2: tanh GELU, soft caps, a tied head, only default rotary positions
    gemma: bool = False
    # whether it reads head_dim instead of dividing the hidden size by the number of heads
    head_dim: bool = True
    # whether layer_types may have windows: beyond their length mlx_lm computes another model
    windows: bool = True
    # whether transformers has windows in this family whatever layer_types says
    always_windowed: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """A row of ARCHITECTURES."""

    # for the engine and everything that reads config.json exactly; None: not supported by the engine
    decode: Decode | None = None
    # for OmniQuant; None: clipping only
    equivalences: tuple[Equivalence, ...] | None = None
    # for --to gguf; None: not supported
    gguf: Gguf | None = None
    # for --to mlx; None: not supported
    mlx: Mlx | None = None
    # whether GPTQModel uses transformers' tensor names for it, for --to gptq and gptq_v2
    gptq: bool = False
    # last names of linear layers that other engines fuse into one matrix, so that a plan gives them one width
    fused: tuple[tuple[str, ...], ...] = ()
    # whether its layers take arguments of the batch's size, so that they cannot run one at a time
    per_sequence: bool = False


def _norm(source: str, *consumers: str, **more: Any) -> Equivalence:
    return Equivalence(source=source, consumers=consumers, shift=True, **more)


def _linear(source: str, consumer: str, **more: Any) -> Equivalence:
    return Equivalence(source=source, consumers=(consumer,), **more)


LLAMA_NORMS = {"input": "input_layernorm", "ffn": "post_attention_layernorm"}
GEMMA_NORMS = {
    "input": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "ffn": "pre_feedforward_layernorm",
    "ffn_out": "post_feedforward_layernorm",
}
HEAD_NORMS = {"query": "self_attn.q_norm", "key": "self_attn.k_norm"}
GEMMA_DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}

_GPT_OSS_ROPE = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "original_max_position_embeddings": 4096,
}

QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_QKV = tuple(f"self_attn.{name}" for name in QKV)
_GATED = tuple(f"mlp.{name}" for name in GATED)
_UP_DOWN = _linear("mlp.up_proj", "mlp.down_proj")
_VALUE = _linear("self_attn.v_proj", "self_attn.o_proj", layout="value", shift=True)
_LLAMA = (_norm("input_layernorm", *_QKV), _VALUE, _norm("post_attention_layernorm", *_GATED), _UP_DOWN)
_GEMMA = (
    _norm("input_layernorm", *_QKV, one_plus=True),
    _VALUE,
    _norm("pre_feedforward_layernorm", *_GATED, one_plus=True),
    _UP_DOWN,
)

ARCHITECTURES: dict[str, Family] = {
    "llama": Family(
        decode=Decode(norms=LLAMA_NORMS),
        equivalences=_LLAMA,
        gguf=Gguf(name="llama", interleaved=True, biases=None),
        mlx=Mlx(biases=(".bias",), windows=False),
        gptq=True,
        fused=(QKV, GATED),
    ),
    "mistral": Family(
        decode=Decode(norms=LLAMA_NORMS, window_period=1, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
        equivalences=_LLAMA,
        gguf=Gguf(name="llama", interleaved=True, biases=None),
        mlx=Mlx(always_windowed=True),
        gptq=True,
        fused=(QKV, GATED),
    ),
    "qwen2": Family(
        decode=Decode(
            norms=LLAMA_NORMS,
            window_switch="use_sliding_window",
            defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        ),
        equivalences=_LLAMA,
        gguf=Gguf(name="qwen2"),
        mlx=Mlx(biases=("q_proj.bias", "k_proj.bias", "v_proj.bias"), head_dim=False),
        gptq=True,
        fused=(QKV, GATED),
    ),
    "qwen3": Family(
        decode=Decode(
            norms=LLAMA_NORMS | HEAD_NORMS,
            window_switch="use_sliding_window",
            defaults={"head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096},
        ),
        equivalences=_LLAMA,
        gguf=Gguf(name="qwen3"),
        mlx=Mlx(),
        gptq=True,
        fused=(QKV, GATED),
    ),
    "mixtral": Family(
        decode=Decode(
            norms=LLAMA_NORMS,
            routing=Routing(
                block="block_sparse_moe",
                gated=("w1", "w3", "w2"),
                size_key="intermediate_size",
                renormalise_key="",
            ),
            window_period=1,
            defaults={
                **{"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
                **{"rms_norm_eps": 1e-5, "rope_theta": 1e6},
            },
        ),
        fused=(QKV, ("w1", "w3")),
    ),
    "qwen2_moe": Family(
        decode=Decode(
            norms=LLAMA_NORMS,
            routing=Routing(shared_key="shared_expert_intermediate_size"),
            window_switch="use_sliding_window",
            window_period=2,
            defaults={
                **{"num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28},
                **{"num_local_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
                "shared_expert_intermediate_size": 5632,
            },
        ),
        fused=(QKV, GATED),
    ),
    "qwen3_moe": Family(  # its experts have other names: the FFN equivalences match only dense layers
        decode=Decode(
            norms=LLAMA_NORMS | HEAD_NORMS,
            routing=Routing(),
            window_switch="use_sliding_window",
            window_period=1,
            defaults={
                **{"num_key_value_heads": 4, "sliding_window": 4096},
                **{"num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            },
        ),
        equivalences=_LLAMA,
        fused=(QKV, GATED),
    ),
    "gpt_oss": Family(
        decode=Decode(
            norms=LLAMA_NORMS,
            sinks="self_attn.sinks",
            clamped=True,
            routing=Routing(router="router", size_key="intermediate_size", renormalise_key="", joined_biases=True),
            window_period=2,
            defaults={
                **{"head_dim": 64, "num_key_value_heads": 8, "num_local_experts": 128, "num_experts_per_tok": 4},
                **{"rms_norm_eps": 1e-5, "sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
                **{"rope_theta": 150000.0, "rope_scaling": _GPT_OSS_ROPE},
            },
        ),
        fused=(QKV, GATED),
    ),
    "gemma2": Family(
        decode=Decode(
            norms=GEMMA_NORMS,
            norm_offset=1.0,
            activation_key="hidden_activation",
            scale_embedding=True,
            window_period=2,
            defaults=GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        equivalences=_GEMMA,
        gguf=Gguf(name="gemma2", gemma=True, scaled_by_hidden=46),
        mlx=Mlx(gemma=True, always_windowed=True),
        gptq=True,
        fused=(QKV, GATED),
    ),
    "gemma3_text": Family(
        decode=Decode(
            norms=GEMMA_NORMS | HEAD_NORMS,
            norm_offset=1.0,
            activation_key="hidden_activation",
            scale_embedding=True,
            window_period=6,
            local_rope=True,
            defaults=GEMMA_DEFAULTS | {"rope_theta": 1e6},
        ),
        equivalences=_GEMMA,
        fused=(QKV, GATED),
    ),
    "smollm3": Family(
        decode=Decode(
            norms=LLAMA_NORMS,
            window_switch="use_sliding_window",
            no_rope=True,
            defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        ),
        fused=(QKV, GATED),
    ),
    "phi3": Family(
        equivalences=(
            _norm("input_layernorm", "self_attn.qkv_proj"),
            _linear("self_attn.qkv_proj", "self_attn.o_proj", layout="value last", shift=True),
            _norm("post_attention_layernorm", "mlp.gate_up_proj"),
            _linear("mlp.gate_up_proj", "mlp.down_proj", layout="last"),
        ),
    ),
    "opt": Family(
        equivalences=(
            _norm("self_attn_layer_norm", *_QKV, needs=("do_layer_norm_before", True)),
            _linear("self_attn.v_proj", "self_attn.out_proj", layout="value", shift=True),
            _norm("final_layer_norm", "fc1", needs=("do_layer_norm_before", True)),
            _linear("fc1", "fc2", needs=("activation_function", "relu")),  # s > 0 passes through a ReLU
        ),
        fused=(QKV,),
    ),
    "gpt_neox": Family(
        equivalences=(  # no scale passes through GELU
            _norm("input_layernorm", "attention.query_key_value"),
            _linear("attention.query_key_value", "attention.dense", layout="value per head", shift=True),
            _norm("post_attention_layernorm", "mlp.dense_h_to_4h"),
        ),
    ),
    "bloom": Family(per_sequence=True),
    "xglm": Family(fused=(QKV,), per_sequence=True),
}

# The fused linear layers of all families. A plan sees only names of weights, which mean the same in every family.
FUSED = tuple(dict.fromkeys(names for family in ARCHITECTURES.values() for names in family.fused))


def fused_name(path: str) -> str:
    """Return the name of what a path is fused into: ``...mlp.gate_proj`` -> ``...mlp.gate_up_proj``."""
    parent, _, name = re.sub(r"\.experts\.\d+\.", ".experts.", path).rpartition(".")
    for names in FUSED:
        if name in names:
            short = "_".join(part.removesuffix("_proj") for part in names)
            name = f"{short}_proj" if name.endswith("_proj") else short
    return f"{parent}.{name}"


def supported(part: str) -> dict[str, Any]:
    """Return ``model_type`` -> the part of that name in its row, for the families that have it."""
    found = {name: getattr(family, part) for name, family in ARCHITECTURES.items()}
    return {name: value for name, value in found.items() if value is not None and value is not False}
