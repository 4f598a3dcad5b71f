"""Read config.json for the decode step: sizes, sliding windows, caps, scales and rotary frequencies.

The decode step (native/decoder/model.hpp) knows no families. It knows optional norms, experts, sliding windows, rotary
frequencies, caps and scales; a row of ARCHITECTURES (families.py) maps a checkpoint's names to them, with the defaults
of config.json.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from matquant.hf.experts import DENSE, Experts, Sized, expert_matrices, gated_matrices, read_experts
from matquant.hf.families import Decode, supported
from matquant.hf.rope import Rope, frequencies
from matquant.system.errors import InputError

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)
REQUIRED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "max_position_embeddings"),
)
PER_FAMILY = ("num_key_value_heads", "head_dim")  # null stands for a default
EMBEDDING = "model.embed_tokens"
LARGEST_WINDOW = 2**31 - 1  # tokens; the decode step counts in 32 bits


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What decides the names and shapes of a model's matrices."""

    family: Decode  # how to run its family
    hidden: int  # size of the hidden states
    intermediate: int  # size inside the feed-forward block, in layers without experts
    layers: int  # decoder layers
    heads: int  # query heads
    kv_heads: int  # key/value heads
    head_dim: int  # size of a head
    vocab: int  # rows of the embedding
    experts: Experts | None  # in the layers that have them

    def matrices(self, layer: int) -> Iterator[Sized]:
        """Yield the name under the layer and the shape [N, K] of its matrices, in the decode step's order."""
        queries, keys = (self.heads * self.head_dim, self.hidden), (self.kv_heads * self.head_dim, self.hidden)
        yield from zip(ATTENTION, (queries, keys, keys, queries[::-1]), strict=True)
        experts = self.experts_at(layer)
        if experts is None:
            yield from gated_matrices(DENSE, self.hidden, self.intermediate)
        else:
            yield from expert_matrices(experts, self.hidden)

    def experts_at(self, layer: int) -> Experts | None:
        """Return the experts of a layer, None if it has none."""
        return self.experts if self.experts is not None and self.experts.at(layer) else None


@dataclass(frozen=True, kw_only=True)
class Architecture(Sizes):
    """A model's architecture for the decode step."""

    context: int  # tokens
    norm_eps: float  # added to the mean of squares
    attention_scale: float  # factor of attention scores
    embedding_scale: float  # factor of embeddings
    attention_cap: float  # soft cap on attention scores; 0: none
    logit_cap: float  # soft cap on logits; 0: none
    gelu: bool  # tanh GELU rather than SiLU
    gate_alpha: float  # of clamped gates
    gate_limit: float  # of clamped gates; 0: not clamped
    tied: bool  # whether the head is the embedding
    windows: tuple[int, ...]  # per layer, number of positions that a token sees; 0: all
    ropes: tuple[int, ...]  # per layer, the index into frequencies; -1: no rotary positions
    frequencies: tuple[np.ndarray, ...]  # float32 [head_dim / 2] each, radians per position
    rope_scales: tuple[float, ...]  # factor of the sines and cosines, one per entry of frequencies


def read_architecture(config: Mapping[str, Any], *, where: object) -> Architecture:
    """Return the Architecture of a config.json; InputError if the engine cannot run it exactly."""
    sizes, values = _read_sizes(config, where)
    family = sizes.family
    _refuse(values, where)
    ropes, tables = _ropes(values, family, sizes.head_dim, where)
    return Architecture(
        **vars(sizes),
        context=values["max_position_embeddings"],
        norm_eps=float(_given(values, "rms_norm_eps", 1e-6)),
        attention_scale=float(values.get("query_pre_attn_scalar") or sizes.head_dim) ** -0.5,
        embedding_scale=math.sqrt(values["hidden_size"]) if family.scale_embedding else 1.0,
        attention_cap=float(values.get("attn_logit_softcapping") or 0.0),
        logit_cap=float(values.get("final_logit_softcapping") or 0.0),
        gelu=_is_gelu(_given(values, family.activation_key, "silu"), where),
        gate_alpha=float(_given(values, "swiglu_alpha", family.defaults["swiglu_alpha"])) if family.clamped else 0.0,
        gate_limit=float(_given(values, "swiglu_limit", family.defaults["swiglu_limit"])) if family.clamped else 0.0,
        tied=bool(values.get("tie_word_embeddings", False)),
        windows=_windows(values, family),
        ropes=ropes,
        frequencies=tuple(found for found, _ in tables),
        rope_scales=tuple(scale for _, scale in tables),
    )


def check_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], *, where: object) -> None:
    """Raise InputError unless the sizes in config.json match the tensors, before allocating anything of such a size.

    shapes: tensor name -> shape, quantised weights as ``path.weight`` [N, K].
    """
    sizes, _ = _read_sizes(config, where)
    layers = (
        (f"model.layers.{layer}.{name}", size) for layer in range(sizes.layers) for name, size in sizes.matrices(layer)
    )
    for path, size in itertools.chain([(EMBEDDING, (sizes.vocab, sizes.hidden))], layers):
        found = shapes.get(f"{path}.weight")
        if found is None:
            raise InputError(f"{where} lacks the tensor {path}.weight; write the checkpoint again")
        if tuple(found) != size:
            raise InputError(
                f"{where} does not fit its config.json ({path}.weight is {' x '.join(map(str, found))}, "
                f"config.json needs {' x '.join(map(str, size))}); write the checkpoint again"
            )


