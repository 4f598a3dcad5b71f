"""The packed codes of extra precision: held to an oracle written from docs/format.md, to the entropy, and to attacks.

N out features, K in features.
"""

import itertools
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import oracle_overflow
from cases import each
from matquant.core import overflow
from matquant.core.nest import slice_codes
from matquant.core.overflow import packed_bytes
from matquant.system.errors import InputError
from packing_extra import pack_extra, unpack_extra

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "format.md"
HEADING = "The packed codes of extra precision"
WIDTHS = range(1, 8)
SHAPES = [(1, 1), (1, 7), (3, 5), (2, 40), (63, 3), (64, 3), (65, 3), (129, 2), (200, 1), (1, 1000), (5, 0), (0, 5)]
DAMAGED = "the bytes are damaged: pack the codes again"

Codes = NDArray[np.uint8]

each_width = each("bits", WIDTHS)


def random_codes(shape: tuple[int, int], bits: int, *, share: float, seed: int = 0) -> Codes:
    """Codes of which about ``share`` overflow, the others any of 0..2^r - 1."""
    generator = np.random.default_rng([seed, *shape, bits])
    codes = generator.integers(0, 2**bits, shape, dtype=np.uint8)
    return np.where(generator.random(shape) < share, np.uint8(2**bits), codes)


def exact_share(shape: tuple[int, int], bits: int, *, share: float) -> Codes:
    """Codes of which exactly round(share N K) overflow, at random places."""
    codes = np.zeros(math.prod(shape), np.uint8)
    codes[: round(share * codes.size)] = 2**bits
    return np.random.default_rng(0).permutation(codes).reshape(shape)


def dense_bytes(shape: tuple[int, int], bits: int) -> int:
    return shape[0] * math.ceil(shape[1] * bits / 8)


def entropy(share: float) -> float:
    """Bits of one independent draw."""
    return sum(-p * math.log2(p) for p in (share, 1 - share) if p)


def assert_packs(codes: Codes, bits: int) -> bytes:
    """The codes come back from their bytes, and the bytes are as many as counted; returns them."""
    packed = pack_extra(codes, bits)
    assert packed_bytes(codes, bits) == len(packed)
    back = unpack_extra(packed, bits, shape=codes.shape)
    assert (back.dtype, back.shape) == (np.uint8, codes.shape)
    np.testing.assert_array_equal(back, codes)
    return packed


@pytest.mark.parametrize(("name", "wrong"), [
    ("packed_bytes", lambda codes, bits: len(pack_extra(codes, bits)) + 1),
    ("unpack_extra", lambda packed, bits, *, shape: np.full(shape, 3, np.uint8)),
    ("unpack_extra", lambda packed, bits, *, shape: np.full(shape, 4, np.int64)),
])  # fmt: skip
def test_the_comparison_itself_can_fail(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises(AssertionError):
        assert_packs(np.full((2, 3), 4, np.uint8), 2)


# The exact inverse ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_matrix_of_up_to_four_one_bit_codes_comes_back_as_the_oracle_packs_it() -> None:
    for rows, columns in [(1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (4, 1)]:
        for values in itertools.product(range(3), repeat=rows * columns):
            codes = np.array(values, np.uint8).reshape(rows, columns)
            assert assert_packs(codes, 1) == oracle_overflow.pack(codes.tolist(), 1)


@pytest.mark.slow
def test_every_set_of_overflowing_weights_of_two_rows_comes_back_as_the_oracle_packs_it() -> None:
    for values in itertools.product((1, 4), repeat=10):
        codes = np.array(values, np.uint8).reshape(2, 5)
        assert assert_packs(codes, 2) == oracle_overflow.pack(codes.tolist(), 2)


@pytest.mark.slow
@each_width
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 1.0])
def test_any_shape_width_and_density_is_packed_as_the_oracle_packs_it(
    shape: tuple[int, int], bits: int, share: float
) -> None:
    codes = random_codes(shape, bits, share=share)
    assert assert_packs(codes, bits) == oracle_overflow.pack(codes.tolist(), bits)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_codes_come_back(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(WIDTHS))
    shape = data.draw(st.tuples(st.integers(0, 140), st.integers(0, 90)))
    share = data.draw(st.floats(0, 1) | st.sampled_from([0.001, 0.01]))
    assert_packs(random_codes(shape, bits, share=share, seed=data.draw(st.integers(0, 99))), bits)


