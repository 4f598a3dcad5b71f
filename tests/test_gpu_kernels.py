"""The Triton kernels in Triton's interpreter, held to core/nest.py: all 256 codes at every width, and no neighbour's.

The interpreter must be chosen before Triton is imported, so cases run in a separate process (gpu_cases.py).
"""

import importlib.util
import itertools
import operator
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from gpu_cases import Case, by_rows
from matquant.core.nest import COMPANDED, integer_positions

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

UNITS, UNIT = 64, 2.0**-24  # roundings of float32, as in test_contract_backends.py
QUICK = {
    "padded inputs, per-channel": Case(columns=200, dense=True),
    "groups of 64, companded": Case(columns=256, groups=4, tokens=8, grid=COMPANDED, dense=True),
    "exact": Case(columns=256, tokens=2, activations="int8", exact=True),
    "exact, companded": Case(columns=256, tokens=1, activations="int8", exact=True, grid=COMPANDED),
    "groups of 32, int8, own scales": Case(
        columns=160, groups=5, tokens=5, activations="int8", own=(3, 2), bits=(3, 6), rows=128
    ),
    "33 tokens": Case(columns=384, groups=3, tokens=33, bits=(4,), rows=64),
    "splits, two row tiles": Case(columns=1024, groups=8, tokens=16, bits=(3,), rows=128, activations="int8"),
    "bfloat16": Case(columns=128, tokens=3, bits=(2,), rows=64, dtype="bfloat16"),
    "many tokens": Case(columns=128, tokens=260, bits=(3,), rows=20),
}
EVERY = {
    f"{grid}, {activations}, {tokens} tokens, {columns} inputs in {groups} groups": Case(
        columns=columns,
        groups=groups,
        tokens=tokens,
        grid=grid,
        activations=activations,
        own=(4, 3, 2),
        exact=exact,
        dense=True,
    )
    for grid, (activations, exact), tokens, (columns, groups) in itertools.product(
        ("uniform", COMPANDED),
        (("float", False), ("int8", False), ("int8", True)),
        (1, 2, 5, 8, 16, 33),
        ((300, 1), (256, 8), (320, 5), (512, 4), (1024, 2)),
    )
    if not exact or groups == 1
}
CASES = {**QUICK, **EVERY}


def run(names: list[str], folder: Path) -> Mapping[str, np.ndarray]:
    out, here = folder / "found.npz", Path(__file__).parent
    environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(here)}
    subprocess.run([sys.executable, here / "gpu_cases.py", out, *names], check=True, env=environ)
    return np.load(out)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, np.ndarray]:
    return run(list(QUICK), tmp_path_factory.mktemp("gpu"))


def rounded(x_TK: np.ndarray) -> np.ndarray:
    """x as int8 activations give it, float64: per token and 128 inputs, the nearest of 255 numbers."""
    x = np.pad(x_TK, [(0, 0), (0, -x_TK.shape[1] % 128)]).reshape(len(x_TK), -1, 128)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    code = np.rint(x * (np.float32(127) / largest)).astype(np.float64)
    return (code * (largest / np.float32(127))).reshape(len(x_TK), -1)[:, : x_TK.shape[1]]


def assert_product(y_TN: np.ndarray, case: Case, *, more: int = 0) -> None:
    """``y_TN`` is x W^T with every row at its width + ``more``: exactly, or to some roundings."""
    position, scale, zero = by_rows(case, case.weight(), more=more)
    x = rounded(case.inputs()) if case.activations == "int8" else case.inputs().astype(np.float64)
    expected = x @ (scale * (position - zero)).T
    allowed = UNITS * UNIT * (np.abs(x) @ (scale * (np.abs(position) + np.abs(zero))).T)
    if case.exact:
        allowed = 0 * allowed
    if case.dtype == "bfloat16":
        allowed += 2.0**-7 * np.abs(expected)  # the interpreter does not round it to nearest
    if (np.abs(y_TN - expected) > allowed).any():
        raise AssertionError(f"off by {np.abs(y_TN - expected).max():.3g}")


