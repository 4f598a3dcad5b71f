"""Planes: the exact inverse of packing at every shape, the bytes of docs/kernels.md, and no byte read outside.

N out features, K in features.
"""

import ctypes
import mmap
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cases import each
from matquant.core.nest import COMPANDED, RESIDENT_BITS, bits_read, labels_of, slice_codes, stored_codes
from matquant.core.planes import load_weight, matmul, pack, unpack
from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.format.read import open_checkpoint
from matquant.format.write import write_checkpoint
from matquant.system.errors import InputError

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
SHAPES = [(1, 1), (1, 32), (16, 1), (16, 32), (15, 31), (17, 33), (16, 128), (3, 127), (40, 129), (5, 1000), (100, 7)]
WIDTHS = range(1, 9)

Codes = NDArray[np.uint8]


def random_codes(shape: tuple[int, int], *, seed: int = 0) -> Codes:
    return np.random.default_rng([seed, *shape]).integers(0, 256, shape, dtype=np.uint8)


def plane_oracle(codes_NK: Codes) -> list[bytes]:
    """The bytes of the five planes, written one field at a time from the tables of docs/kernels.md."""
    rows, columns = codes_NK.shape
    blocks, tiles = -(-rows // 16), -(-columns // 32)
    two_bit = {0: 6, 1: 2, 2: 4, 3: 0}  # quad % 4 -> lowest bit of its field
    third = {0: 5, 1: 1, 2: 4, 3: 0, 4: 6, 5: 2, 6: 7, 7: 3}  # quad -> bit
    fourth = {0: 4, 1: 0, 2: 5, 3: 1, 4: 6, 5: 2, 6: 7, 7: 3}
    planes = [bytearray(blocks * tiles * 64 * bits) for bits in (2, 1, 1, 2, 2)]
    for (row, column), code in np.ndenumerate(codes_NK):
        tile = row // 16 * tiles + column // 32
        quad, byte = column % 32 // 4, row % 16 * 4 + column % 4
        for plane, low in ((0, 6), (3, 2), (4, 0)):
            planes[plane][tile * 128 + quad // 4 * 64 + byte] |= (int(code) >> low & 3) << two_bit[quad % 4]
        planes[1][tile * 64 + byte] |= (int(code) >> 5 & 1) << third[quad]
        planes[2][tile * 64 + byte] |= (int(code) >> 4 & 1) << fourth[quad]
    return [bytes(plane) for plane in planes]


@each("shape", SHAPES)
def test_planes_are_the_bytes_of_the_document(shape: tuple[int, int]) -> None:
    codes = random_codes(shape)
    planes = pack(codes)
    found = [planes.native.plane(plane).tobytes() for plane in range(5)]
    assert found == plane_oracle(codes)
    assert found != plane_oracle(codes ^ np.uint8(1))


@each("max_bits", WIDTHS)
@each("shape", SHAPES)
def test_unpacked_codes_are_the_prefix_of_every_resident_width(shape: tuple[int, int], max_bits: int) -> None:
    codes = random_codes(shape)
    planes = pack(codes, max_bits=max_bits)
    for bits in range(1, planes.resident_bits + 1):
        np.testing.assert_array_equal(unpack(planes, bits=bits), slice_codes(codes, bits))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 300), seed=st.integers(0, 1000), stride=st.integers(0, 9))
def test_codes_come_back_whatever_the_shape_and_the_stride(rows: int, columns: int, seed: int, stride: int) -> None:
    wide = random_codes((rows, columns + stride), seed=seed)
    codes = wide[:, :columns]
    np.testing.assert_array_equal(unpack(pack(codes)), codes)


def test_all_codes_in_every_place_of_a_tile() -> None:
    rows, columns = np.indices((16, 32))
    for start in range(0, 256, 8):
        codes = ((start + 37 * rows + 11 * columns) % 256).astype(np.uint8)
        np.testing.assert_array_equal(unpack(pack(codes)), codes)


