"""The GPTQ layouts: a directory that GPTQModel loads, and engines that know its kernels.

A linear layer [N, K] is four tensors: qweight int32 [K * bits / 32, N] and qzeros int32 [G, N * bits / 32] hold
integers one after the other from the lowest bit up, scales fp16 [G, N], g_idx int32 [K] the group of every in feature.

    gptq      mid-range zero-points, stored minus one
    gptq_v2   any integer zero-point, stored unchanged

Widths are 2, 3, 4 and 8; the last word may be partly filled, except for 3-bit integers. GPTQModel supports only some
group sizes, so larger groups repeat their scales. Source: GPTQModel 7.6 (nn_modules/qlinear, quantization/config.py).
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from matquant.core.packing import pack, words
from matquant.export.containers import FIXED, INTEGER, Container, Encoded, largest_block
from matquant.export.directory import write_directory
from matquant.export.job import Exporter, Job
from matquant.format.read import Checkpoint
from matquant.format.shards import Report, Slot
from matquant.hf.families import supported
from matquant.system.files import json_bytes

WIDTHS = (2, 3, 4, 8)
BLOCKS = (1024, 512, 256, 128, 64, 32, 16)  # group sizes
FILLED = {3: 32}  # width -> in and out features must be multiples of this


def containers(checkpoint: Checkpoint, path: str, *, zero: str) -> list[Container]:
    """Return all widths, in the largest group size that divides ours; one group per row if ours is."""
    columns, size = checkpoint.shapes[path][1], checkpoint.spec.group_size
    block = largest_block(BLOCKS, size) if size else columns
    sign = "" if zero == FIXED else "u"
    found = []
    for bits in WIDTHS:
        filled = FILLED.get(bits, 1)
        held = block if columns % filled == 0 else filled
        found.append(Container(name=f"{sign}int{bits}", bits=bits, zero=zero, block=held, rows=filled))
    return found


def slots(path: str, container: Container, shape: tuple[int, int], groups: int) -> tuple[Slot, ...]:
    """Return the tensors of one weight [N, K]."""
    rows, columns = shape
    groups = columns // container.block
    return (
        Slot(f"{path}.qweight", "I32", (words(columns, container.bits), rows)),
        Slot(f"{path}.qzeros", "I32", (groups, words(rows, container.bits))),
        Slot(f"{path}.scales", "F16", (groups, rows)),
        Slot(f"{path}.g_idx", "I32", (columns,)),
    )


def tensors(container: Container, encoded: Encoded) -> Sequence[np.ndarray]:
    """Return the arrays of ``slots``."""
    columns = encoded.codes.shape[1]
    groups = columns // container.block
    repeated = [
        np.repeat(values, groups // values.shape[1], axis=1).T for values in (encoded.fit.scale, encoded.fit.offset)
    ]
    zeros_GN = repeated[1].astype(np.uint8) - np.uint8(container.zero == FIXED)
    return [
        np.ascontiguousarray(pack(encoded.codes, container.bits).view(np.int32).T),
        pack(zeros_GN, container.bits).view(np.int32),
        np.ascontiguousarray(repeated[0].astype(np.float16)),
        np.arange(columns, dtype=np.int32) // np.int32(container.block),
    ]


def quantization_config(job: Job) -> dict[str, Any]:
    """Return the quantisation for both JSON files: the most frequent width, and ``dynamic`` for paths that differ."""
    checkpoint = job.checkpoint
    kinds = job.held()
    usual = Counter(kind.bits for kind in kinds.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, int]] = {}
    for bits in sorted({kind.bits for kind in kinds.values()} - {usual}):
        dynamic[f"+:{_any_of(path for path, kind in kinds.items() if kind.bits == bits)}"] = {"bits": bits}
    kept = [*(path for path in job.chosen if path not in kinds), *checkpoint.ignore]
    if kept:
        dynamic[f"-:{_any_of(kept)}"] = {}
    layout = job.about["format"]
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "checkpoint_format": layout,
        "format": layout,
        "bits": usual,
        "group_size": next(iter(kinds.values())).block if checkpoint.spec.group_size else -1,
        "sym": all(kind.zero == FIXED for kind in kinds.values()),
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": [f"matquant:{version('matquant')}"]},
    }


def _any_of(paths: Sequence[str] | Any) -> str:
    """Return a regular expression that matches exactly these paths."""
    return f"^(?:{'|'.join(re.escape(path) for path in paths)})$"


def write(job: Job, folder: Path, report: Report) -> None:
    """Write the directory, with the quantisation in both JSON files that readers look at."""
    if not any(job.chosen.values()):
        write_directory(job, folder, job.checkpoint.config, report)
        return
    quantization = quantization_config(job)
    write_directory(job, folder, {**job.checkpoint.config, "quantization_config": quantization}, report)
    (folder / "quantize_config.json").write_bytes(json_bytes(quantization))


RUN = (
    "pip install gptqmodel\n"
    "python -c \"from gptqmodel import GPTQModel; m = GPTQModel.load('DIR'); "
    "print(m.tokenizer.decode(m.generate('The')[0]))\""
)


def _exporter(zero: str) -> Exporter:
    return Exporter(
        engines="GPTQModel, vLLM" if zero == FIXED else "GPTQModel",
        run=RUN + ("\nvllm serve DIR" if zero == FIXED else ""),
        families=tuple(supported("gptq")),
        containers=partial(containers, zero=zero),
        slots=slots,
        tensors=tensors,
        write=write,
    )


V1, V2 = _exporter(FIXED), _exporter(INTEGER)
