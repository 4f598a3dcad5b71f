"""GGUF: one file for llama.cpp and what is built on it.

blocks.py packs the weights, tokens.py reads the tokenizer. As in llama.cpp's converter, the file differs from the
checkpoint by family (the Gguf in hf/families.py): in tensor names; in the row order of Llama's and Mistral's queries
and keys, whose rotary pairs are adjacent in llama.cpp; and in Gemma's norm weights, which are stored plus one. The file
is written a tensor at a time: the gguf package writes everything before the tensors, and we write the tensors, each at
a multiple of 32 bytes.

Models that llama.cpp would run differently are rejected. Of the families here, it has sliding windows only for Gemma-2:
for other families with windows, the context of the file ends where the window would begin to matter.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from matquant.core.dtypes import FLOATS
from matquant.export.blocks import CONTAINERS, pack_blocks, row_bytes
from matquant.export.card import model_card, record
from matquant.export.containers import Container
from matquant.export.job import Exporter, Job
from matquant.export.tokens import INSTEAD, Tokens, read_tokens
from matquant.format.facts import GENERATION
from matquant.format.manifest import side_facts
from matquant.format.read import Checkpoint
from matquant.format.shards import Part, Report, Slot, made
from matquant.hf.architecture import Architecture, check_sizes, read_architecture
from matquant.hf.families import Gguf, supported
from matquant.hf.gguf_file import package
from matquant.system.errors import InputError
from matquant.system.files import json_text

ALIGNMENT = 32  # bytes, GGUF's default
FAMILIES = supported("gguf")
ROPE_FACTORS = "rope_freqs.weight"
LARGEST = 2**31 - 1  # largest integer that llama.cpp keeps in 32 bits
FILE_TYPES = {
    "MXFP4": "MOSTLY_MXFP4_MOE",
    "Q2_K": "MOSTLY_Q2_K",
    "Q3_K": "MOSTLY_Q3_K_S",
    "Q4_K": "MOSTLY_Q4_K_S",
    "Q5_K": "MOSTLY_Q5_K_S",
}
YARN_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def check(checkpoint: Checkpoint) -> Sequence[str]:
    """Return notices about this checkpoint as a GGUF file; InputError if llama.cpp would run it differently."""
    gguf = _package()
    architecture = _architecture(checkpoint)
    _names(gguf, checkpoint, architecture)
    context = _context(checkpoint, architecture)
    shorter = (
        f"llama.cpp has no sliding window for {checkpoint.config['model_type']}: "
        f"the context is cut from {architecture.context} to {context} tokens, where the window begins to matter"
    )
    notices = read_tokens(checkpoint.directory, checkpoint.config).notices
    return (*notices, *([shorter] if context < architecture.context else []))


def write(job: Job, file: Path, report: Report) -> None:
    """Write the file: metadata, names and places of all tensors, then the tensors."""
    gguf, checkpoint = _package(), job.checkpoint
    architecture = _architecture(checkpoint)
    names = _names(gguf, checkpoint, architecture)
    parts = [*job.parts(), *_rope_factors(checkpoint, architecture)]
    kinds = {f"{path}.weight": kind.name for path, kind in job.held().items()}
    with contextlib.closing(gguf.GGUFWriter(file, _family(checkpoint).name)) as writer:
        _add_general(gguf, writer, job)
        _add_architecture(gguf, writer, checkpoint, architecture)
        _add_tokens(writer, read_tokens(checkpoint.directory, checkpoint.config))
        for slot in (slot for part in parts for slot in part.slots):
            kind = gguf.GGMLQuantizationType[kinds.get(slot.name, slot.dtype)]
            given = np.dtype(np.uint8 if slot.name in kinds else np.float32)  # shapes of blocks are in bytes
            writer.add_tensor_info(names[slot.name], slot.shape, given, slot.bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    with file.open("ab") as stream:
        stream.write(bytes(-stream.tell() % ALIGNMENT))
        for part, arrays in made(parts):
            for slot, array in zip(part.slots, arrays, strict=True):
                assert array.nbytes == slot.bytes, slot
                stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                stream.write(bytes(-slot.bytes % ALIGNMENT))
            report(part.bytes)


def containers(checkpoint: Checkpoint, path: str) -> Sequence[Container]:
    """Return all block types."""
    return CONTAINERS


def slots(path: str, container: Container, shape: tuple[int, int], groups: int) -> tuple[Slot, ...]:
    """Return the one tensor of a weight [N, K], in bytes."""
    return (Slot(f"{path}.weight", "U8", (shape[0], row_bytes(container, shape[1]))),)


def rows(checkpoint: Checkpoint, path: str) -> np.ndarray | None:
    """Return the order of a weight's rows: rotary pairs are half a head apart here, adjacent in some families there."""
    if not _family(checkpoint).interleaved or not path.endswith((".q_proj", ".k_proj")):
        return None
    architecture = _read(checkpoint)
    heads = architecture.heads if path.endswith(".q_proj") else architecture.kv_heads
    order = np.arange(heads * architecture.head_dim).reshape(heads, 2, -1)
    return order.swapaxes(1, 2).reshape(-1)


