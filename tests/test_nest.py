"""Slicing, held to the paper on all 256 codes x 8 widths x 3 rules x numpy and torch.

Every comparison is also made against the neighbouring width, where it has to fail: serving the wrong width is the
characteristic bug of a nested code base, and a test that cannot see it proves nothing.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import matquant
import oracle
from cases import each
from matquant.core import nest

torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")

Array = Any  # a numpy array or a torch tensor: every test runs on both

WIDTHS = range(1, 9)
CODE_DTYPES = ("uint8", "int16", "int32", "int64")
NOT_INTEGER = ("float16", "float32", "float64", "complex64", "bool")
NOT_WIDTHS = [0, 9, -1, 16, True, False, 4.0, 2.5, "4", [4], None]
NOT_RULES = ["truncate", "Prefix", "", ["round"], None, 2]
CODES = np.arange(256, dtype=np.uint8)

each_kind = pytest.mark.parametrize("kind", ["numpy", pytest.param("torch", marks=needs_torch)])
each_rule = each("rule", oracle.RULES)
each_width = each("bits", WIDTHS)


def of_kind(array: Array, kind: str) -> Array:
    """The same array as numpy or as torch."""
    return torch.from_numpy(np.array(array)) if kind == "torch" else np.asarray(array)


def assert_same_kind(actual: Array, given: Array, dtype: str) -> None:
    """`actual` is an array of the library of `given`, of its shape, with elements of `dtype`."""
    kind = np.ndarray if isinstance(given, np.ndarray) else torch.Tensor
    assert isinstance(actual, kind), f"{type(actual)} came back for {type(given)}"
    assert tuple(actual.shape) == tuple(given.shape), f"shape {actual.shape} came back for {given.shape}"
    assert str(actual.dtype).removeprefix("torch.") == dtype, f"dtype {actual.dtype} came back, wanted {dtype}"


def assert_equals_oracle(actual: Array, expected: list[int] | list[float]) -> None:
    """Every element equals the oracle's, with no tolerance; the message names the first code that does not."""
    got = np.asarray(actual).tolist()
    assert len(got) == len(expected), f"{len(got)} results for {len(expected)} codes"
    wrong = [code for code, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]]
    assert not wrong, f"{len(wrong)} codes differ; code {wrong[0]} gives {got[wrong[0]]}, not {expected[wrong[0]]}"


def assert_rejected(
    error: type[Exception], text: str, function: Callable[..., object], *args: object, **keywords: object
) -> None:
    """The call raises this type, or a kind of it, with exactly this text."""
    with pytest.raises(error) as caught:
        function(*args, **keywords)
    assert str(caught.value) == text


def neighbours(bits: int) -> list[int]:
    """The widths next to `bits`."""
    return [width for width in (bits - 1, bits + 1) if width in WIDTHS]


# The helpers can fail -------------------------------------------------------------------------------------------------


def test_comparison_with_the_oracle_fails_on_one_wrong_code() -> None:
    table = oracle.slice_code_table(2, "prefix")
    assert_equals_oracle(np.array(table), table)
    with pytest.raises(AssertionError, match="1 codes differ; code 200 gives 2, not 3"):
        assert_equals_oracle(np.where(CODES == 200, 2, table), table)
    with pytest.raises(AssertionError, match="255 results for 256 codes"):
        assert_equals_oracle(np.array(table[:-1]), table)


@needs_torch
def test_comparison_of_kinds_fails_on_another_library_shape_or_dtype() -> None:
    assert_same_kind(CODES, CODES, "uint8")
    for actual, dtype in [(of_kind(CODES, "torch"), "uint8"), (CODES[:-1], "uint8"), (CODES, "int16")]:
        with pytest.raises(AssertionError, match="came back"):
            assert_same_kind(actual, CODES, dtype)


def test_comparison_of_errors_fails_on_another_type_or_text() -> None:
    def refuse() -> None:
        raise ValueError("bits=9")

    assert_rejected(ValueError, "bits=9", refuse)
    with pytest.raises(AssertionError, match="bits=9"):
        assert_rejected(ValueError, "bits=0", refuse)
    with pytest.raises(ValueError, match="bits=9"):  # the ValueError itself comes through: it is no TypeError
        assert_rejected(TypeError, "bits=9", refuse)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_rejected(ValueError, "bits=9", len, "bits")


# All codes, widths, rules and kinds -----------------------------------------------------------------------------------


