"""What the decode step needs to know of a model: families as rows of one table, and config.json read through it.

The decode step (native/decoder/) knows no family. It knows norms that may be absent, windows, rotary frequencies, caps
and scales; a Family says under which names a checkpoint has them and what config.json means when it leaves something
out. Source of every row: transformers 5.23, the model's configuration and modeling file. Biases are applied where the
checkpoint has them.

Rotary frequencies: default, linear (position interpolation), llama3 and yarn (arXiv 2309.00071), in float32 as there.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from matquant.errors import InputError

PROJECTIONS = (  # in the order of native/python/bind_model.cpp
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
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


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    norms: the decode step's name of a norm -> the checkpoint's name under the layer. norm_offset: what is added to a
    stored norm weight. scale_embedding: embeddings are multiplied by sqrt(hidden size). window_switch: the key that
    must be true for windows to count, or "". window_period: where config.json has no layer_types, all layers but each
    ``window_period``-th have a window (1: all have one; 0: none). no_rope: layers may lack rotary positions.
    defaults: what a key missing from config.json stands for.
    """

    norms: Mapping[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    norm_offset: float = 0.0
    activation_key: str = "hidden_act"
    scale_embedding: bool = False
    window_switch: str = ""
    window_period: int = 0
    no_rope: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(window_period=1, defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family(window_switch="use_sliding_window", defaults={"num_key_value_heads": 32, "sliding_window": 4096}),
    "qwen3": Family(
        norms=LLAMA_NORMS | HEAD_NORMS,
        window_switch="use_sliding_window",
        defaults={"head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096},
    ),
    "gemma2": Family(
        norms=GEMMA_NORMS,
        norm_offset=1.0,
        activation_key="hidden_activation",
        scale_embedding=True,
        window_period=2,
        defaults=GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        norms=GEMMA_NORMS | HEAD_NORMS,
        norm_offset=1.0,
        activation_key="hidden_activation",
        scale_embedding=True,
        window_period=6,
        defaults=GEMMA_DEFAULTS | {"rope_theta": 1e6},
    ),
    "smollm3": Family(
        window_switch="use_sliding_window",
        no_rope=True,
        defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    ),
}
SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
REQUIRED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "max_position_embeddings"),
)
PER_FAMILY = ("num_key_value_heads", "head_dim")  # null stands for a default
EMBEDDING = "model.embed_tokens"
LARGEST_WINDOW = 2**31 - 1  # tokens; the decode step counts in 32 bits


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model as the decode step sees it. Sizes are counts; 0 means "none" of caps and windows.

    windows, ropes: per layer, the positions a token sees and the index into ``frequencies`` (-1: no rotary positions).
    frequencies: float32 [head_dim / 2] radians per position; rope_scales: factors of their sines and cosines.
    """

    family: Family
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    attention_scale: float
    embedding_scale: float
    attention_cap: float
    logit_cap: float
    gelu: bool
    tied: bool
    windows: tuple[int, ...]
    ropes: tuple[int, ...]
    frequencies: tuple[np.ndarray, ...]
    rope_scales: tuple[float, ...]


def read_architecture(config: Mapping[str, Any], *, where: object) -> Architecture:
    """The Architecture that a config.json means; InputError if this runtime cannot run it exactly."""
    family, values = _read_family(config, where)
    heads, kv_heads, head_dim = _heads(values, where)
    _refuse(values, where)
    ropes, tables = _ropes(values, family, head_dim, where)
    return Architecture(
        family=family,
        hidden=values["hidden_size"],
        intermediate=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=values["vocab_size"],
        context=values["max_position_embeddings"],
        norm_eps=float(_given(values, "rms_norm_eps", 1e-6)),
        attention_scale=float(values.get("query_pre_attn_scalar") or head_dim) ** -0.5,
        embedding_scale=math.sqrt(values["hidden_size"]) if family.scale_embedding else 1.0,
        attention_cap=float(values.get("attn_logit_softcapping") or 0.0),
        logit_cap=float(values.get("final_logit_softcapping") or 0.0),
        gelu=_is_gelu(_given(values, family.activation_key, "silu"), where),
        tied=bool(values.get("tie_word_embeddings", False)),
        windows=_windows(values, family),
        ropes=ropes,
        frequencies=tuple(frequencies for frequencies, _ in tables),
        rope_scales=tuple(scale for _, scale in tables),
    )


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, where: object) -> None:
    """InputError unless the sizes in config.json are those of the tensors, before anything of such a size is made.

    shapes: tensor name -> shape, quantised weights as ``path.weight`` [N, K].
    """
    _, values = _read_family(config, where)
    heads, kv_heads, head_dim = _heads(values, where)
    hidden, intermediate = values["hidden_size"], values["intermediate_size"]
    queries, keys = (heads * head_dim, hidden), (kv_heads * head_dim, hidden)
    wanted = {
        **dict(zip(PROJECTIONS[:4], (queries, keys, keys, queries[::-1]), strict=True)),
        **dict(
            zip(PROJECTIONS[4:], ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate)), strict=True)
        ),
    }
    layers = (
        (f"model.layers.{layer}.{name}", size)
        for layer in range(values["num_hidden_layers"])
        for name, size in wanted.items()
    )
    for path, size in itertools.chain([(EMBEDDING, (values["vocab_size"], hidden))], layers):
        found = shapes.get(f"{path}.weight")
        if found is None:
            raise InputError(f"{where} lacks the tensor {path}.weight; write the checkpoint again")
        if tuple(found) != size:
            raise InputError(
                f"{where} does not fit its config.json ({path}.weight is {' x '.join(map(str, found))}, "
                f"by config.json {' x '.join(map(str, size))}); write the checkpoint again"
            )


def _read_family(config: Mapping[str, Any], where: object) -> tuple[Family, dict[str, Any]]:
    """The family of a config.json, and its values over the family's defaults, sizes checked."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"{where} is a {kind} model, which the runtime does not decode; "
            f"it decodes {', '.join(FAMILIES)}; use matquant.load for others"
        )
    values = {**FAMILIES[kind].defaults, **config}
    for key in (*REQUIRED, *PER_FAMILY):
        value = values.get(key)
        if (key in REQUIRED or value is not None) and (type(value) is not int or value < 1):
            raise InputError(f"{where} has {key}={value!r} in config.json; it must be an integer above 0")
    return FAMILIES[kind], values