def plain(job: Job, name: str) -> Part:
    """Return a tensor that is not quantised: vectors and norms in float32, matrices as stored or in the given dtype."""
    checkpoint = job.checkpoint
    stored, shape = checkpoint.stored_dtype(name), checkpoint.stored_shape(name)
    if stored not in FLOATS:
        raise InputError(f"--to gguf does not support {name} of dtype {stored}, only {', '.join(FLOATS)}; {INSTEAD}")
    dtype = "F32" if len(shape) == 1 else job.asked or stored
    offset = _read(checkpoint).family.norm_offset if name.endswith("norm.weight") else 0.0
    order = rows(checkpoint, name.rpartition(".")[0])

    def make() -> Sequence[np.ndarray]:
        array = checkpoint.array(name)
        if offset:
            array = array.astype(np.float32) + np.float32(offset)
        return [(array if order is None else array[order]).astype(FLOATS[dtype], copy=False)]

    return Part((Slot(name, dtype, shape),), make)


def _package() -> ModuleType:
    return package("--to gguf", extra="export")


# ------------------------------------------------------------------------------------------------------- architecture


def _read(checkpoint: Checkpoint) -> Architecture:
    return read_architecture(checkpoint.config, where=checkpoint.directory)


def _family(checkpoint: Checkpoint) -> Gguf:
    """Return llama.cpp's description of the checkpoint's family."""
    found: Gguf = FAMILIES[checkpoint.config["model_type"]]
    return found


def _architecture(checkpoint: Checkpoint) -> Architecture:
    """Return the architecture in config.json; InputError if llama.cpp would read it differently."""
    check_sizes(checkpoint.config, checkpoint.weight_shapes(), where=checkpoint.directory)
    found, family, there = _read(checkpoint), checkpoint.config["model_type"], _family(checkpoint)
    gemma = there.gemma
    expected = found.hidden / found.heads if found.layers == there.scaled_by_hidden else found.head_dim
    alternating = [bool(window) for window in found.windows] == [index % 2 == 0 for index in range(found.layers)]
    rope = _rope(checkpoint)
    problems = {
        f"{family} models with another activation": found.gelu != gemma,
        f"query_pre_attn_scalar {found.attention_scale**-2:g}": not math.isclose(found.attention_scale**-2, expected),
        "attention without soft caps": gemma and not (found.attention_cap and found.logit_cap),
        "sliding windows in other layers than every second": gemma and not alternating,
        "an untied head": gemma and not found.tied,
        f"rotary positions of type {rope['rope_type']}": rope["rope_type"] == "llama3" and not there.interleaved,
        "yarn with non-default factors": rope["rope_type"] == "yarn" and not set(rope) <= YARN_KEYS,
    }
    for problem, holds in problems.items():
        if holds:
            raise InputError(
                f"--to gguf does not support {problem}, which llama.cpp's {family} does not compute; {INSTEAD}"
            )
    return found