def _read_sizes(config: Mapping[str, Any], where: object) -> tuple[Sizes, dict[str, Any]]:
    """Return the sizes of a config.json, checked, and its values merged over its family's defaults."""
    kind = config.get("model_type")
    decoded = supported("decode")
    if kind not in decoded:
        raise InputError(
            f"{where} is a {kind} model, which the engine does not support; "
            f"it supports {', '.join(decoded)}; use matquant.load for others"
        )
    family: Decode = decoded[kind]
    values = {**family.defaults, **config}
    for key in (*REQUIRED, *PER_FAMILY):
        value = values.get(key)
        if (key in REQUIRED or value is not None) and (type(value) is not int or value < 1):
            raise InputError(f"{where} has {key}={value!r} in config.json; it must be an integer above 0")
    heads, kv_heads, head_dim = _heads(values, where)
    sizes = Sizes(
        family=family,
        hidden=values["hidden_size"],
        intermediate=values["intermediate_size"],
        layers=values["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=values["vocab_size"],
        experts=read_experts(family.routing, values, where=where),
    )
    return sizes, values


def _heads(values: Mapping[str, Any], where: object) -> tuple[int, int, int]:
    """Return the number of attention heads, of key/value heads, and the head size."""
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
    """Return the value of ``key``, ``default`` if it is missing or null."""
    value = values.get(key)
    return default if value is None else value


def _refuse(values: Mapping[str, Any], where: object) -> None:
    for key, harmless in (("use_bidirectional_attention", (None, False)), ("partial_rotary_factor", (None, 1, 1.0))):
        if values.get(key) not in harmless:
            raise InputError(f"{where} has {key}={values[key]}, which the engine does not support; use matquant.load")
    for key in ("layer_types", "no_rope_layers"):
        if values.get(key) and len(values[key]) != values["num_hidden_layers"]:
            raise InputError(
                f"{where} has {len(values[key])} {key} for {values['num_hidden_layers']} layers; repair config.json"
            )


def _is_gelu(name: Any, where: object) -> bool:
    if name not in SILU + GELU:
        raise InputError(
            f"{where} has the activation {name!r}; the engine supports {', '.join(SILU + GELU)}; use matquant.load"
        )
    return name in GELU


def _windows(values: Mapping[str, Any], family: Decode) -> tuple[int, ...]:
    """Return the sliding window of every layer, 0 for none."""
    count: int = values["num_hidden_layers"]
    window = values.get("sliding_window")
    if not window or (family.window_switch and not values.get(family.window_switch)):
        return (0,) * count
    kinds = values.get("layer_types") if family.window_period != 1 else None
    if kinds is None:
        kinds = _default_kinds(values, family)
    return tuple(min(int(window), LARGEST_WINDOW) if kind == "sliding_attention" else 0 for kind in kinds)


def _default_kinds(values: Mapping[str, Any], family: Decode) -> list[str]:
    """Return the default layer_types of a config.json without them."""
    period = values.get("sliding_window_pattern") or family.window_period
    kinds = []
    for index in range(values["num_hidden_layers"]):
        if family.no_rope:
            sliding = not _has_rope(values, index)
        elif family.window_period:
            within = index < _given(values, "max_window_layers", index + 1)
            sliding = family.window_period == 1 or ((index + 1) % period != 0 and within)
        else:
            sliding = index >= _given(values, "max_window_layers", 28)
        kinds.append("sliding_attention" if sliding else "full_attention")
    return kinds


def _has_rope(values: Mapping[str, Any], index: int) -> bool:
    given = values.get("no_rope_layers")  # 1: rotary positions (sic)
    return bool(given[index]) if given else (index + 1) % _given(values, "no_rope_layer_interval", 4) != 0


def _ropes(
    values: Mapping[str, Any], family: Decode, head_dim: int, where: object
) -> tuple[tuple[int, ...], list[Rope]]:
    """Return the index of each layer's frequencies, and the frequencies."""
    given = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    per_kind = "full_attention" in given or "sliding_attention" in given
    count = values["num_hidden_layers"]
    if family.local_rope:
        full = {
            "rope_theta": _given(values, "rope_theta", 1e6),
            **(given.get("full_attention") or {} if per_kind else given),
        }
        local = {"rope_theta": _given(values, "rope_local_base_freq", 1e4)} | (given.get("sliding_attention") or {})
        kinds = values.get("layer_types") or _default_kinds(values, family)
        index = tuple(int(kind == "sliding_attention") for kind in kinds)
        return index, [frequencies(rope, head_dim, values, where) for rope in (full, local)]
    if per_kind:
        raise InputError(
            f"{where} has rotary positions per layer type, which its family does not have; repair config.json"
        )
    rope = {"rope_theta": _given(values, "rope_theta", 1e4), **given}
    index = tuple(0 if not family.no_rope or _has_rope(values, layer) else -1 for layer in range(count))
    return index, [frequencies(rope, head_dim, values, where)]
