"""GGUF files as the gguf package reads and writes them, and the slices they should hold, for tests."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from conftest import SMALL, make_tokenizer
from matquant.core.tensor import NestedTensor
from matquant.export.containers import EXACT, read_affine
from matquant.format.read import open_checkpoint
from oracle import slice_code


def file_weights(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a GGUF file by its names, float32, as the gguf package reads them."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = np.asarray(values, np.float32).reshape([int(size) for size in tensor.shape[::-1]])
    return found


def file_types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def metadata(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def from_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows with rotary pairs side by side back to half a head apart: row 2 i + h of a head is row i + h size / 2."""
    size = len(weight) // heads
    order = [head * size + 2 * (row % (size // 2)) + row // (size // 2) for head in range(heads) for row in range(size)]
    return weight[order]


def oracle(tensor: NestedTensor, bits: int, type_name: str, zero_point: str = EXACT) -> np.ndarray:
    """The slice with its scale and minimum in float16, as the type holds them; float32 where there is no block."""
    scale, zero = read_affine(tensor, bits, zero_point=zero_point)
    codes = np.array([slice_code(code, bits, tensor.rule) for code in range(256)], np.float32)[tensor.codes]
    grouped = codes.reshape(*scale.shape, -1)
    if type_name == "F32":
        weight = scale[..., None] * (grouped - zero[..., None])
    elif type_name in ("Q2_K", "Q4_K", "Q5_K", "Q4_1", "Q5_1"):
        weight = np.float32(np.float16(scale))[..., None] * grouped - np.float32(np.float16(scale * zero))[..., None]
    else:
        weight = np.float32(np.float16(scale))[..., None] * (grouped - zero[..., None])
    found: np.ndarray = weight.reshape(tensor.codes.shape)
    return found


GGUF_NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "mlp.down_proj": "ffn_down",
}


def gguf_name(path: str) -> str:
    _, _, layer, rest = path.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


@functools.lru_cache(maxsize=1)
def read_once(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The weights and types of a file, which nothing may write again."""
    return file_weights(file), file_types(file)


def assert_holds_the_slices(file: Path, directory: Path, plan: dict[str, int], zero_point: str = EXACT) -> None:
    """Every quantised weight of ``file`` is, bit for bit, the slice of the checkpoint, moved if zeros are.

    Files are cached by path, so a test that writes several gives each its own name.
    """
    checkpoint, (weights, types) = open_checkpoint(directory), read_once(file)
    config = checkpoint.config
    for path, bits in plan.items():
        found = weights[gguf_name(path)]
        if config["model_type"] in ("llama", "mistral") and path.endswith(("q_proj", "k_proj")):
            found = from_pairs(found, config[f"num_{'attention' if 'q_proj' in path else 'key_value'}_heads"])
        expected = oracle(checkpoint.nested(path), bits, types[gguf_name(path)], zero_point)
        np.testing.assert_array_equal(found, expected, err_msg=f"{path} at {bits} bits")


# Files of a tiny Llama, as llama.cpp's converter writes them ----------------------------------------------------------

SIZES: dict[str, Any] = {**SMALL, "intermediate_size": 64}  # rows are whole blocks of 32
PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"} | {
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    **{"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


def there(name: str) -> str:
    """llama.cpp's name of a tensor of Llama."""
    path, ending = name.rsplit(".", 1)
    if path in TOP:
        return f"{TOP[path]}.{ending}"
    _, _, layer, part = path.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{ending}"


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Queries or keys with adjacent rotary pairs, as llama.cpp's converter permutes them."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tiny_llama(*, tied: bool, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, **more}, tie_word_embeddings=tied, dtype=dtype)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 4 if parameter.ndim > 1 else parameter + 0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def write_gguf(file: Path, model: Any, kind: str, metadata: Mapping[str, Any] | None = None) -> Path:
    """A GGUF file of a Llama by the gguf package; metadata: further entries, or None for one that is left out."""
    config, qtype = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    values: dict[str, Any] = {f"llama.{key}": value for key, value in numbers.items()}
    values |= {"llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps, "llama.rope.freq_base": 10000.0}
    values |= tokens_of(make_tokenizer()) | dict(metadata or {})
    for key, value in values.items():
        if value is not None:
            add(writer, key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            array = paired(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(there(name), np.ascontiguousarray(array))
        elif kind == "F16":
            writer.add_tensor(there(name), array.astype(np.float16))
        else:
            writer.add_tensor(there(name), gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (writer.add_array if isinstance(value, list) else kinds[type(value)])(key, value)


def tokens_of(tokenizer: Any) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer with control tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    texts = [text for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    special = {entry["content"] for entry in backend["added_tokens"]}
    ids = {f"tokenizer.ggml.{kind}_token_id": texts.index("<|endoftext|>") for kind in ("bos", "eos", "padding")}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3 if text in special else 1 for text in texts],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["model"]["merges"]] or ["no merges"],
        **ids,
        "tokenizer.chat_template": TEMPLATE,
    }
