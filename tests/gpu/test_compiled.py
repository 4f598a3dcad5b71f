"""What the kernels become on an H100 (sm_90) and an A100 (sm_80), without either: make test-gpu-compile.

A width is fast enough if memory is the limit: a card has time for so many instructions per weight while it reads the
bits of one. An H100 issues 132 x 4 x 32 instructions in each of 1.755e9 cycles a second and reads 3.35e12 bytes, so at
2, 3, 4, 6 and 8 bits it has time for 2.2, 3.3, 4.4, 6.6 and 8.8. LIMITS are what the code needs now, and a little more.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = Path(os.environ.get("MATQUANT_ENGINES", ROOT / ".engines")).resolve()
SHARED_BYTES = 99 * 1024  # of a program, on every card from compute capability 8.0 on
TRITON = ("3.9.0", "3.6.0")
CASES: dict[str, dict[str, Any]] = {
    "H100, one token, int8": {"card": 90, "tokens": 1, "activations": "int8", "grid": "uniform", "group": 128},
    "H100, one token, bf16": {"card": 90, "tokens": 1, "activations": "float", "grid": "uniform", "group": 128},
    "H100, 64 tokens, int8": {"card": 90, "tokens": 64, "activations": "int8", "grid": "uniform", "group": 128},
    "H100, companded, groups of 64": {"card": 90, "tokens": 1, "activations": "int8", "grid": "companded", "group": 64},
    "A100, one token, int8": {"card": 80, "tokens": 1, "activations": "int8", "grid": "uniform", "group": 128},
}
# Instructions per weight at 2, 3, 4, 6 and 8 bits.
LIMITS: dict[str, tuple[float, ...]] = {
    "H100, one token, int8": (2.9, 2.9, 3.2, 4.1, 4.7),
    "H100, one token, bf16": (3.8, 5.1, 5.7, 6.0, 6.6),
    "A100, one token, int8": (5.0, 6.4, 7.5, 11.2, 13.4),
}


@pytest.fixture(scope="module", params=TRITON)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Facts of every case; Triton lies in a folder that comes first on the path of this environment's Python."""
    folder = CACHE / f"triton-{request.param}"
    if not (folder / "triton").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
        subprocess.run([*install, f"triton=={request.param}"], check=True)
    cases = tmp_path_factory.mktemp("compiled") / "cases.json"
    cases.write_text(json.dumps(list(CASES.values())))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "src")))}
    command = [sys.executable, HERE / "compile_worker.py", cases]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout.splitlines()
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_machine_code(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    found = compiled[name]
    assert found["spills"] == 0
    assert found["shared_bytes"] <= SHARED_BYTES
    assert found["products"] == [PRODUCTS[CASES[name]["card"], CASES[name]["activations"]]]
    wide = sum(count for load, count in found["loads"].items() if load.endswith((".128", ".64")))
    assert wide >= LEAST_LOADS, "planes are loaded 8 or 16 bytes at a time"
    assert sorted(found["instructions_per_weight"]) == found["tiers"], "a loop for each number of bits that is read"
    for bits, limit in zip(found["tiers"], LIMITS.get(name, ()), strict=False):
        assert found["instructions_per_weight"][bits] <= limit, f"{bits} bits"


# Product of 64 rows on an H100 (wgmma: integers, or half precision), of 16 on an A100 (mma).
PRODUCTS = {(90, "int8"): "IGMMA", (90, "float"): "HGMMA", (80, "int8"): "IMMA", (80, "float"): "HMMA"}
LEAST_LOADS = 2 + 3 + 4 + 6 + 8  # one for each bit of every loop, and more where a tile has 128 rows
