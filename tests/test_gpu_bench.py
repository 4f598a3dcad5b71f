"""bench/gpu.py runs from start to end on a CPU, with tiny shapes."""

import json
import subprocess
import sys

import pytest
import torch

from origin import ROOT

KINDS = {"origin", "check", "copy", "kernel", "decode", "skipped"}


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu() -> None:
    command = [sys.executable, ROOT / "bench" / "gpu.py", "--smoke"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["kind"] for row in rows} == KINDS
    assert {row["card"] for row in rows} == {"none (smoke)"}
    engines = {row["engine"] for row in rows if row["kind"] == "kernel"}
    assert engines == {
        "bf16",
        *(f"matquant int{bits}, {kind}" for bits in (8, 6, 4, 3, 2) for kind in ("float", "int8")),
    }
    assert [row["width"] for row in rows if row["kind"] == "decode"] == ["bf16", "int8", "int6", "int4", "int3", "int2"]
    assert {row["what"] for row in rows if row["kind"] == "skipped"} == {"vllm", "recipe best"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_needs_a_gpu() -> None:
    found = subprocess.run([sys.executable, ROOT / "bench" / "gpu.py"], capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == "error: no CUDA device is available; run with --smoke to check the script on a CPU\n"