@each_kind
@each_rule
@each_width
def test_sliced_codes_equal_the_oracle_and_differ_from_the_neighbouring_width(bits: int, rule: str, kind: str) -> None:
    for dtype in CODE_DTYPES:
        codes = of_kind(CODES.astype(dtype), kind)
        sliced = nest.slice_codes(codes, bits, rule=rule)
        assert_same_kind(sliced, codes, dtype)
        assert_equals_oracle(sliced, oracle.slice_code_table(bits, rule))
        assert_equals_oracle(codes, list(range(256)))  # the argument is left as it was
        for neighbour in neighbours(bits):
            with pytest.raises(AssertionError, match="codes differ"):
                assert_equals_oracle(sliced, oracle.slice_code_table(neighbour, rule))


@each_kind
@each_rule
@each_width
def test_sliced_values_equal_the_oracle_and_differ_from_the_neighbouring_width(bits: int, rule: str, kind: str) -> None:
    for dtype in CODE_DTYPES:
        codes = of_kind(CODES.astype(dtype), kind)
        values = nest.slice_values(codes, bits, rule=rule)
        assert_same_kind(values, codes, "float32")
        assert_equals_oracle(values, oracle.slice_value_table(bits, rule))
        assert_equals_oracle(codes, list(range(256)))
        for neighbour in neighbours(bits):
            with pytest.raises(AssertionError, match="codes differ"):
                assert_equals_oracle(values, oracle.slice_value_table(neighbour, rule))


@each_rule
@each_width
def test_another_rule_fails_the_same_comparison_below_eight_bits(bits: int, rule: str) -> None:
    sliced = nest.slice_codes(CODES, bits, rule=rule)
    for other in set(oracle.RULES) - {rule}:
        if bits == 8:
            assert_equals_oracle(sliced, oracle.slice_code_table(bits, other))
            continue
        with pytest.raises(AssertionError, match="codes differ"):
            assert_equals_oracle(sliced, oracle.slice_code_table(bits, other))


@each_kind
@each_width
def test_prefix_is_the_default_rule(bits: int, kind: str) -> None:
    codes = of_kind(CODES, kind)
    assert_equals_oracle(nest.slice_codes(codes, bits), oracle.slice_code_table(bits, "prefix"))
    assert_equals_oracle(nest.slice_values(codes, bits), oracle.slice_value_table(bits, "prefix"))


@each_kind
@each_rule
def test_eight_bits_is_the_identity(rule: str, kind: str) -> None:
    assert_equals_oracle(nest.slice_codes(of_kind(CODES, kind), 8, rule=rule), list(range(256)))
    assert_equals_oracle(nest.slice_values(of_kind(CODES, kind), 8, rule=rule), list(range(256)))


@each_kind
@each_rule
@each("shape", [(0,), (0, 4), (1, 1), (2, 4, 32)])
def test_any_shape_and_stride_is_sliced_elementwise(shape: tuple[int, ...], rule: str, kind: str) -> None:
    flat = CODES[: int(np.prod(shape))]
    for bits in WIDTHS:
        codes = of_kind(flat.reshape(shape), kind)
        transposed = codes.T if kind == "numpy" else codes.permute(*range(codes.ndim)[::-1])
        expected = np.array(oracle.slice_code_table(bits, rule), dtype=np.uint8)[flat].reshape(shape)
        for given, wanted in [(codes, expected), (transposed, expected.T), (codes[..., ::2], expected[..., ::2])]:
            sliced = nest.slice_codes(given, bits, rule=rule)
            assert_same_kind(sliced, given, "uint8")
            np.testing.assert_array_equal(np.asarray(sliced), wanted)


# What the paper says --------------------------------------------------------------------------------------------------


@each_kind
@each(
    ("code", "rule", "sliced", "value"),
    [
        (53, "round", 1, 64),  # appendix A: the bit worth 32 is set, so 00 is rounded up to 01
        (53, "extra", 1, 64),
        (53, "prefix", 0, 31.5),  # "first two MSBs 00"
        (240, "round", 3, 192),  # appendix A: rounds to 4, clamped to 3
        (240, "extra", 4, 256),
        (234, "round", 3, 192),  # section 7: Eq. 6 clips 4 to 3
        (234, "extra", 4, 256),  # section 7: Eq. 8 keeps 4
        (234, "prefix", 3, 223.5),
        (32, "round", 1, 64),  # exactly half: upwards
        (24, "round", 0, 0),
        (255, "prefix", 3, 223.5),
        (0, "prefix", 0, 31.5),
    ],
)
def test_the_worked_examples_of_the_paper_hold_at_two_bits(
    code: int, rule: str, sliced: int, value: float, kind: str
) -> None:
    codes = of_kind(CODES, kind)
    assert nest.slice_codes(codes, 2, rule=rule)[code] == sliced == oracle.slice_code(code, 2, rule)
    assert nest.slice_values(codes, 2, rule=rule)[code] == value == oracle.slice_value(code, 2, rule)


