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
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from matquant.backends import gpu_kernels
from matquant.backends.gpu_launch import places_of, schedule
from matquant.backends.gpu_layout import PLACE_INPUTS, RESIDENT_BITS

ROWS, COLUMNS = 8192, 8192
THREADS = 32  # of a warp
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)")
LABEL, BACK = re.compile(r"^\s*(\.L_\w+):"), re.compile(r"\bBRA\S*.*`\((\.L_\w+)\)")


def compile_case(case: dict[str, Any]) -> dict[str, Any]:
    """Compile linear_kernel for a weight of 8192 x 8192 at any width up to 8."""
    scaled, channel = case["activations"] == "int8", case["group"] == COLUMNS
    plan = schedule(ROWS, COLUMNS, case["tokens"], scaled=scaled, by_rows=False)
    constants = {
        "ROWS": plan.rows, "TOKENS": plan.tokens, "PLACES": places_of(case["group"], COLUMNS), "SCALED": scaled,
        "CHANNEL": channel, "COMPANDED": case["grid"] == "companded", "RESIDENT": 8, "BY_ROWS": False,
        "SPLIT": plan.splits > 1, "PACKED": True,
    }  # fmt: skip
    pointers = {
        "x": "*i8" if scaled else "*bf16", "scales": "*fp32", "sums": "*fp32", "planes": "*u8", "affine": "*i32",
        "widths": "*fp32", "bits": "*i32", "y": "*fp32" if plan.splits > 1 else "*bf16",
    }  # fmt: skip
    kernel = gpu_kernels.linear_kernel
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = [*pointers, "rows", "padded_columns", "padded_rows", *(["padded_tokens"] if plan.tokens > 8 else [])]
    source = ASTSource(
        kernel, signature, constants, {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    )
    options = {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True}
    found = triton.compile(source, target=GPUTarget("cuda", case["card"], THREADS), options=options)
    return case | facts(found, plan, item_bytes=1 if scaled else 2)


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
