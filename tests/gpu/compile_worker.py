"""Compile the kernels for cards that are not there, and count what the machine code holds.

python compile_worker.py CASES.json prints a line of facts for each case {"card": 90, "tokens": 8, "activations":
"float", "grid": "uniform", "group": 128}. Triton brings the assembler and the disassembler.
"""

import collections
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from matquant.backends import gpu_kernels
from matquant.backends.gpu_launch import FINISHED, places_of, schedule
from matquant.backends.gpu_layout import PLACE_INPUTS
from matquant.core.nest import RESIDENT_BITS

ROWS, COLUMNS = 8192, 8192
THREADS = 32  # of a warp
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)")
LABEL, BACK = re.compile(r"^\s*(\.L_\w+):"), re.compile(r"\bBRA\S*.*`\((\.L_\w+)\)")


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """Compile linear_kernel for a weight of 8192 x 8192 at any width up to 8, and the small kernels around it."""
    scaled, channel = case["activations"] == "int8", case["group"] == COLUMNS
    plan = schedule(ROWS, COLUMNS, case["tokens"], scaled=scaled, by_rows=False)
    kind = {"CHANNEL": channel, "COMPANDED": case["grid"] == "companded", "RESIDENT": 8, "PACKED": True}
    split, item = plan.splits > 1, "*i8" if scaled else "*bf16"
    weight = {"planes": "*u8", "affine": "*i32", "widths": "*fp32", "bits": "*i32"}
    sums = {"scales": "*fp32", "sums": "*fp32"}
    build(gpu_kernels.prepare_kernel, {"x": "*bf16", "out": item, **sums}, {"SCALED": scaled}, case["card"], warps=1)
    build(gpu_kernels.finish_kernel, {"partial": "*fp32", "y": "*bf16"}, {"AT_ONCE": FINISHED}, case["card"])
    for by_rows in (False, True):
        build(gpu_kernels.dense_kernel, {**weight, "out": "*bf16"}, {**kind, "BY_ROWS": by_rows}, case["card"])
    constants = {
        "ROWS": plan.rows, "TOKENS": plan.tokens, "PLACES": places_of(case["group"], COLUMNS), "SCALED": scaled,
        "BY_ROWS": False, "SPLIT": split, **kind,
    }  # fmt: skip
    pointers = {"x": item, **sums, **weight, "y": "*fp32" if split else "*bf16"}
    aligned = ["padded_tokens"] if plan.tokens > 8 else []
    found = build(
        gpu_kernels.linear_kernel, pointers, constants, case["card"], warps=plan.warps, stages=plan.stages,
        aligned=["rows", "padded_columns", "padded_rows", *aligned],
    )  # fmt: skip
    return case | facts(found, plan, item_bytes=1 if scaled else 2)


def build(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    card: int,
    *,
    warps: int = 4,
    stages: int = 3,
    aligned: Sequence[str] = (),
) -> Any:
    """Compile a kernel; arguments that are neither pointers nor constants are 32-bit integers."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)}
    source = ASTSource(kernel, signature, {name: constants[name] for name in names if name in constants}, divisible)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", card, THREADS), options=options)


def facts(found: Any, plan: Any, *, item_bytes: int) -> dict[str, Any]:
    """Shared memory, spills, kinds of products and loads, and the instructions per weight of each loop."""
    lines = disassemble(found.asm["cubin"]).splitlines()
    every = collections.Counter(match[1] for line in lines if (match := INSTRUCTION.search(line)))
    per_weight, x_bytes = {}, plan.tokens * 256 * item_bytes
    for loop in loops(lines):
        loaded = plan.warps * THREADS * sum(count * width_of(name) for name, count in loop.items())
        bits = (loaded - x_bytes) / (plan.rows * PLACE_INPUTS)
        per_weight[f"{bits:g}"] = sum(loop.values()) * plan.warps * THREADS / (plan.rows * 256)
    return {
        "shared_bytes": found.metadata.shared,
        "spills": sum(count for name, count in every.items() if name.split(".")[0] in ("STL", "LDL")),
        "products": sorted({name.split(".")[0] for name in every if "MMA" in name}),
        "loads": {name: count for name, count in every.items() if name.startswith("LDGSTS")},
        "instructions_per_weight": per_weight,
        "tiers": [str(bits) for bits in RESIDENT_BITS],
        "plan": [plan.rows, plan.tokens, plan.splits],
    }


def width_of(name: str) -> int:
    """Bytes that one thread loads to shared memory with an instruction."""
    if not name.startswith("LDGSTS"):
        return 0
    return 16 if name.endswith(".128") else 8 if name.endswith(".64") else 4


def loops(lines: list[str]) -> list[collections.Counter[str]]:
    """The instructions of every loop that holds products of tensor cores."""
    labels, found = {}, []
    for number, line in enumerate(lines):
        if match := LABEL.match(line):
            labels[match[1]] = number
        if (match := BACK.search(line)) and labels.get(match[1], number) < number:
            body = (INSTRUCTION.search(each) for each in lines[labels[match[1]] : number + 1])
            counts = collections.Counter(each[1] for each in body if each)
            if any("MMA" in name for name in counts):
                found.append(counts)
    return found


def disassemble(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(compile_case(each)), flush=True)
