"""Translate the header of a GGUF file to config.json and to transformers' tensor names.

The inverse of export/gguf.py, for the same families (the Gguf in families.py). llama.cpp's metadata has other names;
queries and keys of Llama have adjacent rotary pairs there; Gemma's norms are stored plus one; llama3's rotary scaling
is a tensor of factors. Whatever is in the file and has no place in the translation is an error, so that no other model
than the file's is quantised.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from matquant.hf.families import ARCHITECTURES, Family, supported
from matquant.hf.gguf_file import Header, read_tensor
from matquant.hf.rope import frequencies
from matquant.system.errors import InputError

INSTEAD = "give the model as a Hugging Face directory"
FAMILIES = {there.name: kind for kind, there in reversed(supported("gguf").items())}  # llama.cpp's name -> model_type
CLASSES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}
SIZES = {  # key of the metadata -> key of config.json; all are required
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
EPSILON = "attention.layer_norm_rms_epsilon"
KNOWN = {
    *SIZES,
    *("attention.head_count_kv", "attention.key_length", "attention.value_length", EPSILON, "vocab_size"),
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
GEMMA = {  # key of the metadata -> key of config.json, llama.cpp's default
    "attention.sliding_window": ("sliding_window", 4096),
    "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
    "final_logit_softcapping": ("final_logit_softcapping", 30.0),
}
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_CONTEXTS = [2**power for power in range(4, 21)]  # original contexts that are tried
HIDDEN, QUERIES, KEYS, FFN, HEAD, VOCAB = "hidden", "queries", "keys", "ffn", "head", "vocab"
LINEAR = {  # llama.cpp's name in a layer -> transformers', shape
    "attn_q": ("self_attn.q_proj", (QUERIES, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KEYS, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KEYS, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, QUERIES)),
    "ffn_gate": ("mlp.gate_proj", (FFN, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (FFN, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, FFN)),
}
NORMS = {  # a family's role of a norm (Decode.norms) -> llama.cpp's name in a layer, shape
    "input": ("attn_norm", HIDDEN),
    "attention_out": ("post_attention_norm", HIDDEN),
    "ffn": ("ffn_norm", HIDDEN),
    "ffn_out": ("post_ffw_norm", HIDDEN),
    "query": ("attn_q_norm", HEAD),
    "key": ("attn_k_norm", HEAD),
}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of the model and its place in the GGUF file."""

    name: str  # transformers'
    there: str  # llama.cpp's
    offset: float = 0.0  # subtracted from the stored numbers
    heads: int = 0  # rows of this many heads have adjacent rotary pairs; 0: they do not


def read_config(header: Header) -> dict[str, Any]:
    """Return config.json for a GGUF file, without dtype; InputError if it is not a model that we read exactly."""
    where, name = header.file, header.architecture
    if name not in FAMILIES:
        raise InputError(
            f"{where} has the architecture {name!r}, which is not supported as GGUF, "
            f"only {', '.join(sorted(FAMILIES))}; {INSTEAD}"
        )
    kind = FAMILIES[name]
    given = {key.removeprefix(f"{name}."): value for key, value in header.values.items() if key.startswith(f"{name}.")}
    gemma = supported("gguf")[kind].gemma
    known = KNOWN | (GEMMA.keys() if gemma else set())
    unknown = next((key for key, value in sorted(given.items()) if key not in known and value), None)
    if unknown:
        raise InputError(f"{where} has {name}.{unknown} = {_shown(given[unknown])}, which is not supported; {INSTEAD}")
    config: dict[str, Any] = {"model_type": kind, "architectures": [f"{CLASSES[kind]}ForCausalLM"]}
    config |= {ours: _count(header, f"{name}.{theirs}") for theirs, ours in SIZES.items()}
    config |= _heads(header, config, given)
    config["rms_norm_eps"] = _number(header, f"{name}.{EPSILON}")
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["vocab_size"] = _vocabulary(header)
    if kind == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if gemma:
        config |= _gemma(header, config, given)
    config["rope_parameters"] = _rope(header, config, given)
    tokens = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return config | {key: header.values.get(f"tokenizer.ggml.{there}_token_id") for key, there in tokens.items()}