@each_width
def test_slices_of_all_codes_come_back_and_no_neighbouring_width_reads_them(bits: int) -> None:
    codes = slice_codes(np.arange(256, dtype=np.uint8).reshape(4, 64), bits, rule="extra")
    packed = assert_packs(codes, bits)
    for other in {bits - 1, bits + 1} & set(WIDTHS):
        with pytest.raises(InputError):
            unpack_extra(packed, other, shape=(4, 64))


@each_width
def test_views_that_are_not_contiguous_pack_like_copies(bits: int) -> None:
    codes = random_codes((70, 40), bits, share=0.1)
    for view in (codes[:, :37], codes[::2], codes.T, codes[::-1, ::-3]):
        assert assert_packs(view, bits) == pack_extra(view.copy(), bits)


@each_width
def test_the_dense_part_is_the_clamped_model_of_rule_round(bits: int) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    over, clamped = (slice_codes(codes, bits, rule=rule) for rule in ("extra", "round"))
    dense = dense_bytes((1, 256), bits)
    assert pack_extra(over, bits)[:dense] == pack_extra(clamped, bits)[:dense]


@each_width
def test_a_block_of_64_rows_needs_no_other(bits: int) -> None:
    codes = random_codes((64 * 3 + 5, 30), bits, share=0.05)
    packed, dense = pack_extra(codes, bits), dense_bytes(codes.shape, bits)
    table = np.frombuffer(packed, "<u4", 8, offset=dense + 1).reshape(4, 2)
    parameter = packed[dense]
    lengths = [int(unary) + math.ceil(int(count) * parameter / 8) for count, unary in table]
    start = dense + 1 + 32 + lengths[0] + lengths[1]
    third = np.frombuffer(packed, np.uint8)[:dense].reshape(len(codes), -1)[128:192].tobytes()
    third += packed[dense : dense + 1] + table[2].tobytes() + packed[start : start + lengths[2]]
    np.testing.assert_array_equal(unpack_extra(third, bits, shape=(64, 30)), codes[128:192])


# The document ---------------------------------------------------------------------------------------------------------


def section() -> str:
    return DOCUMENT.read_text().split(f"\n## {HEADING}\n")[1].split("\n## ")[0]


def hexadecimal(pattern: str) -> bytes:
    found = re.search(pattern, section())
    assert found is not None, pattern
    return bytes.fromhex(found[1])


def shown_parts() -> list[bytes]:
    """The bytes of the second example, part by part."""
    return [bytes.fromhex(row) for row in re.findall(r"^\| .* \| `([0-9a-f ]+)` \|$", section(), flags=re.MULTILINE)]


def test_the_first_example_of_the_document_is_what_the_code_writes() -> None:
    codes = np.array([[0, 2, 2, 2, 4], [0, 1, 2, 3, 4]], np.uint8)
    eight = np.array([[0, 127, 128, 136, 255], [8, 37, 120, 200, 247]], np.uint8)
    np.testing.assert_array_equal(slice_codes(eight, 2, rule="extra"), codes)
    packed = hexadecimal(r"are the \d+ bytes\s+`([0-9a-f ]+)`")
    assert len(packed) == int(re.search(r"are the (\d+) bytes", section())[1])  # type: ignore[index]
    assert assert_packs(codes, 2) == packed == oracle_overflow.pack(codes.tolist(), 2)


def test_the_second_example_of_the_document_is_what_the_code_writes() -> None:
    codes = np.ones((1, 40), np.uint8)
    codes[0, [12, 17, 39]] = 4
    parts = shown_parts()
    assert [len(part) for part in parts] == [10, 1, 8, 2, 1]
    assert assert_packs(codes, 2) == b"".join(parts) == oracle_overflow.pack(codes.tolist(), 2)


def test_golden_bytes() -> None:
    """Written down once, by the oracle: they may never change."""
    codes = np.tile(np.array([[0, 8, 3, 7, 5], [8, 8, 1, 0, 2]], np.uint8), (33, 1))
    packed = assert_packs(codes, 3)
    assert packed[:4].hex() == "f85e7f20"
    assert packed[66 * 2 :].hex() == (
        "01600000001800000003000000010000004dd3344dd3344dd3344dd3344dd3344dd3344dd3344dd3349324499224499224499224490d03"
    )


