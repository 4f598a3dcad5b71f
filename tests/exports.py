"""What the tests of exporters share: nested checkpoints of random codes, slices in float64, readers of foreign layouts.

The readers are slow and written from the formats' own descriptions; they import nothing of matquant.export.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.format.read import Checkpoint
from matquant.format.write import write_checkpoint

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_size": 64}
UNITS = {np.dtype(np.float32): 2.0**-24, np.dtype(ml_dtypes.bfloat16): 2.0**-8}  # relative error of one rounding


def nested_checkpoint(
    directory: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rule: str = "prefix",
    group_size: int | None = None,
    symmetric: bool = True,
    zero: int | None = None,
    own: bool = True,
    scale_dtype: str = "bfloat16",
    ignore: tuple[str, ...] = ("lm_head",),
    config: Mapping[str, Any] | None = None,
    plain: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """A checkpoint of weights [N, K] by path: every code occurs, scales are storable; own: widths 3, 2 have affines.

    zero: of the 8-bit grid everywhere, None: 128 if symmetric, else random. plain: further tensors.
    """
    random = np.random.default_rng(len(shapes))
    slices = (3, 2) if own else ()
    spec = Spec(
        rule=rule, widths=(8, 4, 2), slices=slices, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )

    def tensor(rows: int, columns: int) -> NestedTensor:
        codes = np.resize(np.arange(256), rows * columns).astype(np.uint8)
        random.shuffle(codes)
        affine = (rows, columns // (group_size or columns))

        def scale() -> np.ndarray:
            found = np.exp(random.normal(-5, 1, affine)).astype(np.float32)
            return found if scale_dtype == "float32" else found.astype(ml_dtypes.bfloat16).astype(np.float32)

        zeros = random.integers(0, 256, affine) if zero is None and not symmetric else np.full(affine, zero or 128)
        apart = {
            bits: (
                scale().astype(ml_dtypes.bfloat16).astype(np.float32),
                random.normal(2 ** (bits - 1), 0.3, affine).astype(np.float16).astype(np.float32),
            )
            for bits in slices
        }
        grid = {"scale": scale(), "zero": zeros.astype(np.float32)}
        return NestedTensor(codes=codes.reshape(rows, columns), rule=rule, slices=apart, **grid)

    items: list[Any] = [(path, tensor(*shape)) for path, shape in shapes.items()]
    items.append(("model.embed_tokens.weight", np.ones((4, 64), dtype=ml_dtypes.bfloat16)))
    items += (plain or {}).items()
    write_checkpoint(directory, items, spec=spec, config=config or LLAMA, ignore=ignore, files={"vocab.txt": b"a\n"})
    return directory


def sliced(checkpoint: Checkpoint, path: str, bits: int) -> np.ndarray:
    """The ``bits``-bit weight [N, K] in float64, by the table of docs/format.md."""
    tensor, step = checkpoint.nested(path), 2 ** (8 - bits)
    code = tensor.codes.astype(np.float64)
    rounded = np.floor(code / step + 0.5)
    code = {"prefix": np.floor(code / step), "round": np.minimum(rounded, 2**bits - 1), "extra": rounded}[tensor.rule]
    scale, zero = (np.asarray(part, dtype=np.float64) for part in (tensor.scale, tensor.zero))
    if bits in tensor.slices:
        scale, zero = (np.asarray(part, dtype=np.float64) for part in tensor.slices[bits])
    else:
        code = code * step + ((step - 1) / 2 if tensor.rule == "prefix" else 0)
    rows, columns = code.shape
    found: np.ndarray = ((code.reshape(rows, scale.shape[1], -1) - zero[..., None]) * scale[..., None]).reshape(
        rows, columns
    )
    return found


def stored(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of an exported directory."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text())
    return values


def bit_fields(words_RW: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` integers of ``bits`` bits in every row of 32-bit words, the lowest bit first, as int64."""
    flags = np.unpackbits(np.ascontiguousarray(words_RW).view(np.uint8), axis=1, bitorder="little")
    fields = flags[:, : count * bits].reshape(len(flags), count, bits).astype(np.int64)
    found: np.ndarray = (fields << np.arange(bits)).sum(axis=2)
    return found