def _heads(header: Header, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the number of key/value heads and the size of a head."""
    where, name, heads = header.file, header.architecture, config["num_attention_heads"]
    kv_heads = given.get("attention.head_count_kv", heads)
    head_dim = given.get("attention.key_length") or given.get("rope.dimension_count") or config["hidden_size"] // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, head_dim) != head_dim:
            raise InputError(f"{where} has {name}.{key} = {given[key]!r} and heads of size {head_dim}; {INSTEAD}")
    if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads or type(head_dim) is not int or head_dim % 2:
        found = f"{_shown(kv_heads)} key/value heads of size {_shown(head_dim)}"
        raise InputError(f"{where} has {heads} heads and {found}, which is not supported; {INSTEAD}")
    return {"num_key_value_heads": kv_heads, "head_dim": head_dim}


def _gemma(header: Header, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Gemma 2 has beyond Llama: a sliding window, soft caps, the scale of attention."""
    found = {ours: _short(given.get(theirs, default)) for theirs, (ours, default) in GEMMA.items()}
    wrong = next((key for key, value in found.items() if type(value) not in (int, float)), None)
    if wrong:
        raise InputError(f"{header.file} has {wrong} = {_shown(found[wrong])}; it must be a number; {INSTEAD}")
    by_hidden = config["num_hidden_layers"] == supported("gguf")[config["model_type"]].scaled_by_hidden
    scalar = config["hidden_size"] // config["num_attention_heads"] if by_hidden else config["head_dim"]
    return {**found, "query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}


def read_tensors(header: Header, config: Mapping[str, Any]) -> list[Stored]:
    """Return all tensors of the model; InputError if one is missing, has another shape, or has no place in it."""
    sizes = {
        HIDDEN: config["hidden_size"],
        QUERIES: config["num_attention_heads"] * config["head_dim"],
        KEYS: config["num_key_value_heads"] * config["head_dim"],
        FFN: config["intermediate_size"],
        HEAD: config["head_dim"],
        VOCAB: config["vocab_size"],
    }
    found = []
    for stored, shape in _wanted(config):
        entry = header.tensors.get(stored.there)
        if entry is None:
            raise InputError(f"{header.file} lacks the tensor {stored.there}; copy or download it again")
        wanted = tuple(sizes[size] for size in shape)
        if entry.shape != wanted:
            sides = (" x ".join(map(str, size)) for size in (entry.shape, wanted))
            raise InputError(
                f"{header.file} has {stored.there} of shape {next(sides)}, its metadata says {next(sides)}"
            )
        found.append(stored)
    extra = sorted(header.tensors.keys() - {stored.there for stored in found} - {ROPE_FACTORS})
    if extra:
        raise InputError(
            f"{header.file} has tensors ({len(extra)}) without a place in a {config['model_type']} model: {extra[0]}; "
            f"{INSTEAD}"
        )
    return found


def read_stored(header: Header, stored: Stored) -> np.ndarray:
    """Return a tensor as transformers has it, in the file's dtype or, if dequantised, float32."""
    array = read_tensor(header, stored.there)
    if stored.offset:
        array = array.astype(np.float32) - np.float32(stored.offset)
    if stored.heads:
        array = array.reshape(stored.heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array


def _wanted(config: Mapping[str, Any]) -> Iterator[tuple[Stored, tuple[str, ...]]]:
    """Yield every tensor of a model of ``config`` and the names of its sizes."""
    kind = config["model_type"]
    family: Family = ARCHITECTURES[kind]
    assert family.decode is not None
    assert family.gguf is not None
    offset = family.decode.norm_offset
    yield Stored(name="model.embed_tokens.weight", there="token_embd.weight"), (VOCAB, HIDDEN)
    yield Stored(name="model.norm.weight", there="output_norm.weight", offset=offset), (HIDDEN,)
    if not config["tie_word_embeddings"]:
        yield Stored(name="lm_head.weight", there="output.weight"), (VOCAB, HIDDEN)
    paired = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for role, path in family.decode.norms.items():
            there, size = NORMS[role]
            yield Stored(name=f"{ours}.{path}.weight", there=f"{theirs}.{there}.weight", offset=offset), (size,)
        for there, (path, shape) in LINEAR.items():
            heads = paired.get(there, 0) if family.gguf.interleaved else 0
            for ending in ("weight", "bias") if _has_bias(config, path) else ("weight",):
                stored = Stored(name=f"{ours}.{path}.{ending}", there=f"{theirs}.{there}.{ending}", heads=heads)
                yield stored, shape if ending == "weight" else shape[:1]


def _has_bias(config: Mapping[str, Any], path: str) -> bool:
    """Return whether a linear layer of a model of ``config`` has a bias."""
    if config["model_type"] == "qwen2":
        return path.endswith(("q_proj", "k_proj", "v_proj"))
    return bool(config.get("attention_bias" if path.startswith("self_attn") else "mlp_bias"))


def _vocabulary(header: Header) -> int:
    """Return the number of rows of the embedding."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{header.file} lacks the tensor token_embd.weight; copy or download it again")
    return embedding.shape[0]


def _count(header: Header, key: str) -> int:
    value = header.values.get(key)
    if type(value) is not int or value < 1:
        raise InputError(f"{header.file} has {key} = {_shown(value)}; it must be an integer above 0; {INSTEAD}")
    return value


def _number(header: Header, key: str) -> float:
    value = header.values.get(key)
    if not isinstance(value, float) or not math.isfinite(value) or value < 0:
        raise InputError(f"{header.file} has {key} = {_shown(value)}; it must be a finite number; {INSTEAD}")
    return float(_short(value))


def _shown(value: Any) -> str:
    return "different values by layer" if isinstance(value, list) else repr(value)


def _short(value: Any) -> Any:
    """Return the shortest decimal number that is the same in float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------------ rotary scaling


def _rope(header: Header, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_parameters of config.json."""
    kind = given.get("rope.scaling.type", "none")
    base = f"{header.architecture}.rope.freq_base"
    theta = _number(header, base) if base in header.values else 10000.0
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": _number(header, f"{header.architecture}.rope.scaling.factor")}
        if kind == "yarn":
            trained = f"{header.architecture}.rope.scaling.original_context_length"
            rope["original_max_position_embeddings"] = _count(header, trained)
    elif kind != "none":
        raise InputError(f"{header.file} has rotary scaling of type {kind!r}, which is not supported; {INSTEAD}")
    if ROPE_FACTORS not in header.tensors:
        return rope
    if kind != "none" or config["model_type"] != "llama":
        raise InputError(f"{header.file} has rotary scaling of type {kind!r} and factors of pairs; {INSTEAD}")
    return _llama3(header, rope, config)


def _llama3(header: Header, rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the llama3 scaling with the file's factors; InputError if none with the usual blend (1 to 4) has them."""
    factors = read_tensor(header, ROPE_FACTORS).astype(np.float32).reshape(-1)
    head_dim = config["head_dim"]
    if len(factors) == head_dim // 2 and np.isfinite(factors).all() and (factors > 0).all():
        plain, _ = frequencies({**rope, "rope_type": "default"}, head_dim, config, header.file)
        if np.allclose(factors, 1.0):
            return dict(rope)
        errors = {}
        scaling = {"factor": _short(float(factors.max())), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        given = {**rope, "rope_type": "llama3", **scaling}
        for context in LLAMA3_CONTEXTS:
            scaled, _ = frequencies(
                {**given, "original_max_position_embeddings": context}, head_dim, config, header.file
            )
            errors[context] = float(np.max(np.abs(plain / scaled / factors - 1)))
        nearest = min(errors, key=lambda context: errors[context])
        if errors[nearest] < 1e-4:
            return {**given, "original_max_position_embeddings": nearest}
    raise InputError(f"{header.file} has rotary factors ({ROPE_FACTORS}) that are not llama3's; {INSTEAD}")
