"""A smaller nested checkpoint: only the top bits of every code; narrower widths stay unchanged.

Width r keeps r + 1 bits. Rules ``round`` and ``extra`` need the bit below the slice to round. Under ``prefix`` that bit
is 1, so that a code is the centre of its bin: other tools read the directory as a stock (r + 1)-bit model whose weights
equal the slice's to half an 8-bit step. See docs/format.md, format 2.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from matquant.core.nest import MASTER_BITS, UNIFORM
from matquant.core.tensor import NestedTensor
from matquant.export import compressed_tensors
from matquant.export.containers import FIXED, Container, Encoded, Fit, Misfit
from matquant.export.directory import write_directory
from matquant.export.job import Exporter, Job
from matquant.format.layout import NAMES, SLICES, scale_dtype, slice_tensors
from matquant.format.manifest import write_manifest
from matquant.format.read import Checkpoint
from matquant.format.shards import Report, as_stored, write_safetensors
from matquant.format.side_files import nested_side_files
from matquant.format.write import quantization_config


def choose(checkpoint: Checkpoint, path: str, bits: int, zero_point: str) -> Container | list[Misfit]:
    """Return the container of the top ``bits`` + 1 bits of the codes at ``path``."""
    if not checkpoint.spec.symmetric:
        return [Misfit("the zero-points of an asymmetric checkpoint need all 8 bits")]
    if checkpoint.spec.grid != UNIFORM:
        return [Misfit(f"the positions of grid {checkpoint.spec.grid!r} need all 8 bits")]
    kept = min(bits + 1, checkpoint.spec.stored(path))
    dtype = NAMES[scale_dtype(path, checkpoint.spec)]
    return Container(name=f"top {kept} of 8 bits", bits=kept, zero=FIXED, scale=dtype)


def encode(tensor: NestedTensor, bits: int, container: Container, zero_point: str) -> Encoded:
    """Keep the top bits of the codes; under ``prefix`` the last one is 1."""
    dropped = MASTER_BITS - container.bits
    codes = tensor.codes >> dropped
    if tensor.rule == "prefix" and dropped:
        codes |= np.uint8(1)
    nothing = np.zeros(tensor.scale.shape, dtype=np.uint8)
    offset = np.full_like(tensor.scale, 2 ** (container.bits - 1))
    return Encoded(
        codes=codes, fit=Fit(factor=nothing + 1, shift=nothing, scale=tensor.scale * 2**dropped, offset=offset)
    )


def write(job: Job, folder: Path, report: Report) -> None:
    """Write the nested checkpoint: shards, config.json, the remaining slices, the manifest."""
    checkpoint = job.checkpoint
    kept = {path: container.bits for path, container in job.held().items()}
    widest = max(job.plan[path] for path in kept)
    ends = any(path in kept for path in checkpoint.ends)
    stored: int | dict[str, int] = kept if len(set(kept.values())) > 1 else min(kept.values())
    left = tuple(bits for bits in checkpoint.spec.slices if bits <= widest)
    spec = replace(
        checkpoint.spec, slices=left, stored_bits=stored, head_bits=checkpoint.spec.head_bits if ends else None
    )
    ignore = checkpoint.ignore if ends else {*checkpoint.ignore, *checkpoint.ends}
    config = {**checkpoint.config, "quantization_config": quantization_config(spec, ignore)}
    write_directory(job, folder, config, report, index=bool(left))
    if left:
        names = [name for path in kept for bits in left for name in slice_tensors(path, bits, spec)]
        parts = [as_stored(checkpoint, name) for name in names]
        write_safetensors(folder / SLICES, parts, report=report, metadata=None)
    for name, content in nested_side_files(checkpoint.directory).items():
        (folder / name).write_bytes(content)
    write_manifest(folder, spec)


EXPORTER = Exporter(
    engines="matquant, transformers, vLLM",
    run='matquant generate DIR --prompt "Once upon a time"\nmatquant serve DIR',
    choose=choose,
    encode=encode,
    slots=compressed_tensors.slots,
    # transformers 5.23 unpacks all weights at one width if it dequantises while loading, as an embedding needs
    holds_ends=lambda checkpoint, plan: len(set(plan.values())) == 1,
    holds_experts=lambda experts: True,
    tensors=compressed_tensors.tensors,
    write=write,
)
