"""Write the parts that all exported directories share: shards, config.json and the small files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matquant.export.card import RECORD, model_card, record
from matquant.export.job import Job
from matquant.format.shards import Report, write_shards
from matquant.format.side_files import side_files
from matquant.system.files import json_bytes


def write_directory(job: Job, folder: Path, config: Mapping[str, Any], report: Report, *, index: bool = False) -> None:
    """Fill ``folder`` with the tensors of ``job``, ``config``, tokenizer files, a record and a model card.

    index: write an index even for a single shard.
    """
    write_shards(folder, job.parts(), report=report, index=index)
    (folder / "config.json").write_bytes(json_bytes(config))
    for name, content in side_files(job.checkpoint.directory).items():
        (folder / name).write_bytes(content)
    (folder / RECORD).write_bytes(json_bytes(record(job)))
    (folder / "README.md").write_text(model_card(job), encoding="utf-8")
