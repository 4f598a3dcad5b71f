"""GGUF files as the gguf package reads them, and the slices they should hold, for tests."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

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


def assert_holds_the_slices(file: Path, directory: Path, plan: dict[str, int], zero_point: str = EXACT) -> None:
    """Every quantised weight of ``file`` is, bit for bit, the slice of the checkpoint, moved if zeros are."""
    checkpoint, weights, types = open_checkpoint(directory), file_weights(file), file_types(file)
    config = checkpoint.config
    for path, bits in plan.items():
        found = weights[gguf_name(path)]
        if config["model_type"] in ("llama", "mistral") and path.endswith(("q_proj", "k_proj")):
            found = from_pairs(found, config[f"num_{'attention' if 'q_proj' in path else 'key_value'}_heads"])
        expected = oracle(checkpoint.nested(path), bits, types[gguf_name(path)], zero_point)
        np.testing.assert_array_equal(found, expected, err_msg=f"{path} at {bits} bits")