@each("shape", [(1, 1), (3, 5), (17, 33), (16, 32), (15, 100)])
@each("at_end", [True, False])
def test_packing_reads_nothing_outside_the_codes(shape: tuple[int, int], at_end: bool) -> None:
    """The codes touch a page that nobody may read."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    whole = np.frombuffer(memory, np.uint8)
    size = shape[0] * shape[1]
    codes = whole[2 * page - size : 2 * page] if at_end else whole[page : page + size]
    codes[:] = random_codes(shape).reshape(-1)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    start = whole.ctypes.data
    for first in (start, start + 2 * page):
        assert protect(ctypes.c_void_p(first), ctypes.c_size_t(page), 0) == 0
    try:
        np.testing.assert_array_equal(unpack(pack(codes.reshape(shape))), random_codes(shape))
    finally:
        for first in (start, start + 2 * page):
            protect(ctypes.c_void_p(first), ctypes.c_size_t(page), 3)


@each("rule", ["prefix", "round", "extra"])
@each("bits", WIDTHS)
def test_a_width_reads_the_fewest_planes_that_hold_it(bits: int, rule: str) -> None:
    needed = bits if rule == "prefix" else min(bits + 1, 8)
    assert bits_read(bits, rule=rule) == min(resident for resident in RESIDENT_BITS if resident >= needed)


@each("max_bits", WIDTHS)
def test_only_the_planes_that_are_needed_stay(max_bits: int) -> None:
    codes = random_codes((256, 1024))
    planes = pack(codes, max_bits=max_bits)
    assert planes.bytes == codes.size * planes.resident_bits // 8
    for plane, first in enumerate((0, 2, 3, 4, 6)):
        if first < planes.resident_bits:
            planes.native.plane(plane)
        else:
            with pytest.raises(ValueError, match="not resident"):
                planes.native.plane(plane)


def test_weights_that_share_pages_outlive_each_other() -> None:
    """Small weights lie in the same huge pages, large ones begin in them: a release changes only what is released."""
    shapes = [(16, 32), (576, 576), (2048, 1200), (192, 576), (1536, 576), (4096, 1024)]
    codes = [random_codes(shape) for shape in shapes]
    kept = [pack(one) for one in codes]
    for first in (0, 1):
        for place in range(first, len(shapes), 2):
            kept[place] = pack(codes[place])  # the one before is released
        for one, planes in zip(codes, kept, strict=True):
            np.testing.assert_array_equal(unpack(planes), one)


def test_affines_that_fit_take_four_bytes_per_group_and_are_shared() -> None:
    codes = random_codes((256, 1024))
    scale = np.full((256, 8), 0.5, np.float32)
    same = np.full((256, 8), 128.0, np.float32)
    zero = same + np.arange(8, dtype=np.float32)
    weight = load_weight(NestedTensor(codes=codes, scale=scale, zero=same, rule="prefix"))
    assert weight.planes.bytes == codes.size + 2 * scale.size
    weight = load_weight(NestedTensor(codes=codes, scale=scale + 2**-20, zero=same, rule="prefix"))
    assert weight.planes.bytes == codes.size + 4 * scale.size
    weight = load_weight(NestedTensor(codes=codes, scale=scale, zero=zero, rule="prefix"))
    assert weight.planes.bytes == codes.size + 4 * scale.size
    own = {2: (scale, zero)}
    weight = load_weight(NestedTensor(codes=codes, scale=scale, zero=zero, rule="prefix", slices=own))
    assert weight.planes.bytes == codes.size + 8 * scale.size
    weight = load_weight(NestedTensor(codes=codes, scale=scale + 2**-20, zero=zero, rule="prefix"))
    assert weight.planes.bytes == codes.size + 8 * scale.size


def write_one(directory: Path, codes: Codes, *, grid: str = "uniform") -> None:
    rows = codes.shape[0]
    tensor = NestedTensor(
        codes=codes,
        scale=np.full((rows, 1), 0.5, np.float32),
        zero=np.full((rows, 1), 128.0, np.float32),
        rule="prefix",
        grid=grid,
    )
    spec = Spec(rule="prefix", widths=(8,), grid=grid)
    write_checkpoint(directory, [("linear", tensor)], spec=spec, config={"model_type": "llama"}, ignore=[], files={})


@pytest.mark.parametrize("shape", [(5, 7), (64, 96)])
def test_a_view_of_the_file_packs_like_its_copy(shape: tuple[int, int], tmp_path: Path) -> None:
    codes = random_codes(shape)
    write_one(tmp_path / "checkpoint", codes)
    tensor = open_checkpoint(tmp_path / "checkpoint").nested("linear", mapped=True)
    assert not tensor.codes.flags.writeable
    np.testing.assert_array_equal(tensor.codes, codes)
    np.testing.assert_array_equal(unpack(load_weight(tensor).planes), codes)


def test_planes_of_a_companded_file_hold_labels_and_multiply_by_its_positions(tmp_path: Path) -> None:
    codes = labels_of(stored_codes(random_codes((20, 96)), grid=COMPANDED), grid=COMPANDED)
    write_one(tmp_path / "checkpoint", codes, grid=COMPANDED)
    tensor = open_checkpoint(tmp_path / "checkpoint").nested("linear", mapped=True)
    weight = load_weight(tensor)
    np.testing.assert_array_equal(unpack(weight.planes), codes)
    x = np.eye(96, dtype=np.float32)[:7] * 127  # a scale of 1
    for bits in WIDTHS:
        np.testing.assert_array_equal(matmul(weight, x, bits=bits, threads=1), 127 * tensor.read(bits)[:, :7].T)


def test_loading_keeps_no_second_copy(tmp_path: Path) -> None:
    """Resident memory grows by the planes and at most a tenth more, in a fresh process."""
    codes = random_codes((4096, 8192))
    write_one(tmp_path / "checkpoint", codes)
    script = f"""
