"""Check the values in a model's JSON files: one table per file, key -> kind, and one reader.

Every size, flag and token id from config.json, generation_config.json, tokenizer_config.json or a shard index goes
through ``read_facts`` or ``check_facts`` first, so later code need not check again. Keys that a table does not list are
ignored: hundreds of families have further keys. A kind is a test and its description.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matquant.system.errors import InputError
from matquant.system.files import read_text

LARGEST = 2**63 - 1  # largest integer
LARGEST_NUMBER = 2.0**127  # largest number, which float32 holds
SHOWN = 60  # characters of a wrong value that a message shows
REPAIR = "repair the file or copy it again"


@dataclass(frozen=True)
class Kind:
    """A kind of value. words: its description, such as "an integer above 0". inside: kinds of the keys of an object."""

    words: str
    holds: Callable[[Any], bool]
    inside: Mapping[str, "Kind"] = field(default_factory=dict)

    def or_null(self) -> "Kind":
        """Return this kind, or null."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.holds(value), self.inside)

    def or_list(self) -> "Kind":
        """Return this kind, or a list of such values."""
        every = list_of(self)
        return Kind(f"{self.words}, or a list of them", lambda value: self.holds(value) or every.holds(value))


Table = Mapping[str, Kind]


def integer(low: int, words: str) -> Kind:
    """Return the kind of integers from ``low`` to 2^63 - 1, without true and false."""
    return Kind(f"an integer {words}", lambda value: type(value) is int and low <= value <= LARGEST)


def number(words: str, holds: Callable[[float], bool] = lambda value: True) -> Kind:
    """Return the kind of finite numbers that float32 holds and ``holds`` accepts."""
    return Kind(f"a number{words}", lambda value: _is_finite(value) and holds(value))


def list_of(kind: Kind) -> Kind:
    """Return the kind of lists of values of one kind."""
    return Kind(f"a list, each {kind.words}", lambda value: isinstance(value, list) and all(map(kind.holds, value)))


def object_of(inside: Table) -> Kind:
    """Return the kind of objects in which the keys of ``inside`` have these kinds."""
    return Kind("an object", lambda value: isinstance(value, dict), inside)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST_NUMBER


def _is_special_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _is_chat_template(value: Any) -> bool:
    named = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    listed = all(isinstance(entry, dict) and all(isinstance(part, str) for part in entry.values()) for entry in named)
    return isinstance(value, (str, list, dict)) and listed


SIZE = integer(1, "above 0")
COUNT = integer(0, "of at least 0")
TOKEN = integer(-1, "of at least 0 (-1: none)")
NUMBER = number("")
POSITIVE = number(" above 0", lambda value: value > 0)
FROM_0 = number(" of at least 0", lambda value: value >= 0)
SHARE = number(" from 0 to 1", lambda value: 0 <= value <= 1)
FLAG = Kind("true, false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
OBJECT = object_of({})
SPECIAL_TOKEN = Kind('a string or an object with a string "content"', _is_special_token)
CHAT_TEMPLATE = Kind("a string, or named strings", _is_chat_template)
# torch's names, which transformers uses
DTYPES = ("float32", "bfloat16", "float16", "float64", "float", "half", "double")
DTYPE = Kind(", ".join(DTYPES[:4]), lambda value: value in DTYPES if isinstance(value, str) else False)

_ROPE: Table = {
    "rope_type": TEXT.or_null(),
    "type": TEXT.or_null(),
    **dict.fromkeys(("rope_theta", "factor", "beta_fast", "beta_slow", "attention_factor"), POSITIVE.or_null()),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), POSITIVE.or_null()),
    **dict.fromkeys(("mscale", "mscale_all_dim"), NUMBER.or_null()),
    "partial_rotary_factor": FROM_0.or_null(),
    "truncate": FLAG.or_null(),
    **dict.fromkeys(("long_factor", "short_factor"), list_of(POSITIVE).or_null()),
}
ROPE = object_of({**_ROPE, **dict.fromkeys(("full_attention", "sliding_attention"), object_of(_ROPE).or_null())})

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # the number of a layer's experts
CHOSEN = "num_experts_per_tok"

