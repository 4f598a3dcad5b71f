"""Tensor parallelism over planes: what the ranks compute together is the product with the whole layer's slice."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cases import each
from matquant.backends.gpu_layout import padded
from matquant.core.nest import COMPANDED, UNIFORM
from matquant.core.tensor import NestedTensor
from matquant.integrations.ranks import affines, make_planes, own_widths, product, select, why_dense

COLUMNS = 320  # half of it is no multiple of 256, so a row-parallel rank is padded
SIZES = (256, 128, 128)  # as of q, k and v
RANKS = 2


def weight(rows: int, *, group: int | None, grid: str = UNIFORM, seed: int = 0) -> NestedTensor:
    """Every code, with separate scales and zero-points at int2 and int4."""
    draw = np.random.default_rng(seed)
    shape = (rows, COLUMNS // (group or COLUMNS))

    def scale() -> np.ndarray:
        return (2.0 ** draw.integers(-6, -3, shape)).astype(np.float32)

    zero = np.full(shape, 128 if grid == COMPANDED else 120, np.float32)
    slices = {bits: (scale(), np.full(shape, (2**bits - 1) / 2, np.float32)) for bits in (4, 2)}
    codes = draw.permutation(np.resize(np.arange(256, dtype=np.uint8), rows * COLUMNS)).reshape(rows, COLUMNS)
    return NestedTensor(codes=codes, scale=scale(), zero=zero, rule="prefix", slices=slices, grid=grid)


def planes_of(stacked: Sequence[NestedTensor], rows: Any, columns: Any, *, max_bits: int = 8) -> torch.nn.ModuleList:
    """A rank's part: these rows of each weight, and these columns of all."""
    per_channel = stacked[0].scale.shape[1] == 1
    groups = slice(None)
    if not per_channel:
        size = COLUMNS // stacked[0].scale.shape[1]
        groups = slice(columns.start // size, columns.stop // size)
    parts = [torch.from_numpy(tensor.codes)[rows(len(tensor.codes)), columns] for tensor in stacked]
    scales = [affines(tensor, max_bits=max_bits)[rows(len(tensor.codes)), groups] for tensor in stacked]
    return make_planes(
        torch.cat(parts),
        torch.cat(scales),
        sizes=[len(part) for part in parts],
        own=own_widths(stacked[0], max_bits=max_bits),
        grid=stacked[0].grid,
        max_bits=max_bits,
    )


def half(rank: int) -> Any:
    return lambda count: slice(rank * count // RANKS, (rank + 1) * count // RANKS)


def whole(count: int) -> slice:
    return slice(0, count)


def assert_close(found: torch.Tensor, x: torch.Tensor, stacked: Sequence[NestedTensor], bits: Sequence[int]) -> None:
    """``found`` is the product with every weight at its width, up to the order of float32 sums."""
    start = 0
    for tensor, width in zip(stacked, bits, strict=True):
        dense = torch.from_numpy(tensor.read(width)).double()
        part = found[:, start : start + len(dense)].double()
        gap = (part - x.double() @ dense.T).abs() / (x.double().abs() @ dense.abs().T)
        if gap.max() > 16 * 2.0**-24:
            raise AssertionError(f"a weight at {width} bits differs by {gap.max():.1e}")
        start += len(dense)


@each(("group", "grid"), [(None, UNIFORM), (32, UNIFORM), (32, COMPANDED), (160, UNIFORM)])
def test_ranks_together_are_the_whole_layer(group: int | None, grid: str) -> None:
    stacked = [weight(rows, group=group, grid=grid, seed=rows) for rows in SIZES]
    single, x = stacked[:1], torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(0))
    by_rows = [planes_of(stacked, half(rank), slice(0, COLUMNS)) for rank in range(RANKS)]
    cuts = [half(rank)(COLUMNS) for rank in range(RANKS)]
    by_columns = [planes_of(single, whole, cut) for cut in cuts]
    for bits in [(8, 8, 8), (6, 6, 6), (4, 4, 4), (3, 3, 3), (2, 2, 2), (2, 4, 8), (5, 7, 1)]:
        for parts in (*by_rows, *by_columns):
            select(parts, bits if parts in by_rows else bits[:1])
        outputs = [torch.split(product(parts, x), [size // RANKS for size in SIZES], dim=-1) for parts in by_rows]
        together = torch.cat([torch.cat(pair, dim=-1) for pair in zip(*outputs, strict=True)], dim=-1)
        assert_close(together, x, stacked, bits)
        with pytest.raises(AssertionError, match="differs"):
            assert_close(together, x, stacked, [width % 8 + 1 for width in bits])
        added = sum(product(parts, x[:, cut]) for parts, cut in zip(by_columns, cuts, strict=True))
        assert isinstance(added, torch.Tensor)
        assert_close(added, x, single, bits[:1])


def test_memory_is_planes_and_scales() -> None:
    stacked = [weight(rows, group=32, seed=rows) for rows in SIZES]
    for max_bits, resident in ((8, 8), (4, 4), (3, 3), (2, 2)):
        (part,) = planes_of(stacked, half(0), slice(0, COLUMNS), max_bits=max_bits)
        own = len(own_widths(stacked[0], max_bits=max_bits))
        rows, columns = padded(sum(SIZES) // RANKS, COLUMNS)
        affine_bytes = 4 * (1 + own) * (COLUMNS // 32) * rows
        assert part.bytes == rows * columns * resident // 8 + affine_bytes + 4 * 9 * 6 + 4 * rows // 64


def test_a_switch_changes_numbers_in_place() -> None:
    (part,) = planes_of([weight(rows, group=None) for rows in SIZES], whole, slice(0, COLUMNS))
    before = {name: buffer.data_ptr() for name, buffer in part.named_buffers()}
    assert part.bits.tolist() == [8] * 8
    select([part], (2, 4, 6))
    assert part.bits.tolist() == [2] * 4 + [4] * 2 + [6] * 2
    assert before == {name: buffer.data_ptr() for name, buffer in part.named_buffers()}


def test_weights_that_begin_inside_64_rows_have_a_product_each() -> None:
    stacked = [weight(rows, group=None, seed=rows) for rows in (96, 64, 40)]
    parts = planes_of(stacked, whole, slice(0, COLUMNS))
    assert [part.rows for part in parts] == [96, 64, 40]
    x = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(0))
    for bits in itertools.permutations((8, 4, 2)):
        select(parts, bits)
        assert_close(product(parts, x), x, stacked, bits)


@pytest.mark.slow
def test_a_compiled_layer_switches_without_being_compiled_again() -> None:
    parts = planes_of(stacked := [weight(rows, group=32, seed=rows) for rows in SIZES], whole, slice(0, COLUMNS))
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: product(parts, x), backend=backend, fullgraph=True)
    x = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(0))
    for bits in ((8, 8, 8), (2, 2, 2), (4, 2, 8)):
        select(parts, bits)
        assert_close(compiled(x), x, stacked, bits)
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == ["matquant.linear"]


GPU = {"device": "cuda", "dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"group": 128}, None),
        ({"columns": 96, "group": 64}, "tensor parallelism leaves a rank 96 inputs, which cuts a group of 64"),
        ({"group": 16}, "GPU planes take groups of a multiple of 32 inputs, found 16"),
        (
            {"rule": "round"},
            "rule 'round' rounds, which needs a bit more than a width has; GPU planes are read by 'prefix'",
        ),
        ({"grid": "float"}, "kernels read the grids uniform and companded, found 'float'"),
        ({"kernels": "auto"}, "a product with planes needs a GPU"),
        ({**GPU, "kernels": "auto"}, "kernels need compute capability 8.0, cuda has 7.5"),
    ],
)
def test_what_planes_cannot_hold_has_a_reason(
    changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    asked: dict[str, Any] = {"rule": "prefix", "grid": "uniform", "group": None, "columns": 256, "kernels": "planes"}
    assert why_dense(**{**asked, "device": "cpu", "dtype": torch.float32, **changes}) == reason


def test_a_machine_without_a_gpu_is_told() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = why_dense(rule="prefix", grid="uniform", group=None, columns=256, **GPU)
    assert found == "no CUDA device is available"
