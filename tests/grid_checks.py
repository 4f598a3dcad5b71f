"""Checks that hold for every bent grid, on the labels and on the worked examples of docs/format.md."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from matquant.core.nest import labels_of, slice_codes, stored_codes
from matquant.core.spec import Spec
from matquant.core.tensor import NestedTensor
from matquant.format.read import open_checkpoint
from matquant.format.write import write_checkpoint

LABELS = np.arange(256, dtype=np.uint8)
WIDTHS = range(1, 9)


def assert_every_slice_comes_back(grid: str, *, expected: Sequence[int], distinct: int) -> np.ndarray:
    """The stored codes of all labels are ``expected``, ``distinct`` of them, and keep the top six bits of a label.
    Returns them."""
    stored = stored_codes(LABELS, grid=grid)
    assert stored.tolist() == expected
    labels = labels_of(stored, grid=grid)
    for bits in range(1, 7):  # labels that share a position share these bits
        assert np.array_equal(slice_codes(labels, bits), slice_codes(LABELS, bits))
    assert np.array_equal(stored_codes(labels, grid=grid), stored)
    assert len(np.unique(stored)) == distinct
    return np.asarray(stored)


def assert_example_is_written_and_read(
    example: Sequence[Mapping[str, str]], grid: str, out: Path, *, widths: Sequence[int]
) -> None:
    """A table of docs/format.md is what is written and read; widths: those that it reads, besides int2's own scale."""
    rows = {row[""]: [row["row 0"], row["row 1"]] for row in example}
    labels = np.array([[int(label) for label in row.split()] for row in rows["labels"]], dtype=np.uint8)
    wanted = [[int(code) for code in row.split()] for row in rows["stored codes"]]
    assert stored_codes(labels, grid=grid).tolist() == wanted
    scale, zero = np.array([[0.5], [0.75]], dtype=np.float32), np.full((2, 1), 128.0, dtype=np.float32)
    own = np.array([[30.0], [46.0]], dtype=np.float32), np.array([[1.75], [1.875]], dtype=np.float32)
    tensor = NestedTensor(codes=labels, scale=scale, zero=zero, rule="prefix", slices={2: own}, grid=grid)
    spec = Spec(rule="prefix", widths=(8, 4, 2), slices=(2,), grid=grid)
    write_checkpoint(out, [("linear", tensor)], spec=spec, config={}, ignore=[], files={})
    checkpoint = open_checkpoint(out)
    packed = checkpoint.array("linear.weight_packed").view(np.uint8)
    assert [bytes(row) for row in packed] == [bytes.fromhex(row) for row in rows["linear.weight_packed"]]
    read = checkpoint.nested("linear")
    without = dataclasses.replace(read, slices={})
    found = [(f"{bits} bits", without.read(bits)) for bits in widths]
    found += [(f"{bits} bits", read.read(bits)) for bits in widths if bits != 2]
    for name, weight in [*found, ("2 bits, own scale and zero", read.read(2))]:
        assert weight.tolist() == [[float(value) for value in row.split()] for row in rows[name]], name