def _heads(values: Mapping[str, Any], where: object) -> tuple[int, int, int]:
    """Attention heads, key/value heads and the size of a head."""
    heads: int = values["num_attention_heads"]
    kv_heads: int = values.get("num_key_value_heads") or heads
    head_dim: int = values.get("head_dim") or values["hidden_size"] // heads
    if heads % kv_heads or head_dim % 2 or head_dim < 1:
        raise InputError(
            f"{where} has {heads} heads, {kv_heads} key/value heads and head_dim {head_dim}; "
            "heads must be a multiple of key/value heads and head_dim even"
        )
    return heads, kv_heads, head_dim


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of ``key``, ``default`` where it is missing or null."""
    value = values.get(key)
    return default if value is None else value


def _refuse(values: Mapping[str, Any], where: object) -> None:
    for key, harmless in (("use_bidirectional_attention", (None, False)), ("partial_rotary_factor", (None, 1, 1.0))):
        if values.get(key) not in harmless:
            raise InputError(f"{where} has {key}={values[key]}, which the runtime does not decode; use matquant.load")
    for key in ("layer_types", "no_rope_layers"):
        if values.get(key) and len(values[key]) != values["num_hidden_layers"]:
            raise InputError(
                f"{where} has {len(values[key])} {key} for {values['num_hidden_layers']} layers; repair config.json"
            )


def _is_gelu(name: Any, where: object) -> bool:
    if name not in SILU + GELU:
        raise InputError(
            f"{where} has the activation {name!r}; the runtime has {', '.join(SILU + GELU)}; use matquant.load"
        )
    return name in GELU


def _windows(values: Mapping[str, Any], family: Family) -> tuple[int, ...]:
    """The sliding window of every layer, 0 where there is none."""
    count: int = values["num_hidden_layers"]
    window = values.get("sliding_window")
    if not window or (family.window_switch and not values.get(family.window_switch)):
        return (0,) * count
    kinds = values.get("layer_types") if family.window_period != 1 else None
    if kinds is None:
        kinds = _default_kinds(values, family)
    return tuple(min(int(window), LARGEST_WINDOW) if kind == "sliding_attention" else 0 for kind in kinds)


def _default_kinds(values: Mapping[str, Any], family: Family) -> list[str]:
    """layer_types where config.json has none."""
    period = values.get("sliding_window_pattern") or family.window_period
    kinds = []
    for index in range(values["num_hidden_layers"]):
        if family.no_rope:
            sliding = not _has_rope(values, index)
        elif family.window_period:
            sliding = family.window_period == 1 or (index + 1) % period != 0
        else:
            sliding = index >= _given(values, "max_window_layers", 28)
        kinds.append("sliding_attention" if sliding else "full_attention")
    return kinds


def _has_rope(values: Mapping[str, Any], index: int) -> bool:
    given = values.get("no_rope_layers")  # 1: rotary positions (sic)
    return bool(given[index]) if given else (index + 1) % _given(values, "no_rope_layer_interval", 4) != 0


# ------------------------------------------------------------------------------------------------- rotary frequencies

Rope = tuple[np.ndarray, float]  # float32 [head_dim / 2] radians per position; factor of sines and cosines


def _ropes(
    values: Mapping[str, Any], family: Family, head_dim: int, where: object
) -> tuple[tuple[int, ...], list[Rope]]:
    """Which frequencies each layer has, and the frequencies."""
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    per_kind = "full_attention" in given or "sliding_attention" in given
    count = values["num_hidden_layers"]
    if family is FAMILIES["gemma3_text"]:  # windowed layers have frequencies of their own
        full = {
            "rope_theta": _given(values, "rope_theta", 1e6),
            **(given.get("full_attention") or {} if per_kind else given),
        }
        local = {"rope_theta": _given(values, "rope_local_base_freq", 1e4)} | (given.get("sliding_attention") or {})
        kinds = values.get("layer_types") or _default_kinds(values, family)
        index = tuple(int(kind == "sliding_attention") for kind in kinds)
        return index, [_frequencies(rope, head_dim, values, where) for rope in (full, local)]
    if per_kind:
        raise InputError(f"{where} has rotary positions per layer type, which its family does not; repair config.json")
    rope = {"rope_theta": _given(values, "rope_theta", 1e4), **given}
    index = tuple(0 if not family.no_rope or _has_rope(values, layer) else -1 for layer in range(count))
    return index, [_frequencies(rope, head_dim, values, where)]


def _frequencies(given: Mapping[str, Any], head_dim: int, values: Mapping[str, Any], where: object) -> Rope:
    rope = {key: value for key, value in given.items() if value is not None or key == "factor"}  # yarn has a default
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "linear", "llama3", "yarn"):
        raise InputError(
            f"{where} has rotary positions of type {kind!r}, partial_rotary_factor "
            f"{rope.get('partial_rotary_factor', 1.0)}; the runtime has default, linear, llama3 and yarn, whole"
        )
    try:
        with np.errstate(all="ignore"):
            frequencies, scale = _compute(kind, rope, head_dim, values)
    except KeyError as error:
        raise InputError(f"{where} has {kind} rotary positions without {error}; repair config.json") from None
    except (ArithmeticError, ValueError):  # of logarithms
        frequencies, scale = np.full(1, np.nan), math.nan
    if not (np.isfinite(frequencies).all() and math.isfinite(scale)):
        facts = ", ".join(f"{key}={value}" for key, value in rope.items())
        raise InputError(f"{where} has {kind} rotary positions that are no numbers ({facts}); repair config.json")
    return frequencies, scale


def _compute(kind: str, rope: Mapping[str, Any], head_dim: int, values: Mapping[str, Any]) -> Rope:
    """Frequencies and factor of one of the four types; KeyError for a key it needs, ArithmeticError or NaN if wrong."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.float32(rope["rope_theta"]) ** exponents
    if kind == "linear":
        return 1 / powers / np.float32(rope["factor"]), 1.0
    if kind == "llama3":
        return _llama3(1 / powers, rope), 1.0
    if kind == "yarn":
        return _yarn(powers, rope, head_dim, values)
    return 1 / powers, 1.0


def _llama3(frequencies: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Long wavelengths divided by ``factor``, short ones kept, a smooth passage between them."""
    factor, low, high = (np.float32(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = rope["original_max_position_embeddings"]
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (np.float32(context) / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    result = np.where(wavelengths > context / low, frequencies / factor, frequencies)
    inside = (wavelengths >= context / high) & (wavelengths <= context / low)
    return np.where(inside, between, result).astype(np.float32)


def _yarn(powers: np.ndarray, rope: Mapping[str, Any], head_dim: int, values: Mapping[str, Any]) -> Rope:
    """NTK by parts: fast dimensions kept, slow ones interpolated, a ramp between; attention sharpened."""
    trained = rope.get("original_max_position_embeddings") or values["max_position_embeddings"]
    factor = rope["factor"] or values["max_position_embeddings"] / trained

    def dimension(turns: float) -> float:
        return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    def sharpness(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    frequencies = (1 / (np.float32(factor) * powers)) * ramp + (1 / powers) * (1 - ramp)
    scale = rope.get("attention_factor")
    if scale is None:
        weights = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = sharpness(weights[0]) / sharpness(weights[1]) if weights[0] and weights[1] else sharpness(1.0)
    return frequencies.astype(np.float32), float(scale)