@each_kind
def test_two_bit_grids_are_those_the_paper_lists(kind: str) -> None:
    grids = {
        rule: np.unique(np.asarray(nest.slice_values(of_kind(CODES, kind), 2, rule=rule))) for rule in oracle.RULES
    }
    assert grids["round"].tolist() == [0, 64, 128, 192]
    assert grids["extra"].tolist() == [0, 64, 128, 192, 256]
    assert grids["prefix"].tolist() == [31.5, 95.5, 159.5, 223.5]  # symmetric about 127.5, the middle of the range


@each_kind
@each_width
def test_extra_has_one_value_more_than_the_other_rules(bits: int, kind: str) -> None:
    for rule in oracle.RULES:
        sliced = np.unique(np.asarray(nest.slice_codes(of_kind(CODES, kind), bits, rule=rule)))
        top = 2**bits if rule == "extra" and bits < 8 else 2**bits - 1
        assert sliced.tolist() == list(range(top + 1))


@each_kind
def test_prefix_code_is_the_top_bits_of_the_code(kind: str) -> None:
    for bits in WIDTHS:
        sliced = np.asarray(nest.slice_codes(of_kind(CODES, kind), bits, rule="prefix")).tolist()
        assert [f"{code:0{bits}b}" for code in sliced] == [f"{code:08b}"[:bits] for code in range(256)]


@each_kind
def test_slice_of_slice_is_the_slice_under_prefix(kind: str) -> None:
    codes = of_kind(CODES, kind)
    for wide in WIDTHS:
        on_grid = nest.slice_codes(codes, wide, rule="prefix") << (8 - wide)
        for narrow in range(1, wide + 1):
            assert_equals_oracle(
                nest.slice_codes(on_grid, narrow, rule="prefix"), oracle.slice_code_table(narrow, "prefix")
            )


@each_kind
@each("rule", ["round", "extra"])
def test_slice_of_slice_differs_under_rounding(rule: str, kind: str) -> None:
    codes = of_kind(CODES.astype(np.int16), kind)  # a 4-bit extra slice stands at up to 256
    directly = np.asarray(nest.slice_codes(codes, 2, rule=rule))
    through_four = np.asarray(nest.slice_codes(nest.slice_codes(codes, 4, rule=rule) << 4, 2, rule=rule))
    expected = [*range(24, 32), *range(88, 96), *range(152, 160)]
    if rule == "extra":
        expected += range(216, 224)  # without the clamp the fourth border is crossed too
    assert np.flatnonzero(directly != through_four).tolist() == expected