def _rope(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return rope_parameters of config.json with rope_type and rope_theta, without keys that have no value."""
    config = checkpoint.config
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kept = {key: value for key, value in given.items() if value is not None and key != "type"}
    theta, kind = config.get("rope_theta") or 1e4, given.get("type") or "default"
    return {"rope_theta": theta, "rope_type": kind, **kept}


def _context(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """Return the number of positions for which llama.cpp computes the same attention."""
    if _family(checkpoint).gemma:
        return architecture.context
    return min([architecture.context, *(window for window in architecture.windows if window)])


def _names(gguf: ModuleType, checkpoint: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Return llama.cpp's names of all tensors; InputError for a tensor without a name there."""
    family, there = checkpoint.config["model_type"], _family(checkpoint)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == there.name)
    table = gguf.get_tensor_name_map(kind, architecture.layers)
    names = {ROPE_FACTORS: ROPE_FACTORS}
    for name in (*(f"{path}.weight" for path in checkpoint.shapes), *checkpoint.plain_names()):
        found = table.get_name(name, try_suffixes=(".weight", ".bias"))
        placeless = name.endswith(".bias") and there.biases is not None and not name.endswith(there.biases)
        if found is None or placeless or (architecture.tied and name.startswith("lm_head.")):
            raise InputError(f"--to gguf does not support {name}, which llama.cpp's {family} does not have; {INSTEAD}")
        names[name] = found
    return names


def _rope_factors(checkpoint: Checkpoint, architecture: Architecture) -> list[Part]:
    """Return the factor by which llama3's rule slows each rotary pair, compared with theta alone."""
    rope = _rope(checkpoint)
    if rope["rope_type"] != "llama3":
        return []
    exponents = np.arange(0, architecture.head_dim, 2, dtype=np.float32) / np.float32(architecture.head_dim)
    plain_frequencies = 1 / np.float32(rope["rope_theta"]) ** exponents
    factors = (plain_frequencies / architecture.frequencies[0]).astype(np.float32)
    return [Part((Slot(ROPE_FACTORS, "F32", factors.shape),), lambda: [factors])]


# ----------------------------------------------------------------------------------------------------------- metadata


def _add_general(gguf: ModuleType, writer: Any, job: Job) -> None:
    """Add general metadata: type, origin and the model card."""
    base = job.about.get("base_model")
    kinds = Counter(kind.name for kind in job.held().values()).most_common(1)
    common = kinds[0][0] if kinds else "F32"
    kind = "ALL_F32" if common == "F32" else FILE_TYPES.get(common, f"MOSTLY_{common}")
    writer.add_type("model")
    writer.add_name(job.checkpoint.directory.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_string("matquant.record", json_text(record(job)))
    writer.add_string("matquant.card", model_card(job))
    generation = side_facts(job.checkpoint.directory, "generation_config.json", GENERATION)
    if generation.get("do_sample"):
        for key, name in SAMPLING.items():
            if generation.get(key) is not None:
                value = generation[key]
                getattr(writer, f"add_sampling_{name}")(min(value, LARGEST) if type(value) is int else value)


def _add_architecture(gguf: ModuleType, writer: Any, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Add the shape of the model as llama.cpp reads it."""
    rope = _rope(checkpoint)
    writer.add_vocab_size(architecture.vocab)
    writer.add_context_length(min(_context(checkpoint, architecture), LARGEST))
    writer.add_embedding_length(architecture.hidden)
    writer.add_block_count(architecture.layers)
    writer.add_feed_forward_length(architecture.intermediate)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(architecture.norm_eps)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        trained = rope.get("original_max_position_embeddings", architecture.context)
        writer.add_rope_scaling_factor(float(rope.get("factor") or architecture.context / trained))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(min(int(trained), LARGEST))
    if _family(checkpoint).gemma:
        writer.add_sliding_window(max(architecture.windows))
        writer.add_attn_logit_softcapping(architecture.attention_cap)
        writer.add_final_logit_softcapping(architecture.logit_cap)


def _add_tokens(writer: Any, tokens: Tokens) -> None:
    """Add the tokenizer."""
    writer.add_tokenizer_model(tokens.model)
    if not tokens.texts:
        return
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    for kind, index in tokens.special.items():
        getattr(writer, f"add_{kind}_token_id")(index)
    writer.add_add_bos_token(tokens.adds_bos)
    writer.add_add_eos_token(tokens.adds_eos)
    writer.add_add_space_prefix(tokens.adds_space)
    if tokens.chat_template is not None:
        writer.add_chat_template(tokens.chat_template)


EXPORTER = Exporter(
    engines="llama.cpp",
    run='llama-cli -m FILE.gguf -p "Once upon a time"\nllama-server -m FILE.gguf --port 8080',
    containers=containers,
    slots=slots,
    holds_ends=lambda checkpoint, plan: True,
    tensors=lambda container, encoded: [pack_blocks(container, encoded)],
    families=tuple(FAMILIES),
    suffix=".gguf",
    rows=rows,
    plain=plain,
    dense="F32",
    check=check,
    write=write,
)