# Size -----------------------------------------------------------------------------------------------------------------

SHARES = (0.001, 0.01, 0.017, 0.022, 0.029, 0.05, 0.1, 0.2, 0.25, 0.3, 0.38, 0.45, 0.5)


@each("share", SHARES)
@each("bits", [1, 2, 7])
def test_the_overflow_set_is_near_its_entropy(bits: int, share: float) -> None:
    shape = (1024, 1024)
    found = 8 * (packed_bytes(exact_share(shape, bits, share=share), bits) - dense_bytes(shape, bits)) / 2**20
    table = 8 * (1 + 8 * 16) / 2**20
    assert entropy(share) - 0.001 < found < 1.045 * entropy(share) + table


def test_above_half_the_overflow_set_is_a_bitmap() -> None:
    for share in (0.6, 0.9, 1.0):
        packed = packed_bytes(exact_share((64, 1024), 2, share=share), 2)
        assert packed - dense_bytes((64, 1024), 2) <= 1 + 8 + 64 * 1024 / 8


@each("rows", [64, 65, 1000])
def test_no_overflow_costs_a_byte_and_eight_per_block(rows: int) -> None:
    codes = np.zeros((rows, 16), np.uint8)
    assert packed_bytes(codes, 2) == rows * 4 + 1 + 8 * math.ceil(rows / 64)


def test_the_bits_of_the_module_docstring_are_measured() -> None:
    def row(name: str) -> list[float]:
        found = re.search(rf"{name} +(\d.*)", overflow.__doc__ or "")
        assert found is not None, name
        return [float(value) for value in found[1].replace("%", "").split()]

    shares = row("paper's count")
    assert row("overflow") == pytest.approx([100 * share for share in shares])
    assert row(r"entropy H\(p\)") == [round(entropy(share), 4) for share in shares]
    for size in (2048, 256):
        shape = (size, size)
        measured = [packed_bytes(exact_share(shape, 2, share=share), 2) - dense_bytes(shape, 2) for share in shares]
        assert row(f"{size} x {size}") == pytest.approx([8 * value / size**2 for value in measured], rel=0.005)


def test_counting_is_fast() -> None:
    """10^7 weights at one width; 0.03 s where this was written, with room for slow machines."""
    codes = random_codes((2500, 4000), 2, share=0.05)
    start = time.perf_counter()
    packed_bytes(codes, 2)
    assert time.perf_counter() - start < 2


# Attacks --------------------------------------------------------------------------------------------------------------

SAMPLE = exact_share((70, 20), 2, share=0.05)
PACKED = pack_extra(SAMPLE, 2)
DENSE = dense_bytes(SAMPLE.shape, 2)


def refusal(packed: bytes, bits: int = 2, shape: Any = SAMPLE.shape) -> str:
    with pytest.raises(InputError) as error:
        unpack_extra(packed, bits, shape=shape)
    return str(error.value)


def test_bytes_of_any_other_length_are_refused() -> None:
    for length in range(len(PACKED)):
        assert refusal(PACKED[:length]).endswith(DAMAGED)
    assert refusal(PACKED[: DENSE + 16]) == (
        f"codes 70 x 20 of 2 bits asked of {DENSE + 16} bytes, they take at least {DENSE + 17}; {DAMAGED}"
    )
    assert refusal(b"").endswith(DAMAGED)
    assert refusal(PACKED + b"\0") == (
        f"codes 70 x 20 of 2 bits asked of {len(PACKED) + 1} bytes, their table says {len(PACKED)}; {DAMAGED}"
    )


