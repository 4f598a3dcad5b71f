"""Dense weights: the slice as an ordinary float Hugging Face model, which every tool reads."""

from typing import Any

from matquant.core.dtypes import CONFIG_NAMES, FLOATS
from matquant.export.directory import write_directory
from matquant.export.job import PIPELINE, Exporter, Job
from matquant.format.shards import Part, Slot
from matquant.format.write import NOT_STOCK

SPLIT = "no --split-experts for transformers"  # at most 50 characters


def plain(job: Job, name: str) -> Part:
    """Return a tensor that is not quantised, with floats in the dtype of the export."""
    checkpoint = job.checkpoint
    stored, shape = checkpoint.stored_dtype(name), checkpoint.stored_shape(name)
    if stored not in FLOATS:
        return Part((Slot(name, stored, shape),), lambda: [checkpoint.array(name)])
    return Part((Slot(name, job.dtype, shape),), lambda: [checkpoint.array(name).astype(FLOATS[job.dtype])])


def config(job: Job) -> dict[str, Any]:
    """Return config.json without quantisation; transformers rejects it if experts are split."""
    kept = {key: value for key, value in job.checkpoint.config.items() if key != "torch_dtype"}
    split = {"quantization_config": NOT_STOCK | {"quantization_status": SPLIT}} if job.split_experts else {}
    return {**kept, "dtype": CONFIG_NAMES[job.dtype], **split}


EXPORTER = Exporter(
    engines="any tool that reads Hugging Face models",
    run=PIPELINE,
    plain=plain,
    holds_experts=lambda experts: True,
    write=lambda job, folder, report: write_directory(job, folder, config(job), report),
)