@each_kind
@each("rule", ["round", "extra"])
def test_halves_round_up_where_half_even_would_round_down(rule: str, kind: str) -> None:
    for bits in range(1, 8):
        step = 2 ** (8 - bits)
        halves = [code for code in range(256) if code % step == step // 2 and code // step % 2 == 0]
        top = 2**bits - 1 if rule == "round" else 2**bits
        sliced = np.asarray(nest.slice_codes(of_kind(CODES, kind), bits, rule=rule))
        assert sliced[halves].tolist() == [min(code // step + 1, top) for code in halves]
        half_even = np.round(CODES / step).clip(0, top).tolist()
        with pytest.raises(AssertionError, match="codes differ"):
            assert_equals_oracle(sliced, half_even)
    assert nest.slice_codes(of_kind(CODES, kind), 2, rule=rule)[32] == 1
    assert np.round(32 / 64) == 0


@each_kind
@each("rule", ["round", "extra"])
def test_the_top_codes_do_not_wrap_around_in_uint8(rule: str, kind: str) -> None:
    for bits in range(1, 8):
        tops = of_kind(CODES[-(2 ** (7 - bits)) :], kind)  # adding half a step to any of these passes 255
        sliced = np.asarray(nest.slice_codes(tops, bits, rule=rule))
        assert set(sliced.tolist()) == {2**bits - 1 if rule == "round" else 2**bits}
        values = np.asarray(nest.slice_values(tops, bits, rule=rule))
        assert set(values.tolist()) == {256 - 2 ** (8 - bits) if rule == "round" else 256}


@each_width
def test_prefix_error_is_centred_and_at_most_half_a_bin(bits: int) -> None:
    error = nest.slice_values(CODES, bits, rule="prefix") - CODES
    assert error.sum() == 0
    assert np.abs(error).max() == (2 ** (8 - bits) - 1) / 2


# The affine of a slice ------------------------------------------------------------------------------------------------


@each_kind
@each_rule
@each_width
def test_slice_affine_equals_the_oracle_and_reads_slices_as_the_grid_reads_values(
    bits: int, rule: str, kind: str
) -> None:
    scale_NG = np.array([[1.0, 3 * 2**-9], [255 * 2**-15, 2**-14]], dtype=np.float32)
    zero_NG = np.array([[128.0, 0.0], [255.0, 77.0]], dtype=np.float32)
    given = of_kind(scale_NG, kind), of_kind(zero_NG, kind)
    scale_r, zero_r = nest.slice_affine(*given, bits, rule=rule)
    assert_same_kind(scale_r, given[0], "float32")
    assert_same_kind(zero_r, given[1], "float32")
    grids = [(Fraction(float(s)), Fraction(float(z))) for s, z in zip(scale_NG.flat, zero_NG.flat, strict=True)]

    def expected(width: int) -> list[list[float]]:
        return [[float(part) for part in oracle.slice_affine(scale, zero, width, rule)] for scale, zero in grids]

    got = np.stack([np.asarray(scale_r).ravel(), np.asarray(zero_r).ravel()], axis=1).tolist()
    assert got == expected(bits)
    for neighbour in neighbours(bits):
        assert got != expected(neighbour)
    # d is a power of two and both differences are exact, so the two readings are equal bit for bit, in float32.
    slices = nest.slice_codes(of_kind(CODES, kind), bits, rule=rule)
    values = nest.slice_values(of_kind(CODES, kind), bits, rule=rule)
    for row, group in np.ndindex(2, 2):
        by_slice = scale_r[row, group] * (slices - zero_r[row, group])
        by_value = given[0][row, group] * (values - given[1][row, group])
        np.testing.assert_array_equal(np.asarray(by_slice), np.asarray(by_value))


# Errors ---------------------------------------------------------------------------------------------------------------


def wrong_width(bits: object) -> str:
    return f"bits={bits!r} is not a width; use one of 1 to 8"


def wrong_rule(rule: object) -> str:
    return f"rule={rule!r} is not a slicing rule; use one of prefix, round, extra"


@each_kind
@each("bits", NOT_WIDTHS)
def test_a_width_that_is_not_an_int_from_1_to_8_is_rejected(bits: object, kind: str) -> None:
    codes, scale = of_kind(CODES, kind), of_kind(np.ones((1, 1), dtype=np.float32), kind)
    for rule in oracle.RULES:
        assert_rejected(ValueError, wrong_width(bits), nest.slice_codes, codes, bits, rule=rule)
        assert_rejected(ValueError, wrong_width(bits), nest.slice_values, codes, bits, rule=rule)
        assert_rejected(ValueError, wrong_width(bits), nest.slice_affine, scale, scale, bits, rule=rule)


@each_kind
@each("rule", NOT_RULES)
def test_a_rule_outside_the_table_is_rejected_at_every_width(rule: object, kind: str) -> None:
    codes, scale = of_kind(CODES, kind), of_kind(np.ones((1, 1), dtype=np.float32), kind)
    for bits in WIDTHS:
        assert_rejected(ValueError, wrong_rule(rule), nest.slice_codes, codes, bits, rule=rule)
        assert_rejected(ValueError, wrong_rule(rule), nest.slice_values, codes, bits, rule=rule)
        assert_rejected(ValueError, wrong_rule(rule), nest.slice_affine, scale, scale, bits, rule=rule)


@each_kind
@each_rule
@each_width
def test_codes_that_are_not_integers_are_rejected_at_every_width(bits: int, rule: str, kind: str) -> None:
    arrays = [of_kind(CODES.astype(name), kind) for name in NOT_INTEGER]
    if kind == "torch":
        arrays.append(of_kind(CODES, kind).to(torch.bfloat16))
    for codes in arrays:
        text = f"codes of dtype {codes.dtype} cannot be sliced; use uint8 codes 0..255"
        assert_rejected(TypeError, text, nest.slice_codes, codes, bits, rule=rule)
        assert_rejected(TypeError, text, nest.slice_values, codes, bits, rule=rule)


# The package ----------------------------------------------------------------------------------------------------------


def test_the_package_exports_the_definition_itself() -> None:
    assert nest.RULES == oracle.RULES
    assert matquant.slice_codes is nest.slice_codes
    assert matquant.slice_values is nest.slice_values


def test_importing_and_slicing_numpy_codes_never_imports_torch() -> None:
    program = (
        "import sys, numpy, matquant\n"
        "codes = numpy.arange(256, dtype=numpy.uint8)\n"
        "for rule in ('prefix', 'round', 'extra'):\n"
        "    matquant.slice_codes(codes, 4, rule=rule), matquant.slice_values(codes, 4, rule=rule)\n"
        "print('torch' in sys.modules)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr
