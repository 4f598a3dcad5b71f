"""Exports of a whole model: seconds, bytes per second and peak memory, beside the converters of the formats' own tools.

    python bench/export.py setup      llama.cpp, as bench/decode.py has it
    python bench/export.py run        measure: bench/export.json

The model is that of bench/decode.py: the shape of Llama-3.2-1B, random codes, all linears and the head quantised, the
embedding bf16. The other tool starts from the 8-bit slice as a bf16 file of its own format, and keeps the embedding.
Correctness first: the files must hold the same tensors in the same types. Then both take turns, each in a process of
its own, so that a change of load meets both. Ours checks the checkpoint's hashes and syncs what it wrote, the other
does neither. Memory is anonymous memory, sampled; mapped files come and go as the system likes.
"""

import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import gguf
import typer
from rich.console import Console
from rich.table import Table

from decode import CACHE, SHAPES, VENV, write_random
from decode import setup as setup_llamacpp
from matquant.checkpoint import open_checkpoint
from matquant.export import export, make_job
from origin import ROOT, origin

RECORDS = ROOT / "bench" / "export.json"
WORKER = ROOT / "bench" / "peers" / "quantize_llamacpp.py"
TYPES = {"Q8_0": 8, "Q4_K": 4}  # of GGUF, and the width whose slice has it
THREADS = 2  # as many as an export has
SAMPLE_S = 0.005

Record = dict[str, Any]
app = typer.Typer(add_completion=False)
app.command(name="setup")(setup_llamacpp)


@app.command()
def run(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.2-1b",
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 3,
    keep: Annotated[bool, typer.Option(help="Write bench/export.json.")] = True,
) -> None:
    """Measure and print."""
    folder = CACHE / "decode" / shape
    checkpoint, source, target = folder / "group-0", folder / "bf16.gguf", folder / "converted.gguf"
    if not checkpoint.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_random(checkpoint, SHAPES[shape], None)
    write_dense(checkpoint, source)
    found: dict[str, dict[str, list[Record]]] = {kind: {"ours": [], "llama.cpp": []} for kind in TYPES}
    versions: dict[str, str] = {}
    try:
        for _ in range(rounds):
            for kind, bits in TYPES.items():
                ours: list[str | Path] = [sys.executable, __file__, "one", checkpoint, target, str(bits)]
                found[kind]["ours"].append(measured(ours, target))
                contents = types(target)
                theirs: list[str | Path] = [VENV / "bin" / "python", WORKER, source, target, kind, str(THREADS)]
                found[kind]["llama.cpp"].append(measured(theirs, target))
                versions = found[kind]["llama.cpp"][-1].pop("versions")
                if contents != types(target):
                    raise SystemExit(f"the two files of {kind} differ in their tensors: these times mean nothing")
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)
    kinds = {kind: {name: summary(records) for name, records in tools.items()} for kind, tools in found.items()}
    show(kinds)
    record = {"shape": shape, "rounds": rounds, "threads": THREADS, "kinds": kinds}
    made = origin("matquant", "numpy", "gguf")
    record = {**made, **record, "versions": {**made["versions"], **versions}}
    if keep:
        RECORDS.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(json.dumps(record, sort_keys=True))


@app.command(hidden=True)
def one(checkpoint: Path, target: Path, bits: int) -> None:
    """One export, in this process."""
    began = time.perf_counter()
    export(checkpoint, target, to=target.suffix.removeprefix("."), bits=bits, overwrite=True)
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime}))


def write_dense(directory: Path, file: Path) -> None:
    """The 8-bit slice as a bf16 GGUF, through the exporter with no container chosen."""
    checkpoint = open_checkpoint(directory, check_hashes=False)
    job = make_job(checkpoint, "gguf", dict.fromkeys(checkpoint.shapes, 8))
    dense = dataclasses.replace(job, chosen=dict.fromkeys(job.plan), dtype="BF16")
    job.exporter.write(dense, file, lambda count: None)


def types(file: Path) -> dict[str, str]:
    """Tensor -> type."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


def measured(command: Sequence[str | Path], target: Path) -> Record:
    """What a process says of itself in its last line, its peak of anonymous memory, and what it wrote."""
    target.unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_S)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    said: Record = json.loads(output.splitlines()[-1])
    return {**said, "peak_mb": peak / 1e6, "written_mb": target.stat().st_size / 1e6}


def anonymous_bytes(process: int) -> int:
    """Resident memory of a process that belongs to no file, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def summary(records: Sequence[Record]) -> Record:
    """Medians; mb_s: of what was written."""
    middle = {key: statistics.median(record[key] for record in records) for key in records[0]}
    return {**middle, "mb_s": middle["written_mb"] / middle["seconds"]}


def show(kinds: dict[str, dict[str, Record]]) -> None:
    """A table for people."""
    table = Table("type", "by", "seconds", "CPU seconds", "MB written", "MB/s", "peak MB")
    for kind, tools in kinds.items():
        for name, record in tools.items():
            columns = [record[key] for key in ("seconds", "cpu_s", "written_mb", "mb_s", "peak_mb")]
            table.add_row(kind, name, *(f"{value:.1f}" for value in columns))
    Console().print(table)


if __name__ == "__main__":
    app()
