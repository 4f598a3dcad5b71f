"""A reader for each row of FORMATS: the weights that an export holds, from the format's own description.

The readers of layouts are in exports.py and gguf_files.py; here is where an export says which layout it has.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from exports import read_compressed, read_gptq, read_json, read_mlx, read_nested, sliced, stored
from gguf_files import file_weights, from_pairs, gguf_name
from matquant.format.read import Checkpoint

# One rounding of a scale or minimum to what the format stores it in, relative; dense weights are asked for in float32.
ROUNDINGS = {"gguf": 2.0**-11, "gptq": 2.0**-11, "gptq_v2": 2.0**-11}
FLOAT32 = 2.0**-23


@functools.lru_cache(maxsize=1)
def tensors_of(out: Path) -> dict[str, np.ndarray]:
    """All tensors of an export, which is read once."""
    return file_weights(out) if out.is_file() else stored(out)


def read_gguf_weight(out: Path, path: str, bits: int, checkpoint: Checkpoint) -> np.ndarray:
    weight = tensors_of(out)[gguf_name(path)].astype(np.float64)
    kind = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(path.rpartition(".")[2])
    if kind is None or checkpoint.config["model_type"] not in ("llama", "mistral"):
        return weight
    return from_pairs(weight, checkpoint.config[kind])


def read_mlx_weight(out: Path, path: str, bits: int, checkpoint: Checkpoint) -> np.ndarray:
    quantization = read_json(out / "config.json").get("quantization", {})
    own = quantization.get(path, quantization)
    return read_mlx(tensors_of(out), path, own["bits"], own["group_size"])[1]


def read_compressed_weight(out: Path, path: str, bits: int, checkpoint: Checkpoint) -> np.ndarray:
    (group,) = read_json(out / "config.json")["quantization_config"]["config_groups"].values()
    weights = group["weights"]
    return read_compressed(tensors_of(out), path, weights["num_bits"], symmetric=weights["symmetric"])


def read_gptq_weight(out: Path, path: str, bits: int, checkpoint: Checkpoint) -> np.ndarray:
    config = read_json(out / "quantize_config.json")
    return read_gptq(tensors_of(out), path, config["bits"], less=int(config["format"] == "gptq"))


def read_dense_weight(out: Path, path: str, bits: int, checkpoint: Checkpoint) -> np.ndarray:
    found: np.ndarray = tensors_of(out)[f"{path}.weight"].astype(np.float64)
    return found


def read_nested_weight(out: Path, path: str, bits: int, checkpoint: Checkpoint) -> np.ndarray:
    (group,) = read_json(out / "config.json")["quantization_config"]["config_groups"].values()
    return read_nested(tensors_of(out), path, group["weights"]["num_bits"], bits, rule=checkpoint.spec.rule)


READERS: dict[str, Callable[[Path, str, int, Checkpoint], np.ndarray]] = {
    "gguf": read_gguf_weight,
    "mlx": read_mlx_weight,
    "compressed-tensors": read_compressed_weight,
    "gptq": read_gptq_weight,
    "gptq_v2": read_gptq_weight,
    "dense": read_dense_weight,
    "matquant": read_nested_weight,
}


def assert_slice(found: np.ndarray, checkpoint: Checkpoint, path: str, bits: int, unit: float) -> None:
    """``found`` is the slice, to one rounding by ``unit`` of scale * code and of scale * zero-point."""
    expected, tensor = sliced(checkpoint, path, bits), checkpoint.nested(path)
    scale, zero = (np.asarray(part, dtype=np.float64) for part in tensor.affine(bits))
    size = np.abs(scale) * (np.abs(zero) + 2**bits)
    allowed = unit * np.repeat(size, expected.shape[1] // size.shape[1], axis=1)
    gap = np.abs(found - expected)
    if (gap > allowed).any():
        raise AssertionError(f"{path} at {bits} bits is off by {(gap / allowed).max():.0f} roundings")
