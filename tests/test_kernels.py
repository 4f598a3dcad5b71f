"""The native products, held to the definition: all 256 codes, every width, rule, grid and instruction set.

Integer parts must be equal. Floats are compared in units of 2^-24 * sum |x| |w|, with 16 allowed, and the neighbouring
width and the other grid must fail the same comparison. Instruction sets, batches and threads must give the same bits.
N out features, K in features, G groups, T tokens.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import linear
import oracle
from cases import each
from matquant import _native
from matquant.core.nest import COMPANDED, KERNEL_GRIDS, UNIFORM, integer_positions, position_table
from matquant.core.planes import Weight, isa, load_weight, matmul
from matquant.core.tensor import NestedTensor

WIDTHS = range(1, 9)
UNITS = 16
READINGS = [*((rule, UNIFORM) for rule in oracle.RULES), ("prefix", COMPANDED)]
TOKENS = (1, 2, 3, 4, 5, 8, 9, 24, 131)  # every kernel: single, panels of 2, 4 and 8, one and two rounds of many tokens
SHAPES = [(1, 1), (16, 32), (17, 31), (33, 300), (130, 128), (5, 515)]

Floats = NDArray[np.float32]


ISAS = _native.isas()[::-1]  # the plainest first
each_isa = pytest.mark.parametrize("isa_name", ISAS)
each_grid = each("grid", KERNEL_GRIDS)
each_reading = each(("rule", "grid"), READINGS)
each_width = each("bits", WIDTHS)


@pytest.fixture(autouse=True)
def _own_isa() -> Iterator[None]:
    yield
    _native.use_isa("")


def random_tensor(
    shape: tuple[int, int],
    *,
    rule: str = "prefix",
    grid: str = UNIFORM,
    group: int | None = None,
    seed: int = 0,
    slices: bool = False,
    one_zero: bool = False,
) -> NestedTensor:
    """A weight with storable scales and, with ``slices``, an affine of its own at widths 2 and 3."""
    generator = np.random.default_rng([seed, *shape])
    groups = shape[1] // (group or shape[1])

    def values(low: float, high: float) -> Floats:
        return generator.uniform(low, high, (shape[0], groups)).astype(np.float16).astype(np.float32)

    own = {bits: (values(0.5, 2), values(0, 2**bits - 1)) for bits in (2, 3)} if slices else {}
    codes = generator.integers(0, 256, shape, dtype=np.uint8)
    scale, zero = values(0.5, 1.5), values(120, 136)
    if one_zero:
        zero[:] = zero[0, 0]
    return NestedTensor(codes=codes, scale=scale, zero=zero, rule=rule, grid=grid, slices=own)


def integer_table(bits: int, rule: str, grid: str) -> NDArray[np.int64]:
    """The integer that each of the 256 codes is at ``bits`` bits."""
    codes = np.array(oracle.slice_code_table(bits, rule), dtype=np.int64)
    return codes if grid == UNIFORM else integer_positions(bits, grid)[0].astype(np.int64)[codes]


def other_readings(bits: int, rule: str, grid: str) -> list[tuple[int, str]]:
    """The widths and grids that a product must not be mistaken for."""
    widths = [(other, grid) for other in {max(bits - 1, 1), min(bits + 1, 8)} - {bits}]
    return [*widths, *((bits, other) for other in KERNEL_GRIDS if other != grid and rule == "prefix")]


def random_x(tokens: int, columns: int, *, seed: int = 1) -> Floats:
    return np.random.default_rng([seed, tokens, columns]).standard_normal((tokens, columns)).astype(np.float32)


def oracle_weight(tensor: NestedTensor, bits: int, *, grid: str | None = None) -> NDArray[np.float64]:
    """scale_r * (position_r - zero_r), from the slicing oracle, in float64; ``grid``: of another one than its own."""
    codes = np.array(oracle.slice_code_table(bits, tensor.rule), dtype=np.float64)[tensor.codes]
    if (grid or tensor.grid) != UNIFORM:
        codes = position_table(bits, grid or tensor.grid).astype(np.float64)[codes.astype(int)]
    scale, zero = (np.asarray(part, np.float64) for part in tensor.affine(bits))
    group = codes.shape[1] // scale.shape[1]
    return np.repeat(scale, group, axis=1) * (codes - np.repeat(zero, group, axis=1))


def oracle_int8(x_TK: Floats, tensor: NestedTensor) -> NDArray[np.float64]:
    """x as the kernels see it: scale = max|x| / 127 and the nearest integer, ties to even.

    Per token and 128 inputs, or 64 where the weight's groups are no larger.
    """
    out = np.zeros(x_TK.shape)
    group = 64 if x_TK.shape[1] // tensor.scale.shape[1] <= 64 else 128
    for start in range(0, x_TK.shape[1], group):
        part = x_TK[:, start : start + group]
        largest = np.abs(part).max(axis=1, keepdims=True)
        inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
        codes = np.clip(np.rint(part * inverse), -127, 127)
        out[:, start : start + group] = (largest / np.float32(127)).astype(np.float64) * codes
    return out


def error_units(y_TN: Floats, x_TK: NDArray[np.float64], weight_NK: NDArray[np.float64]) -> float:
    """Largest error of y against x W^T in units of 2^-24 sum |x| |w|."""
    magnitude = np.abs(x_TK) @ np.abs(weight_NK).T
    return float((np.abs(y_TN - x_TK @ weight_NK.T) / (2.0**-24 * magnitude + 1e-300)).max())


def assert_product(y_TN: Floats, x_TK: NDArray[np.float64], weight_NK: NDArray[np.float64]) -> None:
    units = error_units(y_TN, x_TK, weight_NK)
    assert units <= UNITS, f"{units:.1f} units of 2^-24 sum |x| |w|, {UNITS} allowed"


def assert_same_bits(first: Floats, second: Floats) -> None:
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_array_equal(first.view(np.uint32), second.view(np.uint32))


def test_the_comparisons_can_fail() -> None:
    x, weight = random_x(2, 64), np.ones((3, 64))
    y = (x.astype(np.float64) @ weight.T).astype(np.float32)
    assert_product(y, x.astype(np.float64), weight)
    with pytest.raises(AssertionError):
        assert_product(y * np.float32(1 + 1e-5), x.astype(np.float64), weight)
    with pytest.raises(AssertionError):
        assert_same_bits(y, np.nextafter(y, np.float32(9)))


# Integers -------------------------------------------------------------------------------------------------------------


@each_isa
@each_reading
@each_width
def test_codes_are_sliced_by_the_rule(isa_name: str, rule: str, grid: str, bits: int) -> None:
    """Every code in every byte of a tile, against the table written from the paper."""
    _native.use_isa(isa_name)
    codes = (np.arange(256)[:, None] + np.arange(40)[None, :] * 7).astype(np.uint8)
    weight = _native.Weight(codes, 8, oracle.RULES.index(rule), 40, KERNEL_GRIDS.index(grid))
    table = np.array(oracle.slice_code_table(bits, rule), dtype=np.uint8)
    np.testing.assert_array_equal(weight.codes(bits, oracle.RULES.index(rule)), table[codes])


@each_isa
@each_reading
@each_width
def test_integer_products_are_exact(isa_name: str, rule: str, grid: str, bits: int) -> None:
    """With 127 among each group of integer activations the scale is 1, and every product is an exact integer."""
    _native.use_isa(isa_name)
    generator = np.random.default_rng(bits)
    codes = (np.arange(256)[:, None] + np.arange(128)[None, :] * 7).astype(np.uint8)
    codes[:, :64] = np.arange(256, dtype=np.uint8)[:, None]  # rows of one code: the extremes of every sum
    native = _native.Weight(codes, 8, oracle.RULES.index(rule), 128, KERNEL_GRIDS.index(grid))
    ones = np.ones((256, 1), np.float32)
    native.set_affine(bits, native.add_values(ones, np.zeros_like(ones)), 1.0, 0.0)
    weights = integer_table(bits, rule, grid)[codes].astype(np.float64)
    readings = other_readings(bits, rule, grid)
    others = [integer_table(other, rule, other_grid)[codes].astype(np.float64) for other, other_grid in readings]
    for tokens in TOKENS:
        x = generator.integers(-127, 128, (tokens, 128))
        x[:, 0] = 127
        x[0] = 127 if tokens % 2 else -127
        y = native.matmul(x.astype(np.float32), bits, 0, 1)
        exact = x.astype(np.float64)  # sums of at most 128 * 127 * 1023: float64 holds them, and BLAS is fast
        np.testing.assert_array_equal(y, exact @ weights.T)
        for wrong in others:
            assert (y != exact @ wrong.T).any()


# Products -------------------------------------------------------------------------------------------------------------


@each_reading
@each_width
@each("activations", ["int8", "float"])
def test_products_are_those_of_the_definition_and_not_of_the_neighbour(
    activations: str, bits: int, rule: str, grid: str
) -> None:
    for number, (shape, group) in enumerate([((33, 512), None), ((40, 256), 128), ((16, 96), 32), ((7, 300), 4)]):
        tensor = random_tensor(shape, rule=rule, grid=grid, group=group, slices=number % 2 == 0)
        weight = load_weight(tensor)
        for tokens in (1, 3, 12):
            x = random_x(tokens, shape[1])
            seen = oracle_int8(x, tensor) if activations == "int8" else x.astype(np.float64)
            y = matmul(weight, x, bits=bits, activations=activations, threads=1)
            assert_product(y, seen, oracle_weight(tensor, bits))
            for other, other_grid in other_readings(bits, rule, grid):
                with pytest.raises(AssertionError, match="units"):
                    assert_product(y, seen, oracle_weight(tensor, other, grid=other_grid))


@each_width
@each("activations", ["int8", "float"])
def test_instruction_sets_batches_and_threads_give_the_same_bits(activations: str, bits: int) -> None:
    for number, shape in enumerate(SHAPES):
        rule, grid = READINGS[(number + bits) % len(READINGS)]
        tensor = random_tensor(shape, rule=rule, grid=grid, slices=True)
        weight = load_weight(tensor)
        x = random_x(max(TOKENS), shape[1])

        def product(rows: Floats, threads: int = 1, weight: Weight = weight) -> Floats:
            return matmul(weight, rows, bits=bits, activations=activations, threads=threads)

        _native.use_isa(ISAS[0])
        expected = product(x)
        for name in ISAS:
            _native.use_isa(name)
            for tokens in TOKENS:
                assert_same_bits(product(x[:tokens]), expected[:tokens])
        assert_same_bits(product(x[7:9]), expected[7:9])
        for threads in (2, 3, 16):
            assert_same_bits(product(x, threads), expected)
            assert_same_bits(product(x[:1], threads), expected[:1])


@each_isa
@each_grid
@each("group", [64, 128, 512])
def test_one_zero_point_gives_the_bits_of_many_equal_ones(isa_name: str, grid: str, group: int) -> None:
    _native.use_isa(isa_name)
    tensor = random_tensor((33, 512), grid=grid, group=group, one_zero=True)
    weight, zero = load_weight(tensor), float(tensor.zero[0, 0])
    many = load_weight(dataclasses.replace(tensor, zero=np.where(np.arange(33)[:, None] == 32, zero + 1, tensor.zero)))
    for bits in WIDTHS:
        assert weight.planes.native.affine_bytes(bits) * 2 == many.planes.native.affine_bytes(bits)
        for activations in ("int8", "float"):
            x = random_x(9, 512)
            y = matmul(weight, x, bits=bits, activations=activations, threads=1)
            stored = matmul(many, x, bits=bits, activations=activations, threads=1)
            assert_same_bits(y[:, :32], stored[:, :32])
            assert (y[:, 32] != stored[:, 32]).any()
            for tokens in (1, 2):
                assert_same_bits(matmul(weight, x[:tokens], bits=bits, activations=activations, threads=1), y[:tokens])
                alone = matmul(many, x[:tokens], bits=bits, activations=activations, threads=1)
                assert_same_bits(alone, stored[:tokens])


@each_isa
@each_grid
@each(("columns", "group"), [
    (10, 5), (48, 16), (96, 48), (256, 64), (384, 128), (512, 256), (768, 384), (130, 1), (390, 130), (99, 33),
])  # fmt: skip
@each("activations", ["int8", "float"])
def test_groups_of_any_length(isa_name: str, grid: str, activations: str, columns: int, group: int) -> None:
    _native.use_isa(isa_name)
    tensor = random_tensor((21, columns), group=group, grid=grid, slices=True)
    weight = load_weight(tensor)
    for bits in (2, 3, 4, 6, 8):
        for tokens in (1, 2, 9):
            x = random_x(tokens, columns)
            seen = oracle_int8(x, tensor) if activations == "int8" else x.astype(np.float64)
            y = matmul(weight, x, bits=bits, activations=activations, threads=1)
            assert_product(y, seen, oracle_weight(tensor, bits))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 50), columns=st.integers(1, 400), tokens=st.integers(1, 30), bits=st.integers(1, 8),
    reading=st.sampled_from(READINGS), seed=st.integers(0, 99), activations=st.sampled_from(["int8", "float"]),
)  # fmt: skip
def test_any_shape(
    rows: int, columns: int, tokens: int, bits: int, reading: tuple[str, str], seed: int, activations: str
) -> None:
    tensor = random_tensor((rows, columns), rule=reading[0], grid=reading[1], seed=seed)
    x = random_x(tokens, columns, seed=seed)
    seen = oracle_int8(x, tensor) if activations == "int8" else x.astype(np.float64)
    y = matmul(load_weight(tensor, max_bits=bits), x, bits=bits, activations=activations, threads=1)
    assert_product(y, seen, oracle_weight(tensor, bits))


def test_wide_zeros_and_scales_stay_float32() -> None:
    """An affine that 16 bits do not hold."""
    tensor = random_tensor((20, 64), group=32)
    exact = NestedTensor(codes=tensor.codes, scale=tensor.scale * np.float32(1.0001), zero=tensor.zero, rule="prefix")
    x = random_x(2, 64)
    y = matmul(load_weight(exact), x, bits=4, threads=1)
    assert_product(y, oracle_int8(x, exact), oracle_weight(exact, 4))
    with pytest.raises(AssertionError):
        assert_product(y, oracle_int8(x, tensor), oracle_weight(tensor, 4))


# Activations ----------------------------------------------------------------------------------------------------------


@each_isa
@each("activations", ["int8", "float"])
def test_zero_tiny_and_infinite_activations(isa_name: str, activations: str) -> None:
    _native.use_isa(isa_name)
    tensor = random_tensor((3, 256))
    weight = load_weight(tensor)
    x = random_x(5, 256)
    x[0] = 0
    x[1, :128] = 0
    x[2] = np.float32(1e-40)  # below what a reciprocal can undo
    x[3, 200] = np.nan
    x[4, 3] = np.inf
    y = matmul(weight, x, bits=4, activations=activations, threads=1)
    assert (y[0] == 0).all()
    assert np.isfinite(y[:3]).all()
    assert (np.abs(y[2]) < 1e-34).all()
    assert np.isnan(y[3]).all()
    assert not np.isfinite(y[4]).any()


@each_isa
def test_halves_of_activations_round_to_even(isa_name: str) -> None:
    _native.use_isa(isa_name)
    codes = np.full((1, 128), 129, np.uint8)
    ones = np.ones((1, 1), np.float32)
    weight = load_weight(NestedTensor(codes=codes, scale=ones, zero=128 * ones, rule="prefix"))
    for half, rounded in ((0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (126.5, 126)):
        x = np.zeros((1, 128), np.float32)
        x[0, 0], x[0, 1] = 127, half
        assert matmul(weight, x, bits=8, threads=1)[0, 0] == 127 + rounded


@each_grid
@each("group", [64, 128, 512])
def test_the_benchmarks_accept_the_products_that_they_time(grid: str, group: int) -> None:
    tensor = linear.random_tensor(64, 512, group, grid=grid)
    linear.check_products(tensor, load_weight(tensor))
    other = dataclasses.replace(tensor, codes=np.roll(tensor.codes, 1))
    with pytest.raises(SystemExit, match="int2 is not the definition's product"):
        linear.check_products(tensor, load_weight(other))


# Choice ---------------------------------------------------------------------------------------------------------------


@each_isa
def test_the_environment_forces_an_instruction_set(isa_name: str) -> None:
    script = "from matquant.core.planes import isa; print(isa())"
    environment = {**os.environ, "MATQUANT_ISA": isa_name}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == isa_name


def test_an_unknown_instruction_set_is_an_input_error() -> None:
    script = """
from matquant.system.errors import InputError
from matquant.core.planes import isa
try:
    isa()
except InputError as error:
    print(error)
"""
    environment = {**os.environ, "MATQUANT_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    known = ", ".join(_native.isas())
    assert done.stdout.strip() == f"MATQUANT_ISA=mmx is not an instruction set of this machine; use one of {known}"
    assert isa() in ISAS
