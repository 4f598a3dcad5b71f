"""Exports of a model: seconds, bytes per second and peak memory, compared with the converters of the formats' tools.

    python bench/export.py setup      llama.cpp, as bench/decode.py has it, and mlx_lm
    python bench/export.py run        measure: bench/export.json

The model has the shape of Llama-3.2-1B with an untied head, random codes, all layers and the head quantised, the
embedding bf16. The other tool starts from the 8-bit slice in bf16 in the form it reads, and keeps the embedding;
scales of MLX are bf16, as its converter's. Correctness first: the files must hold the same tensors in the same types.
Then both take turns in separate processes, so that a change of load meets both. Only ours checks the checkpoint's
hashes and syncs its output. Memory is sampled anonymous memory, without mapped files.
"""

import dataclasses
import json
import os
import resource
import shutil
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
from safetensors import safe_open

from decode import CACHE, SHAPES, environment, write_random
from decode import setup as setup_llamacpp
from environments import make_environment
from matquant.export import export, make_job
from matquant.format.read import open_checkpoint
from origin import ROOT, origin

RECORDS = ROOT / "bench" / "export.json"
PEERS = ROOT / "bench" / "peers"
LLAMACPP, MLX = "llama.cpp", "mlx_lm"
MLX_PACKAGES = (ROOT / "tests" / "engines" / "mlx.txt").read_text().split()
BLOCK = 128  # of MLX
CASES = {  # kind: the other tool, the width whose slice is of this kind
    "Q8_0": (LLAMACPP, 8),
    "Q4_K": (LLAMACPP, 4),
    "MLX int8": (MLX, 8),
    "MLX int4": (MLX, 4),
}
THREADS = 2  # as many as an export has
SAMPLE_S = 0.005

Record = dict[str, Any]
app = typer.Typer(add_completion=False)


@app.command()
def setup() -> Path:
    """Make the environments of the other tools; returns the interpreter of mlx_lm's."""
    setup_llamacpp()
    return make_environment(CACHE / "mlx", MLX_PACKAGES)


@app.command()
def run(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3.2-1b",
    rounds: Annotated[int, typer.Option(help="Turns of each.")] = 3,
    keep: Annotated[bool, typer.Option(help="Write bench/export.json.")] = True,
) -> None:
    """Measure and print."""
    python = setup()
    folder = CACHE / "decode" / shape
    checkpoint, work = folder / "group-0", folder / "export"
    if not checkpoint.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_random(checkpoint, {**SHAPES[shape], "tie_word_embeddings": False}, None)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    found: dict[str, dict[str, list[Record]]] = {kind: {"ours": [], tool: []} for kind, (tool, _) in CASES.items()}
    versions: dict[str, str] = {}
    try:
        write_dense(checkpoint, work / "bf16.gguf")
        export(checkpoint, work / "bf16", to="dense", bits=8, dtype="bfloat16")
        for name in ("tokenizer.json", "tokenizer_config.json"):  # mlx_lm wants one
            shutil.copy(ROOT / "examples" / "reference" / "model" / name, work / "bf16")
        for _ in range(rounds):
            for kind, (tool, bits) in CASES.items():
                target = work / ("made.gguf" if tool == LLAMACPP else "made.mlx")
                ours: list[str | Path] = [sys.executable, __file__, "one", checkpoint, target, str(bits)]
                theirs: list[str | Path] = [
                    python,
                    PEERS / "convert_mlx.py",
                    work / "bf16",
                    target,
                    str(bits),
                    str(BLOCK),
                ]
                if tool == LLAMACPP:
                    worker = (environment("peer") / "venv" / "bin" / "python", PEERS / "quantize_llamacpp.py")
                    theirs = [*worker, work / "bf16.gguf", target, kind, str(THREADS)]
                found[kind]["ours"].append(measured(ours, target))
                contents = types(target)
                found[kind][tool].append(measured(theirs, target))
                versions |= found[kind][tool][-1].pop("versions")
                if contents != types(target):
                    raise SystemExit(f"the two of {kind} differ in their tensors: these times mean nothing")
    finally:
        shutil.rmtree(work)
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
    to = target.suffix.removeprefix(".")
    export(checkpoint, target, to=to, bits=bits, dtype="bfloat16" if to == "mlx" else None)
    seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"seconds": seconds, "cpu_s": used.ru_utime + used.ru_stime}))


def write_dense(directory: Path, file: Path) -> None:
    """The 8-bit slice as a bf16 GGUF, through the exporter with no container chosen."""
    checkpoint = open_checkpoint(directory, check_hashes=False)
    job = make_job(checkpoint, "gguf", dict.fromkeys(checkpoint.shapes, 8))
    dense = dataclasses.replace(job, chosen=dict.fromkeys(job.plan), dtype="BF16")
    job.exporter.write(dense, file, lambda count: None)


def types(target: Path) -> dict[str, Any]:
    """Tensor -> type, and shape in MLX, where a type does not say how many bits there are."""
    if target.is_file():
        return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}
    found: dict[str, Any] = {}
    for file in target.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
            found |= {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    return found


def measured(command: Sequence[str | Path], target: Path) -> Record:
    """What a process says of itself in its last line, its peak of anonymous memory, and what it wrote."""
    if target.is_dir():
        shutil.rmtree(target)
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
    return {**said, "peak_mb": peak / 1e6, "written_mb": written_bytes(target) / 1e6}


def written_bytes(target: Path) -> int:
    """Of a file, or of all files of a directory."""
    return sum(file.stat().st_size for file in ([target] if target.is_file() else target.iterdir()))


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