def assert_case(found: Mapping[str, np.ndarray], name: str) -> None:
    case, y = CASES[name], found[f"{name}.y"]
    assert_product(y, case)
    if case.dense:
        position, scale, zero = by_rows(case, case.weight())
        np.testing.assert_allclose(found[f"{name}.dense"], scale * (position - zero), rtol=1e-6, atol=1e-6)
    rows, bits = np.arange(case.rows), case.row_bits()
    for width in set(bits.tolist()):  # each block of rows on its own must not pass as the neighbouring width
        for more in {-1, 1}:
            if 1 <= width + more <= 8:
                at = rows[bits == width]
                with pytest.raises(AssertionError, match="off by"):
                    assert_rows(y, case, at, width + more)


def assert_rows(y_TN: np.ndarray, case: Case, rows: np.ndarray, bits: int) -> None:
    """The rows at ``bits`` bits are those of ``y_TN``."""
    weight = case.weight()
    position = weight.positions(bits)[rows].astype(np.float64)
    scale, zero = (
        np.repeat(part[rows].astype(np.float64), case.columns // case.groups, axis=1) for part in weight.affine(bits)
    )
    x = rounded(case.inputs()) if case.activations == "int8" else case.inputs().astype(np.float64)
    size = np.abs(x) @ (scale * (np.abs(position) + np.abs(zero))).T
    gap = np.abs(y_TN[:, rows] - x @ (scale * (position - zero)).T)
    if (gap > UNITS * UNIT * size).any():
        raise AssertionError(f"off by {gap.max():.3g}")


@pytest.mark.parametrize("name", QUICK)
def test_products_are_those_of_the_slice_and_of_no_neighbour(name: str, quick: Mapping[str, np.ndarray]) -> None:
    assert_case(quick, name)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["uniform", COMPANDED])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16, 33])
def test_every_width_group_and_batch(grid: str, tokens: int, tmp_path: Path) -> None:
    names = [name for name, case in EVERY.items() if case.grid == grid and case.tokens == tokens]
    found = run(names, tmp_path)
    for name in names:
        assert_case(found, name)


# PTX ------------------------------------------------------------------------------------------------------------------


def run_ptx(text: str, word: int) -> tuple[int, int]:
    """Run the few instructions of ``look_up`` on a register of four bytes."""
    registers = {"$2": word}

    def value(name: str) -> int:
        return int(name, 16) if name.startswith("0x") else int(name) if name.isdigit() else registers[name]

    def permute(low: int, high: int, selector: int) -> int:
        every, found = (low | high << 32).to_bytes(8, "little"), []
        for place in range(4):
            nibble = selector >> 4 * place & 0xF
            byte = every[nibble & 7]
            found.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        return int.from_bytes(bytes(found), "little")

    act = {"xor.b32": operator.xor, "or.b32": operator.or_, "shr.b32": operator.rshift, "prmt.b32": permute}
    for name, operands in re.findall(r"([a-z]+\.b32) ([^;]+);", text.partition(";")[2]):
        to, *given = [part.strip() for part in operands.split(",")]
        registers[to] = act[name](*map(value, given))
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("bits", [3, 4])
def test_look_ups_in_ptx_give_the_companded_integers(bits: int, quick: Mapping[str, np.ndarray]) -> None:
    text, table = str(quick["ptx"][bits - 3]), integer_positions(bits, COMPANDED)[0]
    drop = 4 - bits
    for first in range(0, 256, 4):
        word = bytes(range(first, first + 4))
        high, low = (value.to_bytes(4, "little") for value in run_ptx(text, int.from_bytes(word, "little")))
        assert high == bytes(table[byte >> 4 + drop] for byte in word)
        assert low == bytes(table[(byte & 0xF) >> drop] for byte in word)
