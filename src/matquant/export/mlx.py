"""MLX's affine integers: a directory that mlx_lm and LM Studio load.

A block of 128, 64 or 32 in features shares a scale and a bias, w = scales * u + biases, so every slice fits: u is the
code, of 1 to 6 or 8 bits, the lowest first in uint32 words along in features. Scales of larger groups are repeated.

Scales and biases are float32 unless another dtype is asked for. In float32 both are exact, and MLX then computes
activations in float32 too, whatever the model's dtype: (64 / block) bits per weight and a wider cache. In bfloat16 or
float16 they take half of that, and biases of ``prefix`` slices, which are no multiples of their scale, are rounded.

Source: mlx 0.32 (quantize, dequantize), mlx_lm 0.32 (utils.load_model, utils.save_config).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from matquant.checkpoint import Checkpoint
from matquant.export import dense
from matquant.export.containers import FLOATS, MINIMUM, Container, Encoded, largest_block
from matquant.export.directory import write_directory
from matquant.export.job import Exporter, Job
from matquant.export.stream import Slot
from matquant.packing import pack, words

WIDTHS = (1, 2, 3, 4, 5, 6, 8)
BLOCKS = (128, 64, 32)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")  # with their Hugging Face tensor names


def containers(checkpoint: Checkpoint, path: str) -> list[Container]:
    """All widths in the largest block that a group is made of."""
    block = largest_block(BLOCKS, checkpoint.spec.group_size or checkpoint.shapes[path][1])
    return [
        Container(name=f"affine{bits}-g{block}", bits=bits, zero=MINIMUM, block=block, scale="F32") for bits in WIDTHS
    ]


def check(checkpoint: Checkpoint) -> list[str]:
    """What users should know: mlx_lm reads these families without sliding windows."""
    config = checkpoint.config
    family, window = config.get("model_type"), config.get("sliding_window")
    if window and (family in ("mistral", "gemma2") or "sliding_attention" in (config.get("layer_types") or ())):
        return [f"mlx_lm has no sliding window for {family}: beyond {window} tokens it computes another model"]
    return []


def slots(path: str, container: Container, shape: tuple[int, int], groups: int) -> tuple[Slot, ...]:
    """The tensors of one weight [N, K]: integers, and scales and biases [N, K / block]."""
    rows, columns = shape
    blocks = (rows, columns // container.block)
    return (
        Slot(f"{path}.weight", "U32", (rows, words(columns, container.bits))),
        Slot(f"{path}.scales", container.scale, blocks),
        Slot(f"{path}.biases", container.scale, blocks),
    )


def tensors(container: Container, encoded: Encoded) -> Sequence[np.ndarray]:
    """The arrays of ``slots``."""
    blocks = encoded.codes.shape[1] // container.block
    affine = [
        np.repeat(values.astype(FLOATS[container.scale]), blocks // values.shape[1], axis=1)
        for values in (encoded.fit.scale, encoded.fit.minimum())
    ]
    return [pack(encoded.codes, container.bits), *affine]


def config(job: Job) -> dict[str, Any]:
    """config.json with the container in most use as "quantization", and the paths that have others."""
    kinds = job.held()
    model = {**positions(job.checkpoint.config), **dense.config(job)}
    if not kinds:
        return model
    usual = Counter(kinds.values()).most_common(1)[0][0]
    others = {path: _parameters(kind) for path, kind in kinds.items() if kind != usual}
    quantization = {**_parameters(usual), **others}
    return {**model, "quantization": quantization, "quantization_config": quantization}


def positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling as mlx_lm looks for them; transformers 5 has both in rope_parameters."""
    found = dict(config.get("rope_parameters") or {})
    theta = {"rope_theta": found.pop("rope_theta")} if "rope_theta" in found else {}
    return {**theta, "rope_scaling": found} if found.get("rope_type", "default") != "default" else theta


def _parameters(kind: Container) -> dict[str, Any]:
    return {"group_size": kind.block, "bits": kind.bits, "mode": "affine"}


EXPORTER = Exporter(
    engines="mlx_lm, LM Studio",
    families=FAMILIES,
    containers=containers,
    slots=slots,
    tensors=tensors,
    plain=dense.plain,
    typed=True,
    check=check,
    write=lambda job, folder, report: write_directory(job, folder, config(job), report),
)