def test_every_changed_bit_is_refused_or_gives_other_codes() -> None:
    """Nothing is left that two readers could take differently: no byte is free."""
    for place in range(8 * len(PACKED)):
        changed = bytearray(PACKED)
        changed[place // 8] ^= 1 << place % 8
        try:
            codes = unpack_extra(bytes(changed), 2, shape=SAMPLE.shape)
        except InputError:
            continue
        assert codes.max() <= 4
        assert (codes != SAMPLE).any()


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(tail=st.binary(max_size=60), bits=st.sampled_from(WIDTHS), rows=st.integers(0, 3), columns=st.integers(0, 9))
def test_any_bytes_give_codes_or_an_input_error(tail: bytes, bits: int, rows: int, columns: int) -> None:
    try:
        codes = unpack_extra(tail, bits, shape=(rows, columns))
    except InputError:
        return
    assert codes.shape == (rows, columns)
    assert codes.max(initial=0) <= 2**bits


def forge(*, parameter: int, count: int, unary: bytes, remainders: bytes, dense: bytes = b"\xff") -> str:
    """What is said of a 1 x 4 matrix of 2 bits with this overflow set."""
    table = count.to_bytes(4, "little") + len(unary).to_bytes(4, "little")
    return refusal(dense + bytes([parameter]) + table + unary + remainders, shape=(1, 4))


def test_forged_overflow_sets_are_refused_and_said() -> None:
    asked = "codes 1 x 4 of 2 bits asked"
    assert forge(parameter=32, count=0, unary=b"", remainders=b"") == (
        f"{asked}, found the parameter 32, above 31; {DAMAGED}"
    )
    for unary, count in ((b"\x03", 1), (b"\x01\0", 1), (b"\0", 0), (b"\x1f", 5)):
        ones = unary[0].bit_count()
        assert forge(parameter=0, count=count, unary=unary, remainders=b"") == (
            f"{asked}, found {ones} overflowing weights where {count} are announced; {DAMAGED}"
        )
    beyond = f"{asked}, found an overflowing weight beyond its block of 4; {DAMAGED}"
    assert forge(parameter=0, count=1, unary=b"\x20", remainders=b"") == beyond
    assert forge(parameter=31, count=1, unary=b"\x80", remainders=bytes(4)) == beyond
    assert forge(parameter=31, count=1, unary=b"\0" * 99 + b"\x80", remainders=bytes(4)) == beyond
    not_three = f"{asked}, found a weight that overflows and is not 3; {DAMAGED}"
    assert forge(parameter=0, count=1, unary=b"\x01", remainders=b"", dense=b"\xfe") == not_three
    assert forge(parameter=3, count=1, unary=b"\x01", remainders=b"\x04") == not_three  # weight 4 of 0..3
    padding = f"{asked}, found padding that is not 0; {DAMAGED}"
    assert forge(parameter=2, count=1, unary=b"\x01", remainders=b"\x04") == padding
    assert refusal(b"\x40\0" + bytes(8), shape=(1, 3)) == padding.replace("x 4", "x 3")


def test_huge_numbers_are_refused_before_anything_is_allocated() -> None:
    table = b"\xff" * 8
    assert refusal(b"\0\0" + table, shape=(1, 4)).endswith(f"their table says {10 + 2**32 - 1}; {DAMAGED}")
    assert refusal(b"\0\x1f" + table, shape=(1, 4)).endswith(DAMAGED)
    assert refusal(b"", shape=(2**60, 0)).endswith(DAMAGED)
    assert refusal(b"", shape=(2**60, 2**24)).endswith(DAMAGED)


@each("bits", [0, 8, -1, 2.0, True, "2", None])
def test_other_widths_are_refused(bits: Any) -> None:
    message = f"bits={bits!r} is not a width of extra precision; use one of 1 to 7"
    for call in (
        lambda: pack_extra(SAMPLE, bits),
        lambda: packed_bytes(SAMPLE, bits),
        lambda: unpack_extra(PACKED, bits, shape=(70, 20)),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            call()


@each("shape", [(3,), (2, 2, 2), (), (1, 2**25)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...]) -> None:
    message = f"extra precision needs codes [N, K] with K up to 33554431, found shape {shape}"
    codes = np.broadcast_to(np.uint8(0), shape)
    with pytest.raises(InputError, match=re.escape(message)):
        pack_extra(codes, 2)
    assert refusal(b"", shape=shape) == message
    assert (
        refusal(b"", shape=(-1, 3)) == "extra precision needs codes [N, K] with K up to 33554431, found shape (-1, 3)"
    )


def test_codes_that_are_not_of_the_width_are_refused() -> None:
    for call in (pack_extra, packed_bytes):
        with pytest.raises(InputError) as error:
            call(np.array([[0, 5]], np.uint8), 2)
        assert str(error.value) == (
            'extra precision at 2 bits needs codes 0..4, found 5; use slice_codes(codes, 2, rule="extra")'
        )
        with pytest.raises(InputError) as error:
            call(np.array([[0, 1]], np.int64), 2)  # type: ignore[arg-type]
        assert str(error.value) == "extra precision needs uint8 codes, found int64"
