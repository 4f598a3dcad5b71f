"""compressed-tensors: a directory that stock transformers and vLLM load.

Source: compressed-tensors 0.20. ``pack-quantized`` (pack_to_int32): integers of n bits plus 2^(n-1), lowest bits first
along in features; zero-points are packed the same way along out features. ``mxfp4-pack-quantized``
(MXFP4PackedCompressor): two numbers in a byte, the first in the lower half, and the exponent of each block's scale.
Every container in use gets one config group.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from matquant.core.dtypes import FLOATS
from matquant.core.packing import pack, words
from matquant.export.containers import ELEMENTS, FIXED, INTEGER, MXFP4, Container, Encoded, exponents
from matquant.export.directory import write_directory
from matquant.export.job import PIPELINE, Exporter, Job
from matquant.format.layout import pack_zeros
from matquant.format.read import Checkpoint
from matquant.format.shards import Slot
from matquant.format.write import stock_config
from matquant.hf.families import fused_name
from matquant.system.errors import InputError

MXFP4_FORMAT = "mxfp4-pack-quantized"
MXFP4_WEIGHTS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": MXFP4.block,
    "dynamic": False,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}


def containers(checkpoint: Checkpoint, path: str) -> list[Container]:
    """Return MXFP4 and integers of 1 to 8 bits, with integer zero-points if the checkpoint is asymmetric, else none."""
    name, zero = ("int", FIXED) if checkpoint.spec.symmetric else ("uint", INTEGER)
    scale = checkpoint.stored_dtype(f"{path}.weight_scale")
    integers = [Container(name=f"{name}{bits}", bits=bits, zero=zero, scale=scale) for bits in range(1, 9)]
    return [*integers[:4], MXFP4, *integers[4:]]


def slots(path: str, container: Container, shape: tuple[int, int], groups: int) -> tuple[Slot, ...]:
    """Return the tensors of one weight [N, K]."""
    rows, columns = shape
    if container.zero == ELEMENTS:
        packed = Slot(f"{path}.weight_packed", "U8", (rows, columns // 2))
        return packed, Slot(f"{path}.weight_scale", "U8", (rows, columns // container.block))
    found: tuple[Slot, ...] = (
        Slot(f"{path}.weight_packed", "I32", (rows, words(columns, container.bits))),
        Slot(f"{path}.weight_scale", container.scale, (rows, groups)),
        Slot(f"{path}.weight_shape", "I64", (2,)),
    )
    if container.zero == INTEGER:
        found += (Slot(f"{path}.weight_zero_point", "I32", (words(rows, container.bits), groups)),)
    return found


def tensors(container: Container, encoded: Encoded) -> Sequence[np.ndarray]:
    """Return the arrays of ``slots``."""
    if container.zero == ELEMENTS:
        blocks = encoded.codes.shape[1] // container.block // encoded.fit.scale.shape[1]
        return [pack(encoded.codes, container.bits).view(np.uint8), np.repeat(exponents(encoded.fit.scale), blocks, 1)]
    found = [
        pack(encoded.codes, container.bits).view(np.int32),
        encoded.fit.scale.astype(FLOATS[container.scale]),
        np.array(encoded.codes.shape, dtype=np.int64),
    ]
    if container.zero == INTEGER:
        found.append(pack_zeros(encoded.fit.offset, container.bits))
    return found


def check(job: Job) -> None:
    """Raise InputError for containers that transformers does not read together."""
    kinds = job.held()
    names = ", ".join(kind.name for kind in _by_width(kinds.values()))
    if _asymmetric(job) and len(set(kinds.values())) > 1:
        raise InputError(
            f"--to compressed-tensors does not support {names} together: transformers reads zero-points only if all "
            "layers have one type; use one width, or --to mlx or dense"
        )
    experts = {kind for path, kind in kinds.items() if ".experts." in path}
    if len(experts) > 1:
        names = ", ".join(kind.name for kind in _by_width(experts))
        raise InputError(
            f"--to compressed-tensors does not support experts in {names}: "
            "transformers fuses experts and reads one type for all; use one width for all experts, or --to dense"
        )


def notices(job: Job) -> list[str]:
    """Return a notice about containers that vLLM does not read together."""
    kinds = job.held()
    parts: dict[str, str] = {}  # what vLLM fuses a weight into -> the first weight of it
    for path, kind in kinds.items():
        first = parts.setdefault(fused_name(path), path)
        if kinds[first] != kind:
            return [
                f"vLLM does not load this plan: it fuses {first} ({kinds[first].name}) and {path} ({kind.name}); "
                "for vLLM make the plan with --fused, or serve the checkpoint itself"
            ]
    return []


def config(job: Job) -> dict[str, Any]:
    """Return config.json with one config group for every container in use."""
    checkpoint, chosen = job.checkpoint, job.held()
    kinds = _by_width(chosen.values())
    groups = {
        (kind.bits, kind.zero == FIXED): [path for path, container in chosen.items() if container == kind]
        for kind in kinds
    }
    quantization = stock_config(
        groups, group_size=checkpoint.spec.group_size, ignore={*checkpoint.ignore, *checkpoint.ends}
    )
    if MXFP4 in kinds:
        for kind, group in zip(kinds, quantization["config_groups"].values(), strict=True):
            own = {"weights": MXFP4_WEIGHTS, "format": MXFP4_FORMAT} if kind == MXFP4 else {"format": "pack-quantized"}
            group.update(own)
        quantization["format"] = MXFP4_FORMAT if len(kinds) == 1 else "mixed-precision"
    if _asymmetric(job):
        quantization["dequantize"] = True  # without it transformers 5.23 gives packed zero-points wrong shapes
    # transformers 5.23 makes MXFP4 bfloat16, which holds it, whatever the model's dtype is
    dtype = {"dtype": "bfloat16"} if MXFP4 in kinds else {}
    return {**checkpoint.config, **dtype, "quantization_config": quantization}


def _by_width(kinds: Iterable[Container]) -> list[Container]:
    return sorted(set(kinds), key=lambda container: (-container.bits, container.name))


def _asymmetric(job: Job) -> bool:
    return not job.checkpoint.spec.symmetric


EXPORTER = Exporter(
    engines="transformers, vLLM",
    run=f"pip install transformers compressed-tensors\n{PIPELINE}\nvllm serve DIR",
    containers=containers,
    slots=slots,
    tensors=tensors,
    holds_experts=lambda experts: experts.stock,
    check_plan=check,
    plan_notices=notices,
    write=lambda job, folder, report: write_directory(job, folder, config(job), report),
)