import numpy, pathlib
from matquant.format.read import open_checkpoint
from matquant.core.planes import load_weight, pack
def resident():
    fields = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024
checkpoint = open_checkpoint({str(tmp_path / "checkpoint")!r}, check_hashes=False)
load_weight(checkpoint.nested("linear", mapped=True), max_bits=2)
for max_bits in (8, 4):
    before = resident()
    weight = load_weight(checkpoint.nested("linear", mapped=True), max_bits=max_bits)
    assert resident() - before <= 1.1 * {codes.size} * max_bits / 8, (resident() - before) / {codes.size}
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


@each(("codes", "said"), [
    (np.zeros((2, 3), np.int8), "planes need uint8 codes [N, K], found int8 [2, 3]"),
    (np.zeros(3, np.uint8), "planes need uint8 codes [N, K], found uint8 [3]"),
    (np.zeros((0, 3), np.uint8), "planes need uint8 codes [N, K], found uint8 [0, 3]"),
])  # fmt: skip
def test_what_is_not_codes_is_refused(codes: Codes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        pack(codes)
    assert str(caught.value) == said


def test_a_width_that_is_not_resident_is_refused() -> None:
    planes = pack(random_codes((3, 5)), max_bits=4)
    with pytest.raises(InputError) as caught:
        unpack(planes, bits=5)
    assert str(caught.value) == "bits=5 exceeds the 4 bits of these planes; pack with a larger max_bits"
    ones = np.ones((3, 1), np.float32)
    weight = load_weight(NestedTensor(codes=random_codes((3, 5)), scale=ones, zero=ones, rule="round"), max_bits=4)
    assert weight.planes.resident_bits == 6
    with pytest.raises(InputError) as caught:
        matmul(weight, np.ones((1, 5), np.float32), bits=5)
    assert str(caught.value) == "bits=5 exceeds max_bits=4 of this weight; load it with a larger max_bits"
    with pytest.raises(InputError) as caught:
        matmul(weight, np.ones((1, 4), np.float32), bits=4)
    assert str(caught.value) == "x_TK must be float32 [T, 5], found float32 [1, 4]"
    with pytest.raises(InputError) as caught:
        matmul(weight, np.ones((1, 5), np.float32), bits=4, activations="int4")
    assert str(caught.value) == "activations='int4' is not known; use one of int8, float"


def test_the_worked_example_of_the_document_holds() -> None:
    """Row 0 of docs/kernels.md: the codes of inputs 0, 4, 8, ..., 28, and the first byte of every vector."""
    text = DOCUMENT.read_text()
    codes = [int(code) for code in re.search(r"codes `([0-9 ]+)`", text)[1].split()]  # type: ignore[index]
    tile = np.zeros((16, 32), np.uint8)
    tile[0, ::4] = codes
    planes = pack(tile).native
    found = [planes.plane(plane).tobytes()[::64].hex(" ") for plane in range(5)]
    assert found == re.findall(r"^\| [0-9:]+ \| `([0-9a-f ]+)` \|", text, flags=re.MULTILINE)
