"""Check the names and dtypes of a float model's tensors, without torch and without reading tensor data.

transformers drops tensors that its class does not know and casts integers to floats, both without an error. We would
then quantise another model than the one in the files, so both are rejected here, with a hint by kind.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from matquant.core.dtypes import ANY_FLOAT
from matquant.format.facts import read_json
from matquant.system.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES = 100_000_000  # safetensors' limit
SHOWN = 3  # maximum number of names in a message

Stored = dict[str, str]  # tensor name -> dtype as safetensors names it

# Buffers that models compute, and that their older versions saved.
HARMLESS = re.compile(
    r"inv_freq$|(cos|sin)_cached$|position_ids$|token_type_ids$|(attn|attention)\.(masked_)?bias$|causal_mask$|alibi$"
    r"|relative_position_index$|num_batches_tracked$|total_(ops|params)$|_extra_state$|(^|\.)mtp(_\w+)?\."
)
QUANTISED = re.compile(
    r"(weight_scale(_inv|_2)?|weight_(packed|shape|zero_point)|(input|activation|output|[kv])_scale|scales|biases|SCB"
    r"|qweight|qzeros|g_idx|(nested_)?absmax|(nested_)?quant_map|quant_state\.\w+|weight_format|_blocks|_scales)$"
)
LORA = re.compile(r"\.lora_|\.ia3_|\.modules_to_save\.|\.base_layer\.|(^|\.)prompt_(embeddings|encoder)\b")
WEIGHT = re.compile(r"(weight|bias|_proj|qzeros|weight_packed|_blocks|_scales)$")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
QUANTISED_ALREADY = "give the float model it was made from, or dequantise it first"
MERGE = "merge the adapter into the model first (peft's merge_and_unload) and give the result"
# (Pattern of names, kind of tensors, what to do); the first match counts.
KINDS = (
    (LORA, "LoRA or other adapter weights", MERGE),
    (QUANTISED, "scales of weights that another tool has quantised", QUANTISED_ALREADY),
    (
        re.compile(
            r"(^|\.)((pre_)?classifier|score|qa_outputs|\w*classification_head|(v|value|reward|regression)_head)\."
        ),
        "a classification, reward or value head",
        "give the language model without that head",
    ),
    (
        re.compile(r"vision|visual|image|audio|speech|multi_modal|mm_projector"),
        "parts that read images or sound",
        "give the text model alone",
    ),
    (
        re.compile(r"bias$"),
        "biases that config.json does not mention",
        "repair config.json (attention_bias, mlp_bias and the like)",
    ),
)
OTHER = "tensors of another architecture", "repair config.json, or remove them from the model's files"


def check_stored(source: object, stored: Mapping[str, str]) -> None:
    """Raise InputError for weights that are not floats, and for an adapter's weights."""
    whole = [name for name, dtype in stored.items() if _is_quantised(name, dtype)]
    if whole:
        modules = {name.rpartition(".")[0] for name in whole}
        scales = [n for n in stored if QUANTISED.search(n) and n not in whole and n.rpartition(".")[0] in modules]
        beside = f", with scales beside them ({scales[0]})" if scales else ""
        raise InputError(
            f"{source} stores weights as {stored[whole[0]]}{beside}, and its config.json has no quantization_config "
            f"that says how to read them: {some(whole)}; {QUANTISED_ALREADY}"
        )
    adapters = [name for name in stored if LORA.search(name)]
    if adapters:
        raise InputError(f"{source} holds LoRA or other adapter weights: {some(adapters)}; {MERGE}")


def _is_quantised(name: str, dtype: str) -> bool:
    if dtype in ANY_FLOAT or dtype == "BOOL" or HARMLESS.search(name):
        return False
    return dtype.startswith("F") or WEIGHT.search(name) is not None


def check_unused(source: object, names: Iterable[str], *, cls: str, layers: int, extra: int = 0) -> None:
    """Raise InputError if ``names``, the tensors that the class ``cls`` does not use, include any that matter.

    layers: number of decoder layers in config.json; extra: further layers, which predict several tokens ahead and are
    ignored.
    """
    unused = [name for name in sorted(names) if not HARMLESS.search(name)]
    beyond = [(int(found[1]), name) for name in unused if (found := LAYER.search(name)) and int(found[1]) >= layers]
    predicting = {name for number, name in beyond if number < layers + extra}
    unused = [name for name in unused if name not in predicting]
    if not unused:
        return
    if [name for _, name in beyond if name not in predicting] == unused:
        kind = f"layers beyond the {layers} of config.json (num_hidden_layers)"
        remedy = "repair config.json, or remove them from the model's files"
    else:
        kind, remedy = next(((words, do) for pattern, words, do in KINDS if pattern.search(unused[0])), OTHER)
    raise InputError(
        f"{source} has tensors ({len(unused)}) that {cls} does not use and that would be lost, {kind}: "
        f"{some(unused)}; {remedy}"
    )


def some(names: Collection[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(list(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def read_headers(where: Path) -> Stored:
    """Return tensor name -> dtype of the safetensors files that transformers would read in a directory.

    A file that cannot be read is skipped: loading the model reports it.
    """
    single = where / SINGLE
    files = [single] if single.is_file() else shards(where)
    return {name: dtype for file in files for name, dtype in _header(file).items()}


def shards(where: Path) -> list[Path]:
    """Return the safetensors files that a directory's index lists; none if it has no index."""
    weight_map = read_json_object(where / INDEX).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return [where / name for name in sorted({name for name in names if isinstance(name, str)})]


def _header(file: Path) -> Stored:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= HEADER_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    entries = header.items() if isinstance(header, dict) else ()
    return {name: str(entry.get("dtype")) for name, entry in entries if name != "__metadata__" and _is_tensor(entry)}


def _is_tensor(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("dtype"), str)


def read_json_object(file: Path) -> dict[str, Any]:
    """Do ``facts.read_json``, but return {} for a damaged file: loading the model reports it."""
    try:
        return read_json(file)
    except (InputError, OSError):
        return {}