def read_mlx(tensors: Mapping[str, np.ndarray], path: str, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(integers [N, K], weights in float64) of MLX: scales * integer + biases in blocks along in features."""
    scales, biases = (tensors[f"{path}.{part}"].astype(np.float64) for part in ("scales", "biases"))
    codes = bit_fields(tensors[f"{path}.weight"], bits, scales.shape[1] * block)
    weight = codes * np.repeat(scales, block, axis=1) + np.repeat(biases, block, axis=1)
    return codes, weight


def read_gptq(tensors: Mapping[str, np.ndarray], path: str, bits: int, *, less: int) -> np.ndarray:
    """The weights in float64 of the GPTQ layouts; less: what stored zeros are short of, 1 in the first version."""
    scales_GN, group_K = tensors[f"{path}.scales"].astype(np.float64), tensors[f"{path}.g_idx"]
    codes_KN = bit_fields(tensors[f"{path}.qweight"].T, bits, len(group_K)).T
    zeros_GN = bit_fields(tensors[f"{path}.qzeros"], bits, scales_GN.shape[1]) + less
    weight_KN = scales_GN[group_K] * (codes_KN - zeros_GN[group_K])
    return np.ascontiguousarray(weight_KN.T)


def read_compressed(tensors: Mapping[str, np.ndarray], path: str, bits: int, *, symmetric: bool) -> np.ndarray:
    """The weights in float64 of compressed-tensors, pack-quantized: integers of ``bits`` bits plus 2^(bits - 1)."""
    scales = tensors[f"{path}.weight_scale"].astype(np.float64)
    rows, columns = tensors[f"{path}.weight_shape"].tolist()
    codes = bit_fields(tensors[f"{path}.weight_packed"], bits, columns)
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if not symmetric:
        zeros = bit_fields(np.ascontiguousarray(tensors[f"{path}.weight_zero_point"].T), bits, rows).T
    repeat = columns // scales.shape[1]
    weight: np.ndarray = np.repeat(scales, repeat, axis=1) * (codes - np.repeat(zeros, repeat, axis=1))
    return weight


def read_nested(tensors: Mapping[str, np.ndarray], path: str, kept: int, bits: int, *, rule: str) -> np.ndarray:
    """The ``bits``-bit weights in float64 of a smaller nested checkpoint, which has the top ``kept`` bits of the codes.

    docs/format.md: the stored scale is that of the stored integers, 8-bit zero-points are 128, and a width with its
    own scale and zero-point has them as ``path.bits.scale`` and ``path.bits.zero``.
    """
    rows, columns = tensors[f"{path}.weight_shape"].tolist()
    code8 = bit_fields(tensors[f"{path}.weight_packed"], kept, columns) << (8 - kept)
    step = 2 ** (8 - bits)
    code = {
        "prefix": code8 // step,
        "round": np.minimum((2 * code8 + step) // (2 * step), 2**bits - 1),
        "extra": (2 * code8 + step) // (2 * step),
    }[rule]
    if f"{path}.{bits}.scale" in tensors:
        scale, zero = (tensors[f"{path}.{bits}.{part}"].astype(np.float64) for part in ("scale", "zero"))
    else:
        scale = tensors[f"{path}.weight_scale"].astype(np.float64) / 2.0 ** (8 - kept) * step
        zero = np.full(scale.shape, (128 - ((step - 1) / 2 if rule == "prefix" else 0)) / step)
    repeat = columns // scale.shape[1]
    weight: np.ndarray = np.repeat(scale, repeat, axis=1) * (code - np.repeat(zero, repeat, axis=1))
    assert len(weight) == rows
    return weight