# Sizes that vary by layer in some family may be lists.
_TEXT_CONFIG: Table = {
    "model_type": TEXT,
    "architectures": list_of(TEXT).or_null(),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE.or_null()),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "vocab_size"), SIZE.or_null()),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), SIZE.or_null()),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), SIZE.or_list().or_null()),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "head_dim"), SIZE.or_list().or_null()),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), SIZE.or_null()),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"), COUNT.or_list().or_null()),
    **dict.fromkeys((*EXPERTS, CHOSEN), COUNT.or_null()),
    **dict.fromkeys(("shared_expert_intermediate_size", "decoder_sparse_step"), SIZE.or_null()),
    **dict.fromkeys(("swiglu_alpha", "swiglu_limit"), POSITIVE.or_null()),
    "norm_topk_prob": FLAG.or_null(),
    "mlp_only_layers": list_of(COUNT).or_null(),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation_function"), TEXT.or_null()),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), FROM_0.or_null()),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"), TOKEN.or_list().or_null()),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "use_cache", "output_attentions"), FLAG.or_null()),
    **dict.fromkeys(("output_hidden_states", "return_dict", "attention_bias", "mlp_bias"), FLAG.or_null()),
    **dict.fromkeys(("sliding_window", "max_window_layers"), COUNT.or_null()),
    **dict.fromkeys(("sliding_window_pattern", "no_rope_layer_interval"), SIZE.or_null()),
    "layer_types": list_of(TEXT).or_null(),
    "no_rope_layers": list_of(COUNT).or_null(),
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), FROM_0.or_null()),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), POSITIVE.or_null()),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), ROPE.or_null()),
    "partial_rotary_factor": FROM_0.or_null(),
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), SHARE.or_null()
    ),
}
CONFIG: Table = {**_TEXT_CONFIG, "text_config": object_of(_TEXT_CONFIG).or_null()}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

GENERATION: Table = {
    "do_sample": FLAG.or_null(),
    "temperature": FROM_0.or_null(),
    "top_k": COUNT.or_null(),
    **dict.fromkeys(("top_p", "min_p"), SHARE.or_null()),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "eos_token_id"), TOKEN.or_list().or_null()),
    "seed": COUNT.or_null(),
}

TOKENIZER: Table = {
    **dict.fromkeys((f"{kind}_token" for kind in ("bos", "eos", "unk", "pad")), SPECIAL_TOKEN.or_null()),
    **dict.fromkeys((f"{kind}_token" for kind in ("sep", "cls", "mask")), SPECIAL_TOKEN.or_null()),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space"), FLAG.or_null()),
    **dict.fromkeys(("tokenizer_class", "padding_side", "truncation_side"), TEXT.or_null()),
    "model_max_length": number(" above 0", lambda value: value > 0).or_null(),
    "added_tokens_decoder": OBJECT.or_null(),
    "chat_template": CHAT_TEMPLATE.or_null(),
}

SHARD_INDEX: Table = {"weight_map": Kind("an object of file names", lambda value: is_weight_map(value))}
FILES: Mapping[str, Table] = {  # JSON files of a model directory, besides templates and vocabularies
    "config.json": CONFIG,
    "generation_config.json": GENERATION,
    "tokenizer_config.json": TOKENIZER,
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "tokenizer.json": {},
    "model.safetensors.index.json": SHARD_INDEX,
    "pytorch_model.bin.index.json": SHARD_INDEX,
}


def is_weight_map(value: Any) -> bool:
    """Return whether ``value`` is a shard index's map of tensor name -> file name."""
    return isinstance(value, dict) and bool(value) and all(isinstance(name, str) and name for name in value.values())


def read_json(file: Path, *, remedy: str = REPAIR) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is no such file; InputError if it is something else."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a JSON object; {remedy}")
    return values


def read_facts(file: Path, table: Table, *, remedy: str = REPAIR) -> dict[str, Any]:
    """Read a JSON file and check it against ``table``; InputError names the file, the key and the value."""
    values = read_json(file, remedy=remedy)
    check_facts(values, table, where=file, remedy=remedy)
    return values


def check_facts(values: Mapping[str, Any], table: Table, *, where: object, remedy: str = REPAIR, at: str = "") -> None:
    """Raise InputError for the first of ``values`` that is not of its kind. at: the keys that lead to them, "a.b."."""
    for key, kind in table.items():
        if key not in values:
            continue
        value = values[key]
        if not kind.holds(value):
            raise InputError(f"{where} has {at}{key}={shown(value)}, which must be {kind.words}; {remedy}")
        if isinstance(value, dict) and kind.inside:
            check_facts(value, kind.inside, where=where, remedy=remedy, at=f"{at}{key}.")


def check_counts(config: Mapping[str, Any], tensors: int, *, where: object) -> None:
    """Raise InputError for more layers than stored tensors, and for a token that chooses more experts than there are.

    Building a model of that many layers would take all memory.
    """
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        experts = next((part[key] for key in EXPERTS if part.get(key)), None)
        chosen = part.get(CHOSEN)
        if experts is not None and chosen is not None and chosen > experts:
            raise InputError(
                f"{where} has {CHOSEN}={chosen}, but a layer has {experts} experts to choose from; repair config.json"
            )
        for key in DEPTHS:
            layers = part.get(key)
            if type(layers) is int and layers > tensors:
                raise InputError(
                    f"{where} has {key}={layers}, but the model has {tensors} tensors, less than one per layer; "
                    "repair config.json"
                )


def shown(value: Any) -> str:
    """Return a value for a message, shortened if it is long."""
    try:
        text = repr(value)
    except RecursionError:  # deeply nested lists
        text = type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
